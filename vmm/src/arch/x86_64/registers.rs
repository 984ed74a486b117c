//! First register values of a vCPU: the boot CPU enters the kernel by PVH (32-bit protected mode, no paging, EBX pointing
//! to the start info); the others wait for the guest's INIT and SIPI.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::layout::PVH_START_INFO;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const RFLAGS_RESERVED: u64 = 1 << 1;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_IA32_MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// Where a CPU begins after a reset (Intel SDM, volume 3, 10.1.4).
const RESET_RIP: u64 = 0xfff0;
const RESET_CS: u16 = 0xf000;

/// Sets up the vCPU that boots.
///
/// # Errors
/// The ioctl that failed.
pub fn set_boot_registers(vcpu: &VcpuFd, entry: u64) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = segment(0xb, 0x8);
    for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *data = segment(0x3, 0x10);
    }
    sregs.tr = kvm_segment { selector: 0x18, limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: entry, rbx: PVH_START_INFO, rflags: RFLAGS_RESERVED, ..Default::default() })
}

/// A flat 4 GiB segment.
fn segment(type_: u8, selector: u16) -> kvm_segment {
    kvm_segment { base: 0, limit: u32::MAX, selector, type_, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}

/// Sets up what every vCPU needs. Nothing is wired to the pins of its local APIC.
///
/// # Errors
/// The ioctl that failed.
pub fn set_common(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries =
        [msr(MSR_IA32_MISC_ENABLE, MSR_IA32_MISC_ENABLE_FAST_STRING), msr(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK)];
    let msrs =
        Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(rustix::io::Errno::INVAL.raw_os_error()))?;
    vcpu.set_msrs(&msrs).map(drop)
}

/// The registers that explain a triple fault. AMD's SVM loses them: KVM has reset the vCPU before we see it.
#[must_use]
pub fn describe(vcpu: &VcpuFd) -> String {
    let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return "registers cannot be read".to_owned();
    };
    if regs.rip == RESET_RIP && sregs.cs.selector == RESET_CS {
        return "registers are those after a reset, the earlier ones are lost on this CPU".to_owned();
    }
    format!(
        "rip={:#x} rsp={:#x} rax={:#x} rflags={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
        regs.rip, regs.rsp, regs.rax, regs.rflags, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer
    )
}
