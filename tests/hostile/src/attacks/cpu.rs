//! What a CPU can do to its hypervisor: memory and ports without a device, model-specific registers, odd instructions, hypercalls.

use crate::machine::{
    Odd, ROOT_IMAGE, ROOT_IMAGE_END, Width as _, cpuid, hypercall, read, read_counter, read_msr, run_odd, write,
    write_msr,
};
use crate::{Report, Verdict};

/// Physical addresses without a device.
const NOWHERE: [(&str, u64); 5] = [
    ("behind-ram", 0x800_0000),
    ("the-end-of-the-pci-windows", 0xfebf_f000),
    ("beside-the-io-apic", 0xfec0_1000),
    ("beside-the-local-apic", 0xfee0_1000),
    ("firmware", 0xffff_f000),
];
/// Mapped by boot.s to 32 GiB.
const FAR_AWAY: u64 = 512 << 30;

const MSR_RANGES: [(&str, u32, u32); 8] = [
    ("architectural", 0, 0x1000),
    ("x2apic", 0x800, 0x900),
    ("kvm-old", 0x11, 0x13),
    ("kvm", 0x4b56_4d00, 0x4b56_4d10),
    ("hyper-v", 0x4000_0000, 0x4000_0110),
    ("amd", 0xc000_0080, 0xc000_0110),
    ("amd-performance", 0xc001_0000, 0xc001_0210),
    ("amd-ibs", 0xc001_1000, 0xc001_1040),
];
/// Registers whose change would end this program rather than attack the host: EFER, segment bases, the local APIC's base and its
/// registers, those that KVM writes memory for.
const OWN_MSRS: [u32; 5] = [0x1b, 0xc000_0080, 0xc000_0100, 0xc000_0101, 0xc000_0102];

/// Whether each may run: KVM makes MWAIT and the cache instructions do nothing.
const ODD: [(&str, Odd, bool); 8] = [
    ("vmrun", Odd::Vmrun, false),
    ("vmxoff", Odd::Vmxoff, false),
    ("rsm", Odd::Rsm, false),
    ("wbinvd", Odd::Wbinvd, true),
    ("invd", Odd::Invd, true),
    ("mwait", Odd::Mwait, true),
    ("xsetbv", Odd::Xsetbv, false),
    ("ud2", Odd::Ud2, false),
];

/// Runs the cases.
pub fn attack(report: &mut Report) {
    for (name, address) in NOWHERE.into_iter().chain([("far-away", FAR_AWAY)]) {
        report.tell(format_args!("cpu/memory/{name}"), touch(address));
    }
    report.tell(format_args!("cpu/memory/root-image"), cannot_write_the_root_image());
    for (name, from, to) in [("low", 0, 0x400), ("middle", 0x400, 0xc00), ("high", 0xfc00, 0xffff)] {
        report.tell(format_args!("cpu/ports/{name}"), ports(from, to));
    }
    for (name, from, to) in MSR_RANGES {
        report.tell(format_args!("cpu/msr/{name}-read"), {
            for register in from..to {
                let _ = read_msr(register);
            }
            Ok(())
        });
        report.tell(format_args!("cpu/msr/{name}-written-as-read"), written_as_read(from, to));
    }
    report.tell(format_args!("cpu/msr/kvm-memory-outside-ram"), {
        // Wall clock and system time, at an address that is no RAM.
        for register in [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04] {
            write_msr(register, 0xd000_0001);
            write_msr(register, u64::MAX);
            write_msr(register, 0);
        }
        Ok(())
    });
    for (name, odd, allowed) in ODD {
        let verdict = if run_odd(odd) && !allowed { Err("it ran") } else { Ok(()) };
        report.tell(format_args!("cpu/instruction/{name}"), verdict);
    }
    report.tell(format_args!("cpu/cpuid/every-leaf"), leaves());
    report.tell(format_args!("cpu/cpuid/no-nested-virtualization"), {
        let [_, _, ecx, _] = cpuid(1, 0);
        let [_, _, amd, _] = cpuid(0x8000_0001, 0);
        if ecx >> 5 & 1 == 0 && amd >> 2 & 1 == 0 { Ok(()) } else { Err("the guest could run guests") }
    });
    report.tell(format_args!("cpu/cpuid/no-performance-counters"), {
        let [eax, ..] = cpuid(0xa, 0);
        if eax & 0xff == 0 { Ok(()) } else { Err("the guest has performance counters") }
    });
    report.tell(format_args!("cpu/counters/count-nothing"), counters());
    for intel in [true, false] {
        let name = if intel { "vmcall" } else { "vmmcall" };
        report.tell(format_args!("cpu/hypercall/{name}"), {
            for number in (0..64).chain([u64::MAX, 1 << 31]) {
                // 5 and 11 wake or yield to another CPU: there is none.
                let _ = hypercall(intel, number, u64::MAX);
            }
            Ok(())
        });
    }
}

fn touch(address: u64) -> Verdict {
    for at in (0..0x800).step_by(0x111) {
        let (_, _): (u8, u64) = (read(address + at), read(address + at));
        write(address + at, u8::MAX);
        write(address + at, u64::MAX);
    }
    if read::<u32>(address) == u32::MAX { Ok(()) } else { Err("something is there") }
}

/// The VMs of a host have the pages of their root image in common.
fn cannot_write_the_root_image() -> Verdict {
    for address in (ROOT_IMAGE..ROOT_IMAGE_END).step_by(0x1_0008).chain([ROOT_IMAGE_END - 8]) {
        let before = read::<u64>(address);
        write(address, !before);
        write(address, u8::MAX);
        if read::<u64>(address) != before {
            return Err("it can be written");
        }
    }
    Ok(())
}

/// All but those that end the VM (0x64), speak (the console) or select a register of the bus.
fn ports(from: u16, to: u16) -> Verdict {
    for port in (from..to).filter(|port| !matches!(port, 0x60..=0x67 | 0x3f8..=0x3ff | 0xcf8..=0xcff)) {
        let (_, _, _) = (u8::read_port(port), u16::read_port(port), u32::read_port(port));
        // The interrupt controllers and the timer of the chip set are KVM's; they get a value too.
        0_u8.write_port(port);
    }
    Ok(())
}

fn written_as_read(from: u32, to: u32) -> Verdict {
    for register in (from..to).filter(|register| !OWN_MSRS.contains(register)) {
        if let Some(value) = read_msr(register) {
            write_msr(register, value);
        }
    }
    Ok(())
}

/// Sets up each counter of AMD's and Intel's for instructions; none may count.
fn counters() -> Verdict {
    const INSTRUCTIONS: u64 = 0x53_00c0;
    for counter in 0..4 {
        for select in [0xc001_0000 + counter, 0xc001_0200 + 2 * counter, 0x186 + counter, 0x38f] {
            write_msr(select, INSTRUCTIONS);
        }
        let before = read_counter(counter);
        let _ = leaves();
        if read_counter(counter) != before {
            return Err("a performance counter counts");
        }
    }
    Ok(())
}

fn leaves() -> Verdict {
    for base in [0, 0x4000_0000, 0x8000_0000, 0xc000_0000_u32] {
        for leaf in base..base + 0x30 {
            cpuid(leaf, 0);
            cpuid(leaf, 1);
            cpuid(leaf, u32::MAX);
        }
    }
    Ok(())
}
