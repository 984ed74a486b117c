//! Writes that KVM gathers in a ring instead of leaving the guest for each (`KVM_CAP_COALESCED_PIO`, Linux 4.20). Only for
//! registers whose writes do nothing until another register is accessed: the vCPU that does so takes them out first.
//!
//! Lock order: the ring's lock is held while a device takes its writes, so it comes before every lock of a device.

use std::sync::Mutex;

use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};

use crate::event_loop::lock;
use crate::kvm::{self, KvmError};

/// The ring of a VM.
pub struct GatheredWrites {
    /// Any vCPU's descriptor: all show the same ring. None when this KVM does not gather.
    ring: Option<Mutex<VcpuFd>>,
}

/// A ring is one page of entries of 24 bytes. A guest with several vCPUs could fill it while it is emptied.
const MAX_ENTRIES: usize = 4096 / 24;

impl GatheredWrites {
    /// Has KVM gather writes to `ranges`, each an address and a length.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn create(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd, ranges: &[(IoEventAddress, u32)]) -> Result<Self, KvmError> {
        if !kvm.check_extension(Cap::CoalescedPio) {
            return Ok(Self { ring: None });
        }
        let refused = |source| KvmError::Ioctl { ioctl: "KVM_REGISTER_COALESCED_MMIO", source };
        let mut ring = kvm::second_handle(vm, vcpu)?;
        ring.map_coalesced_mmio_ring().map_err(refused)?;
        for (address, len) in ranges {
            vm.register_coalesced_mmio(*address, *len).map_err(refused)?;
        }
        Ok(Self { ring: Some(Mutex::new(ring)) })
    }

    /// Takes out what was written, in order.
    pub fn take(&self, mut write: impl FnMut(u64, &[u8])) {
        let Some(ring) = &self.ring else { return };
        let mut ring = lock(ring);
        for _ in 0..MAX_ENTRIES {
            let Ok(Some(entry)) = ring.coalesced_mmio_read() else { return };
            let len = usize::try_from(entry.len).unwrap_or(usize::MAX).min(entry.data.len());
            write(entry.phys_addr, &entry.data[..len]);
        }
    }
}
