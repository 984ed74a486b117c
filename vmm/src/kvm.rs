//! `/dev/kvm` and the VM's descriptor: capabilities, local APICs, memory slots.
#![expect(unsafe_code, reason = "a memory slot hands a range of our address space to KVM")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, IntoRawFd as _, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION,
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PMU_CAP_DISABLE, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Address as _, GuestMemory as _, GuestMemoryRegion as _, MemoryRegionAddress};

use crate::arch::layout::ROOT_IMAGE_START;
use crate::arch::msrs;
use crate::root_image::RootImage;
use crate::virtio::GuestMemory;

/// API version of KVM since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// Three pages that KVM uses on Intel CPUs, in the last megabyte below 4 GiB, outside RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Why KVM cannot be used.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The device cannot be opened.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// An API that nobody else has seen.
    #[error("KVM speaks API version {found}, not {API_VERSION}: this kernel is too old")]
    Version {
        /// What it said.
        found: i32,
    },
    /// A capability is missing.
    #[error("KVM of this host lacks {capability:?}, which a guest needs: use a newer host kernel")]
    Capability {
        /// Which.
        capability: Cap,
    },
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Ioctl {
        /// Which.
        ioctl: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
}

/// What each guest needs.
const NEEDED: [Cap; 10] = [
    Cap::SplitIrqchip,
    Cap::UserMemory,
    Cap::Ioeventfd,
    Cap::SignalMsi,
    Cap::SetTssAddr,
    Cap::ExtCpuid,
    Cap::ImmediateExit,
    Cap::AdjustClock,
    Cap::ReadonlyMem,
    Cap::X86MsrFilter,
];

/// Opens KVM, from a descriptor if the caller gave one.
///
/// # Errors
/// [`KvmError::Open`], [`KvmError::Version`] and [`KvmError::Capability`].
pub fn open(given: Option<OwnedFd>) -> Result<Kvm, KvmError> {
    let kvm = match given {
        // SAFETY: the descriptor is owned and given up here; that it is /dev/kvm shows in the version check below.
        Some(fd) => unsafe { <Kvm as std::os::fd::FromRawFd>::from_raw_fd(fd.into_raw_fd()) },
        None => return open(Some(open_device()?)),
    };
    let found = kvm.get_api_version();
    if found != API_VERSION {
        return Err(KvmError::Version { found });
    }
    check_capabilities(|capability| kvm.check_extension(capability))?;
    Ok(kvm)
}

/// Opens the device and nothing more.
///
/// # Errors
/// [`KvmError::Open`].
pub fn open_device() -> Result<OwnedFd, KvmError> {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    opened.map(OwnedFd::from).map_err(KvmError::Open)
}

/// Names the first capability that is missing.
fn check_capabilities(has: impl Fn(Cap) -> bool) -> Result<(), KvmError> {
    match NEEDED.into_iter().find(|capability| !has(*capability)) {
        Some(capability) => Err(KvmError::Capability { capability }),
        None => Ok(()),
    }
}

/// Makes a VM with local APICs, its memory, and without the registers that no guest reaches.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn create_vm(kvm: &Kvm, memory: &GuestMemory, root_image: Option<RootImage>) -> Result<Arc<VmFd>, KvmError> {
    let ioctl = |ioctl| move |source| KvmError::Ioctl { ioctl, source };
    let vm = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
    // On AMD a guest has performance counters, whatever its CPUID says, unless they are taken away (Linux 5.18).
    if kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()).cast_unsigned() & KVM_PMU_CAP_DISABLE != 0 {
        let disable = [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0];
        let capability = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, args: disable, ..Default::default() };
        vm.enable_cap(&capability).map_err(ioctl("KVM_ENABLE_CAP of KVM_CAP_PMU_CAPABILITY"))?;
    }
    filter_msrs(&vm).map_err(ioctl("KVM_X86_SET_MSR_FILTER"))?;
    let mut slots = Vec::new();
    for region in memory.iter() {
        let address = region.get_host_address(MemoryRegionAddress(0)).map_err(|_| KvmError::Ioctl {
            ioctl: "finding guest RAM",
            source: kvm_ioctls::Error::new(rustix::io::Errno::FAULT.raw_os_error()),
        })?;
        slots.push(kvm_userspace_memory_region {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: address.addr() as u64,
            ..Default::default()
        });
    }
    slots.extend(root_image.map(|image| kvm_userspace_memory_region {
        flags: KVM_MEM_READONLY,
        guest_phys_addr: ROOT_IMAGE_START,
        memory_size: image.size,
        userspace_addr: image.address,
        ..Default::default()
    }));
    for (number, slot) in (0..).zip(slots) {
        let slot = kvm_userspace_memory_region { slot: number, ..slot };
        // SAFETY: the range is a mapping of `memory`, which the machine keeps until after the VM is gone, or of the root
        // image, which stays; slots are numbered once and their guest ranges do not overlap: `memory` allows no overlap,
        // and the image is in the hole.
        unsafe { vm.set_user_memory_region(slot) }.map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
    }
    vm.set_tss_address(TSS_ADDRESS).map_err(ioctl("KVM_SET_TSS_ADDR"))?;
    // The local APICs are KVM's. There is no I/O APIC, PIC or PIT: every interrupt of ours is a message, and Linux needs none of them.
    let local_apics = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    vm.enable_cap(&local_apics).map_err(ioctl("KVM_ENABLE_CAP of KVM_CAP_SPLIT_IRQCHIP"))?;
    Ok(Arc::new(vm))
}

/// An access to a register that is not allowed is a fault for the guest; no exit to us was asked for.
fn filter_msrs(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let windows = msrs::windows();
    let ranges = windows.each_ref().map(|window| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: window.base,
        msr_count: msrs::WINDOW_LEN,
        bitmap: &window.allowed,
    });
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
}

/// A second handle of a vCPU.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn second_handle(vm: &VmFd, vcpu: &VcpuFd) -> Result<VcpuFd, KvmError> {
    let refused = |source| KvmError::Ioctl { ioctl: "taking a second handle of a vCPU", source };
    // SAFETY: the descriptor is borrowed for the call, and the vCPU keeps it open for longer.
    let borrowed = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    let handle = rustix::io::fcntl_dupfd_cloexec(borrowed, 0)
        .map_err(|error| refused(kvm_ioctls::Error::new(error.raw_os_error())))?;
    // SAFETY: the descriptor is a vCPU's of this VM, made above and given up here.
    unsafe { vm.create_vcpu_from_rawfd(handle.into_raw_fd()) }.map_err(refused)
}

/// What KVM can show a guest.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| KvmError::Ioctl { ioctl: "KVM_GET_SUPPORTED_CPUID", source })
}

/// Tells a vCPU what it shows of itself.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn set_cpuid(vcpu: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let refused = |source| KvmError::Ioctl { ioctl: "KVM_SET_CPUID2", source };
    let table = CpuId::from_entries(entries)
        .map_err(|_| refused(kvm_ioctls::Error::new(rustix::io::Errno::TOOBIG.raw_os_error())))?;
    vcpu.set_cpuid2(&table).map_err(refused)
}

/// What KVM says of an exit that it calls an internal error (KVM API, 5, `KVM_EXIT_INTERNAL_ERROR`).
#[must_use]
pub fn describe_internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return format!("exit reason {}", run.exit_reason);
    }
    // SAFETY: the exit reason says that this is the union's valid member, which is made of integers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or_default().min(internal.data.len());
    let data = &internal.data[..count];
    match (internal.suberror, data) {
        (KVM_INTERNAL_ERROR_EMULATION, []) => "the guest executed what KVM cannot emulate".to_owned(),
        (KVM_INTERNAL_ERROR_EMULATION, data) => {
            // Flags, then the length of the instruction in one byte and the bytes themselves.
            let bytes: Vec<u8> = data.iter().skip(1).flat_map(|word| word.to_le_bytes()).collect();
            let (len, code) = bytes.split_first().unwrap_or((&0, &[]));
            let code = &code[..code.len().min((*len).into())];
            format!("the guest executed what KVM cannot emulate, instruction bytes {code:02x?}")
        }
        (suberror, data) => format!("KVM internal error {suberror}, data {data:#x?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{NEEDED, check_capabilities};

    #[test]
    fn each_missing_capability_is_named() {
        assert!(check_capabilities(|_| true).is_ok());
        let messages: Vec<String> = NEEDED
            .into_iter()
            .map(|missing| check_capabilities(|capability| capability as u32 != missing as u32))
            .map(|refused| refused.expect_err("missing").to_string())
            .collect();
        let named =
            NEEDED.into_iter().zip(&messages).all(|(missing, message)| message.contains(&format!("{missing:?}")));
        assert!(named, "{messages:?}");
    }
}
