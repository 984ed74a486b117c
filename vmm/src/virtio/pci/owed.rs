//! A device that knows what its transport owes it, for tests and fuzzing.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use virtio_queue::QueueT as _;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::msix::MessageTarget;
use super::transport::{Host, Transport};
use crate::arch::layout::PCI_WINDOW_START;
use crate::virtio::fuzz::DEVICE_THREAD;
use crate::virtio::{ActivateError, Activation, GuestMemory, VirtioDevice};

const VIRTIO_F_VERSION_1: u64 = 1 << 32;

struct Owed {
    active: bool,
    told: Sender<&'static str>,
}

/// A transport with the device, and what is done with that.
pub(super) fn transport(memory: Arc<GuestMemory>) -> (Transport, Receiver<&'static str>) {
    let (told, heard) = mpsc::channel();
    let (messages, _) = mpsc::channel();
    let kicks = (0..2).map(|_| EventFd::new(EFD_NONBLOCK).expect("an eventfd")).collect();
    let host = Host { messages: MessageTarget::Test(messages), memory, device_thread: DEVICE_THREAD.clone() };
    (Transport::new(Box::new(Owed { active: false, told }), kicks, PCI_WINDOW_START, host), heard)
}

impl VirtioDevice for Owed {
    fn device_id(&self) -> u16 {
        26
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn features(&self) -> u64 {
        1
    }
    fn config(&self) -> Cow<'_, [u8]> {
        b"config".as_slice().into()
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(!std::mem::replace(&mut self.active, true), "activated once between two resets");
        assert!(activation.features & VIRTIO_F_VERSION_1 != 0, "version 1 was agreed on");
        assert_eq!(activation.queues.len(), 2);
        let queues = activation.queues.iter().map(|active| &active.queue);
        assert!(queues.filter(|queue| queue.ready()).all(|queue| queue.is_valid(&*activation.memory)));
        let _ = self.told.send("activate");
        Ok(())
    }
    fn reset(&mut self) {
        self.active = false;
        let _ = self.told.send("reset");
    }
}
