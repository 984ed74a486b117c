//! Descriptors and rings that no driver makes (VIRTIO 1.2, 2.7), on each queue of a device.

use super::exchange::works;
use crate::machine::{RAM_END, ROOT_IMAGE, write};
use crate::virtio::*;
use crate::{Report, Verdict};

/// Makes something available on a queue that is empty.
type Attack = fn(&Device, &Queue);

const ATTACKS: &[(&str, Attack)] = &[
    ("buffer-behind-ram", |_, queue| one(queue, RAM_END, 64, WRITE)),
    ("buffer-across-the-end-of-ram", |_, queue| one(queue, RAM_END - 8, 64, WRITE)),
    ("readable-buffer-behind-ram", |_, queue| one(queue, RAM_END, 64, 0)),
    ("readable-buffer-across-the-end-of-ram", |_, queue| one(queue, RAM_END - 8, 4096, 0)),
    ("buffer-in-the-hole", |_, queue| one(queue, 0xd000_0000, 4096, WRITE)),
    ("buffer-in-the-root-image", |_, queue| one(queue, ROOT_IMAGE, 4096, WRITE)),
    ("buffer-on-a-device", |device, queue| one(queue, device.window, 4096, WRITE)),
    ("buffer-on-the-local-apic", |_, queue| one(queue, 0xfee0_0000, 4096, WRITE)),
    ("buffer-at-the-end-of-the-address-space", |_, queue| one(queue, u64::MAX - 7, 64, WRITE)),
    ("buffer-that-wraps", |_, queue| one(queue, u64::MAX - 7, u32::MAX, 0)),
    ("buffer-without-a-byte", |_, queue| one(queue, queue.buffer, 0, WRITE)),
    ("readable-buffer-without-a-byte", |_, queue| one(queue, queue.buffer, 0, 0)),
    ("buffer-of-4-gib", |_, queue| one(queue, queue.buffer, u32::MAX, WRITE)),
    ("readable-buffer-of-4-gib", |_, queue| one(queue, queue.buffer, u32::MAX, 0)),
    ("buffer-of-one-byte", |_, queue| one(queue, queue.buffer, 1, WRITE)),
    ("readable-buffer-of-one-byte", |_, queue| one(queue, queue.buffer, 1, 0)),
    ("buffer-on-the-rings", |_, queue| one(queue, queue.desc, 0x3_0000, WRITE)),
    ("readable-buffer-on-the-rings", |_, queue| one(queue, queue.desc, 0x3_0000, 0)),
    ("flags-all-ones", |_, queue| one(queue, queue.buffer, 64, u16::MAX)),
    ("flags-reserved", |_, queue| one(queue, queue.buffer, 64, 0xfff8)),
    ("chain-to-itself", |_, queue| {
        queue.describe(0, queue.buffer, 64, NEXT, 0);
        queue.offer(0);
    }),
    ("chain-of-two-in-a-circle", |_, queue| {
        queue.describe(0, queue.buffer, 64, NEXT, 1);
        queue.describe(1, queue.buffer, 64, NEXT | WRITE, 0);
        queue.offer(0);
    }),
    ("chain-out-of-the-table", |_, queue| {
        queue.describe(0, queue.buffer, 64, NEXT, queue.size);
        queue.offer(0);
    }),
    ("chain-far-out-of-the-table", |_, queue| {
        queue.describe(0, queue.buffer, 64, NEXT, u16::MAX);
        queue.offer(0);
    }),
    ("chain-with-a-bad-end", |_, queue| {
        queue.describe(0, queue.buffer, 64, NEXT, 1);
        queue.describe(1, RAM_END + 64, 64, WRITE, 0);
        queue.offer(0);
    }),
    ("chain-readable-behind-writable", |_, queue| {
        queue.describe(0, queue.buffer, 64, NEXT | WRITE, 1);
        queue.describe(1, queue.buffer + 64, 64, 0, 0);
        queue.offer(0);
    }),
    ("chain-as-long-as-the-table", |_, queue| {
        for at in 0..queue.size {
            queue.describe(at, queue.buffer, 16, NEXT, at + 1);
        }
        queue.describe(queue.size - 1, queue.buffer, 16, WRITE, 0);
        queue.offer(0);
    }),
    ("chain-of-4-gib-buffers", |_, queue| {
        for at in 0..queue.size {
            queue.describe(at, queue.buffer, u32::MAX, NEXT | WRITE, at + 1);
        }
        queue.offer(0);
    }),
    ("head-out-of-the-table", |_, queue| queue.offer(queue.size)),
    ("head-far-out-of-the-table", |_, queue| queue.offer(u16::MAX)),
    ("one-head-many-times", |_, queue| {
        queue.describe(0, queue.buffer, 64, WRITE, 0);
        for _ in 0..queue.size {
            queue.offer(0);
        }
    }),
    ("more-available-than-entries", |_, queue| {
        queue.describe(0, queue.buffer, 64, WRITE, 0);
        write(queue.avail + 2, queue.size + 1);
    }),
    ("available-index-all-ones", |_, queue| write(queue.avail + 2, u16::MAX)),
    ("available-index-goes-back", |device, queue| {
        queue.describe(0, queue.buffer, 64, WRITE, 0);
        queue.offer(0);
        queue.offer(0);
        device.kick(queue.index);
        write(queue.avail + 2, 1_u16);
    }),
    ("available-flags-all-ones", |_, queue| {
        write(queue.avail, u16::MAX);
        one(queue, queue.buffer, 64, WRITE);
    }),
    ("used-ring-is-written-by-the-guest", |_, queue| {
        for at in (0..0x800).step_by(8) {
            write(queue.used + at, u64::MAX);
        }
        one(queue, queue.buffer, 64, WRITE);
    }),
    ("table-indirect", |_, queue| {
        descriptor(queue.buffer, queue.buffer + 0x1000, 64, WRITE, 0);
        one(queue, queue.buffer, 16, TABLE);
    }),
    ("table-of-no-descriptor", |_, queue| one(queue, queue.buffer, 0, TABLE)),
    ("table-of-half-a-descriptor", |_, queue| one(queue, queue.buffer, 8, TABLE)),
    ("table-of-4-gib", |_, queue| one(queue, queue.buffer, 0xffff_fff0, TABLE)),
    ("table-behind-ram", |_, queue| one(queue, RAM_END, 64, TABLE)),
    ("table-at-the-end-of-the-address-space", |_, queue| one(queue, !0xf, 64, TABLE)),
    ("table-in-a-table", |_, queue| {
        descriptor(queue.buffer, queue.buffer, 16, TABLE, 0);
        one(queue, queue.buffer, 16, TABLE);
    }),
    ("table-that-goes-on", |_, queue| {
        queue.describe(0, queue.buffer, 16, TABLE | NEXT, 1);
        queue.describe(1, queue.buffer, 16, WRITE, 0);
        queue.offer(0);
    }),
    ("table-in-a-circle", |_, queue| {
        descriptor(queue.buffer, queue.buffer, 16, NEXT, 0);
        one(queue, queue.buffer, 16, TABLE);
    }),
    ("table-that-leads-out-of-itself", |_, queue| {
        descriptor(queue.buffer, queue.buffer, 16, NEXT, 4);
        one(queue, queue.buffer, 32, TABLE);
    }),
    ("table-with-more-entries-than-a-queue", |_, queue| {
        for at in 0..4095_u16 {
            descriptor(queue.buffer + 16 * u64::from(at), queue.buffer, 16, NEXT | WRITE, at + 1);
        }
        one(queue, queue.buffer, 4096 * 16, TABLE);
    }),
    ("table-that-the-device-may-write", |_, queue| {
        descriptor(queue.buffer, queue.buffer + 0x1000, 64, WRITE, 0);
        one(queue, queue.buffer, 16, TABLE | WRITE);
    }),
    ("garbage-everywhere", |_, queue| {
        let mut number = 0x9e37_79b9_7f4a_7c15_u64;
        for at in 0..u64::from(queue.size) * 2 {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            write(queue.desc + at * 8, number);
        }
        for head in 0..queue.size {
            queue.offer(head);
        }
    }),
];

/// Runs them on each queue.
pub fn attack(report: &mut Report, device: &Device) {
    for index in 0..device.queue_count() {
        for (name, attack) in ATTACKS {
            let verdict = attack_queue(device, index, *attack).and_then(|()| works(device));
            report.tell(format_args!("{}/queue{index}/{name}", device.kind.name()), verdict);
        }
    }
}

fn attack_queue(device: &Device, index: u16, attack: Attack) -> Verdict {
    if !device.start(INDIRECT) {
        return Err("it does not start");
    }
    let queue = Queue::of_device(device, index);
    attack(device, &queue);
    device.kick(index);
    pause_long();
    Ok(())
}

/// Makes one buffer available.
fn one(queue: &Queue, address: u64, len: u32, flags: u16) {
    queue.describe(0, address, len, flags, 0);
    queue.offer(0);
}
