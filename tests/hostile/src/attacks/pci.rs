//! Configuration space (PCI 3.0, chapter 6): of one device, and of the bus.

use super::exchange::works;
use crate::machine::{Width as _, read, write};
use crate::pci::{self, BAR0, COMMAND, SLOT_COUNT};
use crate::virtio::{Device, WINDOW_LEN};
use crate::{Report, Verdict};

/// Addresses that no window should get: RAM, this program, the interrupt controllers, the end of the address space.
const BAD_PLACES: [(&str, u32); 6] = [
    ("ram", 0x0300_0000),
    ("this-program", 0x0010_0000),
    ("io-apic", 0xfec0_0000),
    ("local-apic", 0xfee0_0000),
    ("the-end-of-4-gib", 0xffff_8000),
    ("the-first-device", 0xc000_0000),
];

/// Runs the cases of a device.
pub fn attack(report: &mut Report, device: &Device) {
    let mut tell = |name: &str, verdict: Verdict| {
        report.tell(format_args!("{}/pci/{name}", device.kind.name()), verdict.and_then(|()| works(device)));
    };
    tell("every-register-all-ones", every_register(device, u32::MAX));
    tell("every-register-zeros", every_register(device, 0));
    tell("every-register-in-wrong-widths", wrong_widths(device));
    tell("memory-access-off", {
        let before: u16 = pci::read(device.slot, COMMAND);
        pci::write(device.slot, COMMAND, 0_u16);
        let _: u32 = device.get(0);
        device.kick(0);
        pci::write(device.slot, COMMAND, before);
        Ok(())
    });
    tell("window-is-sized-and-left-so", {
        pci::write(device.slot, BAR0, u32::MAX);
        let _: u32 = device.get(0);
        let size: u32 = pci::read(device.slot, BAR0);
        pci::write(device.slot, BAR0, device.window as u32);
        if size & !0xf == (WINDOW_LEN as u32).wrapping_neg() { Ok(()) } else { Err("a wrong size") }
    });
    tell("vectors-on-off-masked", {
        for control in [0x8000_u16, 0xc000, 0x4000, 0xffff, 0] {
            if let Some(capability) = pci::capability(device.slot, 0x11) {
                pci::write(device.slot, capability + 2, control);
            }
        }
        Ok(())
    });
    for (name, place) in BAD_PLACES {
        let verdict = move_and_return(device, place);
        report.tell(
            format_args!("{}/pci/window-moved-to-{name}", device.kind.name()),
            verdict.and_then(|()| works(device)),
        );
    }
    report.tell(format_args!("{}/pci/window-moved-while-it-runs", device.kind.name()), moved_while_running(device));
}

/// Moves the window, touches it there, and moves it back.
fn move_and_return(device: &Device, place: u32) -> Verdict {
    pci::write(device.slot, BAR0, place);
    // What this program itself lies on is not touched.
    if (0x200_0000..0xfec0_0000).contains(&place) {
        for at in (0..0x6000).step_by(0x800) {
            let value: u32 = read(u64::from(place) + at);
            if place < 0x800_0000 {
                write(u64::from(place) + at, value);
            }
        }
    }
    pci::write(device.slot, BAR0, device.window as u32);
    Ok(())
}

fn moved_while_running(device: &Device) -> Verdict {
    const ELSEWHERE: u32 = 0xd000_0000;
    if !device.start(0) {
        return Err("it does not start");
    }
    pci::write(device.slot, BAR0, ELSEWHERE);
    let moved = Device { window: u64::from(ELSEWHERE), ..*device };
    let verdict = works(&moved);
    pci::write(device.slot, BAR0, device.window as u32);
    verdict.and_then(|()| works(device))
}

fn every_register(device: &Device, value: u32) -> Verdict {
    let before: u16 = pci::read(device.slot, COMMAND);
    for register in (0..=252_u8).step_by(4) {
        pci::write(device.slot, register, value);
        let _: u32 = pci::read(device.slot, register);
    }
    pci::write(device.slot, BAR0, device.window as u32);
    pci::write(device.slot, COMMAND, before);
    if Device::find(device.slot).is_some_and(|found| found.kind == device.kind) {
        Ok(())
    } else {
        Err("it is another device")
    }
}

fn wrong_widths(device: &Device) -> Verdict {
    for register in 0..=255_u8 {
        let (_, _): (u8, u16) = (pci::read(device.slot, register), pci::read(device.slot, register));
        pci::write(device.slot, register, 0_u8);
        pci::write(device.slot, register, 0_u16);
    }
    pci::write(device.slot, BAR0, device.window as u32);
    pci::write(device.slot, COMMAND, 6_u16);
    Ok(())
}

/// Runs the cases of the bus.
pub fn attack_bus(report: &mut Report) {
    report.tell(format_args!("bus/functions-that-do-not-exist"), {
        let mut found = false;
        for selector in (0x0001_0000..0x0200_0000_u32).step_by(0x2_1100) {
            (1 << 31 | selector).write_port(pci::ADDRESS);
            found |= u32::read_port(pci::DATA) != u32::MAX;
        }
        if found { Err("something is on another bus") } else { Ok(()) }
    });
    report.tell(format_args!("bus/empty-slots"), {
        let last = pci::read::<u32>(SLOT_COUNT - 1, 0);
        pci::write(SLOT_COUNT - 1, BAR0, 0xd000_0000_u32);
        if last == u32::MAX { Ok(()) } else { Err("a slot is not empty") }
    });
    report.tell(format_args!("bus/selection-without-enable"), {
        0x0800_u32.write_port(pci::ADDRESS);
        if u32::read_port(pci::DATA) == u32::MAX { Ok(()) } else { Err("it answers") }
    });
    report.tell(format_args!("bus/selector-in-wrong-widths"), {
        for offset in 0..4 {
            0xff_u8.write_port(pci::ADDRESS + offset);
            let _ = u8::read_port(pci::ADDRESS + offset);
            0xffff_u16.write_port(pci::ADDRESS + offset);
            u32::MAX.write_port(pci::ADDRESS + offset);
        }
        Ok(())
    });
    report.tell(format_args!("bus/the-first-slot-is-written"), {
        for register in (0..=252_u8).step_by(4) {
            pci::write(0, register, u32::MAX);
        }
        if pci::read::<u32>(0, BAR0) == u32::MAX { Ok(()) } else { Err("something is there") }
    });
    report.tell(format_args!("bus/the-copy-says-what-the-ports-say"), the_copy_agrees());
    report.tell(format_args!("bus/the-copy-is-overwritten"), {
        let first_device = pci::read::<u32>(1, 0);
        for at in (0..u64::from(SLOT_COUNT) * COPY_OF_SLOT).step_by(4) {
            write(CONFIG_COPY + at, 0xdead_beef_u32);
        }
        let kept = pci::read::<u32>(1, 0) == first_device;
        // Whoever writes a register finds the others as they are.
        (0..SLOT_COUNT).for_each(|slot| pci::write(slot, COMMAND, pci::read::<u16>(slot, COMMAND)));
        if kept && read::<u32>(CONFIG_COPY + COPY_OF_SLOT) == first_device {
            Ok(())
        } else {
            Err("the copy was believed")
        }
    });
}

/// Where the VMM keeps a copy of configuration space, 256 bytes for each function.
const CONFIG_COPY: u64 = 0xd_0000;
const COPY_OF_SLOT: u64 = 8 * 256;

fn the_copy_agrees() -> Verdict {
    for slot in 0..SLOT_COUNT {
        for register in (0..=252_u8).step_by(4) {
            let copied: u32 = read(CONFIG_COPY + u64::from(slot) * COPY_OF_SLOT + u64::from(register));
            if copied != pci::read::<u32>(slot, register) {
                return Err("a register differs");
            }
        }
    }
    Ok(())
}
