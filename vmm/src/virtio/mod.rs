//! What a virtio device is to the rest of the VMM. A device never sees its transport: it gets its queues when the driver is
//! ready and gives them up on reset.

use std::borrow::Cow;
use std::sync::Arc;

use thiserror::Error;
use virtio_queue::{DescriptorChain, QueueT as _};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

pub mod balloon;
#[cfg(any(test, fuzzing))]
pub(crate) mod driver;
pub mod fs;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod net;
pub mod pci;
pub mod rng;
pub(crate) mod spans;
pub mod vsock;

use crate::device_thread::DeviceThread;
pub use pci::{Interrupt, Irqfd};

/// Guest RAM as devices see it.
pub type GuestMemory = GuestMemoryMmap;

/// What a queue's doorbell is watched for. Each ring is told once, so that nobody has to read the counter: one system call fewer for each.
pub(crate) const RING: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

/// Vectors of a device whose queues share one: of two interrupts that the guest has not taken yet, it takes one.
pub(crate) const SHARED_VECTORS: usize = 2;

/// A device of VIRTIO 1.2, section 5.
pub trait VirtioDevice: Send {
    /// Device type (VIRTIO 1.2, 5).
    fn device_id(&self) -> u16;
    /// Largest size of each queue, a power of two; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// How many vectors of MSI-X it has: one for the configuration, and one for each queue or for all of them.
    fn vectors(&self) -> usize {
        self.queue_sizes().len() + 1
    }
    /// Feature bits of the device type; the transport adds its own.
    fn features(&self) -> u64;
    /// Device configuration space, read-only for the driver.
    fn config(&self) -> Cow<'_, [u8]>;
    /// The driver is ready. Called once between two resets, on the thread of devices.
    ///
    /// # Errors
    /// Why the device cannot work with these queues; the driver then sees `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Stops all work on the queues, on the thread of devices; the device does not touch guest memory after this returned.
    fn reset(&mut self);
}

/// What a device works with from `activate` to `reset`.
pub struct Activation {
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// Feature bits that both sides agreed on, the transport's included.
    pub features: u64,
    /// One for each of `queue_sizes`, in that order. A queue that the driver did not enable is not `ready`.
    pub queues: Vec<ActiveQueue>,
    /// Tells the driver that the configuration space has changed.
    pub config_changed: Interrupt,
    /// Where this happens, and what starts other threads.
    pub device_thread: DeviceThread,
}

/// A queue with its doorbell and its interrupt.
pub struct ActiveQueue {
    /// Its rings, checked to lie in guest RAM.
    pub queue: virtio_queue::Queue,
    /// Signalled when the driver notifies the queue; non-blocking.
    pub kick: EventFd,
    /// Tells the driver that buffers were used.
    pub interrupt: Interrupt,
}

impl ActiveQueue {
    /// Gives back what the driver has offered, at most a ring of it, and interrupts once. `answer` serves a chain and returns how many bytes it
    /// wrote. A driver that broke its rings gets nothing.
    pub(crate) fn serve<'a>(
        &mut self,
        memory: &'a GuestMemory,
        mut answer: impl FnMut(DescriptorChain<&'a GuestMemory>) -> u32,
    ) {
        let mut used_any = false;
        for _ in 0..=self.queue.size() {
            let Some(chain) = self.queue.pop_descriptor_chain(memory) else {
                match self.queue.enable_notification(memory) {
                    Ok(true) => continue,
                    _ => break,
                }
            };
            let head = chain.head_index();
            let written = answer(chain);
            if self.queue.add_used(memory, head, written).is_err() {
                return;
            }
            used_any = true;
        }
        if used_any && self.queue.needs_notification(memory).unwrap_or(true) {
            // A vector that the guest set to nonsense loses its own interrupts.
            let _ = self.interrupt.trigger();
        }
    }
}

/// Why a device cannot start.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver enabled fewer queues than the device needs.
    #[error("queue {index} is not enabled")]
    QueueMissing {
        /// Which.
        index: usize,
    },
    /// The host refused something.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: std::io::Error,
    },
}
