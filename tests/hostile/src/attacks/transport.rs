//! The registers of a device (VIRTIO 1.2, 2.1 and 4.1.4): the status state machine, features, frozen queues, MSI-X, doorbells.

use super::exchange::{answers, works};
use crate::machine::{RAM_END, read};
use crate::virtio::*;
use crate::{Report, Verdict};

type Attack = fn(&Device) -> Verdict;

/// Cases that begin with a device that was reset.
const ON_RESET: &[(&str, Attack)] = &[
    ("ok-before-features", |device| {
        device.set(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
        refuse(device.status() & DRIVER_OK != 0, "DRIVER_OK without FEATURES_OK")
    }),
    ("features-without-version-1", |device| refuse(device.negotiate(0), "a legacy driver was accepted")),
    ("features-not-offered", |device| {
        refuse(device.negotiate(VERSION_1 | !device.offered()), "features that were not offered were accepted")
    }),
    ("features-after-features-ok", |device| {
        device.negotiate(VERSION_1);
        device.set(DRIVER_FEATURE_SELECT, 0_u32);
        device.set(DRIVER_FEATURE, u32::MAX);
        refuse(device.get::<u32>(DRIVER_FEATURE) != 0, "features changed after FEATURES_OK")
    }),
    ("feature-words-that-do-not-exist", |device| {
        for select in [2_u32, 3, 31, 32, u32::MAX] {
            device.set(DRIVER_FEATURE_SELECT, select);
            device.set(DRIVER_FEATURE, u32::MAX);
        }
        if device.negotiate(VERSION_1) { Ok(()) } else { Err("a wild feature word counted") }
    }),
    ("status-bits-taken-back", |device| {
        device.negotiate(VERSION_1);
        device.set(STATUS, ACKNOWLEDGE);
        refuse(device.status() & FEATURES_OK == 0, "a status bit was taken back")
    }),
    ("status-every-value", |device| {
        for status in 1..=u8::MAX {
            device.set(STATUS, status);
        }
        Ok(())
    }),
    ("needs-reset-cannot-be-set", |device| {
        device.set(STATUS, NEEDS_RESET);
        refuse(device.status() & NEEDS_RESET != 0, "the driver set DEVICE_NEEDS_RESET")
    }),
    ("ready-without-queues", |device| {
        device.negotiate(VERSION_1);
        device.go();
        Ok(())
    }),
    ("kick-before-ready", |device| {
        for queue in 0..device.queue_count() {
            device.kick(queue);
        }
        Ok(())
    }),
    ("kick-queues-that-do-not-exist", |device| {
        for at in (NOTIFY..NOTIFY + 0x1000).step_by(4) {
            device.set(at, 0xffff_u16);
        }
        Ok(())
    }),
    ("queue-sizes", |device| {
        device.negotiate(VERSION_1);
        device.set(QUEUE_SELECT, 0_u16);
        let size: u16 = device.get(QUEUE_SIZE);
        for wild in [0, 3, size + 1, size * 2, 0x8000, u16::MAX] {
            device.set(QUEUE_SIZE, wild);
        }
        refuse(device.get::<u16>(QUEUE_SIZE) != size, "a queue size that is none was accepted")
    }),
    ("queues-that-do-not-exist", |device| {
        device.negotiate(VERSION_1);
        for index in [device.queue_count(), 0x100, 0x7fff, u16::MAX] {
            device.set(QUEUE_SELECT, index);
            device.set(QUEUE_ENABLE, 1_u16);
            if device.get::<u16>(QUEUE_SIZE) != 0 || device.get::<u16>(QUEUE_ENABLE) != 0 {
                return Err("a queue that does not exist answered");
            }
        }
        Ok(())
    }),
    ("queue-moved-after-it-was-enabled", |device| {
        device.negotiate(VERSION_1);
        device.place(&Queue::of(0), 0);
        device.set(QUEUE_DESC, 0x1234_5000_u32);
        refuse(device.get::<u32>(QUEUE_DESC) == 0x1234_5000, "an enabled queue moved")
    }),
    ("queue-disabled-again", |device| {
        device.negotiate(VERSION_1);
        device.place(&Queue::of(0), 0);
        device.set(QUEUE_ENABLE, 0_u16);
        refuse(device.get::<u16>(QUEUE_ENABLE) == 0, "a queue was disabled")
    }),
    ("rings-at-the-end-of-ram", |device| needs_reset(device, |queue| queue.desc = RAM_END - 16)),
    ("rings-behind-ram", |device| needs_reset(device, |queue| queue.avail = RAM_END)),
    ("rings-on-the-device-itself", |device| {
        let window = device.window;
        needs_reset(device, |queue| queue.used = window)
    }),
    ("rings-at-the-end-of-the-address-space", |device| needs_reset(device, |queue| queue.desc = !0xf)),
    ("rings-not-aligned", |device| needs_reset(device, |queue| queue.desc += 1)),
    ("rings-on-each-other", |device| {
        start_with(device, |queue| {
            queue.avail = queue.desc;
            queue.used = queue.desc;
        });
        kick_all(device)
    }),
    ("vectors-that-do-not-exist", |device| {
        for vector in [0x100_u16, 0x7ff, 0x800, 0xfffe] {
            device.set(CONFIG_VECTOR, vector);
            device.set(QUEUE_VECTOR, vector);
            if device.get::<u16>(CONFIG_VECTOR) != 0xffff {
                return Err("a vector that does not exist was accepted");
            }
        }
        Ok(())
    }),
    ("every-register-all-ones", |device| every_register(device, u32::MAX)),
    ("every-register-zeros", |device| every_register(device, 0)),
    ("every-register-in-wrong-widths", |device| {
        for at in 0..0x40 {
            let (_, _): (u8, u64) = (device.get(at), device.get(at));
            device.set(at, u8::MAX);
            device.set(at, u64::MAX);
        }
        Ok(())
    }),
    ("the-whole-window-is-read", |device| {
        for at in (0..WINDOW_LEN).step_by(64) {
            let _: u64 = device.get(at);
        }
        let _: u64 = device.get(WINDOW_LEN - 4);
        Ok(())
    }),
    ("configuration-is-written", |device| {
        for at in (0..0x100).step_by(4) {
            device.set(DEVICE_CONFIG + at, u32::MAX);
        }
        Ok(())
    }),
    ("interrupt-status-is-written", |device| {
        device.set(ISR, u32::MAX);
        refuse(device.get::<u32>(ISR) != 0, "an interrupt status without an interrupt line")
    }),
    ("vector-table-all-ones", |device| vector_table(device, u32::MAX)),
    ("vector-table-zeros", |device| vector_table(device, 0)),
    ("vector-table-unaligned", |device| {
        for at in 0..64 {
            device.set(MSIX_TABLE + at * 3, u64::MAX);
            let _: u64 = device.get(MSIX_PENDING + at * 3);
        }
        Ok(())
    }),
];

/// Cases that begin with a device that works.
const ON_RUNNING: &[(&str, Attack)] = &[
    ("queue-moved-while-it-runs", |device| {
        for register in [QUEUE_DESC, QUEUE_AVAIL, QUEUE_USED] {
            device.set(register, 0xdead_0000_u32);
            device.set(register + 4, u32::MAX);
        }
        device.set(QUEUE_SIZE, 1_u16);
        answers(device)
    }),
    ("features-changed-while-it-runs", |device| {
        device.set(DRIVER_FEATURE_SELECT, 0_u32);
        device.set(DRIVER_FEATURE, u32::MAX);
        answers(device)
    }),
    ("ready-twice", |device| {
        device.go();
        device.go();
        answers(device)
    }),
    ("reset-in-the-middle-of-requests", |device| {
        for _ in 0..8 {
            for index in 0..device.queue_count() {
                let queue = Queue::of_device(device, index);
                queue.describe(0, queue.buffer, 64, WRITE, 0);
                queue.offer(0);
                device.kick(index);
            }
            if !device.start(0) {
                return Err("it does not start again");
            }
        }
        answers(device)
    }),
    ("interrupts-to-wild-vectors", |device| {
        use crate::pci;
        let Some(capability) = pci::capability(device.slot, 0x11) else { return Err("no MSI-X capability") };
        device.reset();
        pci::write(device.slot, capability + 2, 0x8000_u16);
        for (at, word) in
            (MSIX_TABLE..MSIX_TABLE + 64).step_by(4).zip([0xdead_beef_u32, u32::MAX, u32::MAX, 0].iter().cycle())
        {
            device.set(at, *word);
        }
        let negotiated = device.negotiate(VERSION_1);
        for index in 0..device.queue_count() {
            let queue = Queue::of(index);
            queue.clear();
            device.set(QUEUE_SELECT, index);
            device.set(QUEUE_VECTOR, index.min(1));
            device.place(&queue, 0);
        }
        let verdict = if negotiated && device.go() { answers(device) } else { Err("it does not start") };
        pci::write(device.slot, capability + 2, 0_u16);
        verdict
    }),
    ("a-storm-of-kicks", |device| {
        for _ in 0..200 {
            for index in 0..device.queue_count() {
                device.kick(index);
            }
        }
        answers(device)
    }),
];

/// Runs them all.
pub fn attack(report: &mut Report, device: &Device) {
    for (name, attack) in ON_RESET {
        device.reset();
        let verdict = attack(device).and_then(|()| works(device));
        report.tell(format_args!("{}/transport/{name}", device.kind.name()), verdict);
    }
    for (name, attack) in ON_RUNNING {
        let started = if device.start(0) { Ok(()) } else { Err("it does not start") };
        let verdict = started.and_then(|()| attack(device)).and_then(|()| works(device));
        report.tell(format_args!("{}/running/{name}", device.kind.name()), verdict);
    }
}

fn refuse(accepted: bool, what: &'static str) -> Verdict {
    if accepted { Err(what) } else { Ok(()) }
}

/// Starts the device with queue 0 changed.
fn start_with(device: &Device, change: impl Fn(&mut Queue)) -> bool {
    device.negotiate(VERSION_1);
    let mut queue = Queue::of(0);
    queue.clear();
    change(&mut queue);
    device.place(&queue, 0);
    device.go()
}

fn needs_reset(device: &Device, change: impl Fn(&mut Queue)) -> Verdict {
    start_with(device, change);
    kick_all(device)?;
    refuse(device.status() & NEEDS_RESET == 0, "rings that cannot be did not need a reset")
}

fn kick_all(device: &Device) -> Verdict {
    for index in 0..device.queue_count() {
        device.kick(index);
    }
    pause_long();
    Ok(())
}

fn every_register(device: &Device, value: u32) -> Verdict {
    for at in (0..0x40).step_by(4) {
        device.set(at, value);
        let _: u32 = read(device.window + at);
    }
    Ok(())
}

fn vector_table(device: &Device, value: u32) -> Verdict {
    for at in (0..0x1000).step_by(16) {
        device.set(MSIX_TABLE + at, value);
        device.set(MSIX_TABLE + at + 12, value);
        device.set(MSIX_PENDING + at, value);
    }
    Ok(())
}
