//! The doorbells of one device: an eventfd for each queue, which KVM signals when the guest writes to the queue's address.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::PciError;
use super::transport::doorbell_offset;

/// Watched from `create` to the drop.
pub(super) struct Doorbells {
    vm: Arc<VmFd>,
    kicks: Vec<EventFd>,
    window: u64,
    // KVM watches the first `watched` doorbells of the window.
    watched: usize,
}

impl Doorbells {
    /// Makes `count` doorbells in the window at `window`.
    pub(super) fn create(vm: Arc<VmFd>, count: usize, window: u64) -> Result<Self, PciError> {
        let mut doorbells = Self { vm, kicks: Vec::new(), window, watched: 0 };
        for _ in 0..count {
            doorbells.kicks.push(EventFd::new(EFD_NONBLOCK).map_err(PciError::EventFd)?);
        }
        doorbells.watch().map_err(PciError::IoEventFd)?;
        Ok(doorbells)
    }

    /// The eventfds, in the order of the queues.
    pub(super) fn kicks(&self) -> Result<Vec<EventFd>, PciError> {
        self.kicks.iter().map(|kick| kick.try_clone().map_err(PciError::EventFd)).collect()
    }

    /// The guest has moved the window. When KVM refuses the new place, the doorbells arrive as accesses to the window.
    pub(super) fn follow(&mut self, window: u64) {
        self.unwatch();
        self.window = window;
        if let Err(error) = self.watch() {
            tracing::debug!(window, %error, "doorbells are not watched by KVM");
        }
    }

    fn watch(&mut self) -> Result<(), kvm_ioctls::Error> {
        for (index, kick) in self.kicks.iter().enumerate() {
            self.vm.register_ioevent(kick, &address(self.window, index), NoDatamatch)?;
            self.watched = index + 1;
        }
        Ok(())
    }

    fn unwatch(&mut self) {
        for (index, kick) in self.kicks.iter().enumerate().take(self.watched) {
            // It was registered with the same address, so KVM knows it.
            let _ = self.vm.unregister_ioevent(kick, &address(self.window, index), NoDatamatch);
        }
        self.watched = 0;
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        self.unwatch();
    }
}

fn address(window: u64, queue_index: usize) -> IoEventAddress {
    IoEventAddress::Mmio(window + doorbell_offset(queue_index))
}
