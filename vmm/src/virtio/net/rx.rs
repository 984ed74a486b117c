//! The receive queue: frames of the host go into the guest's buffers, each into as many chains as it needs
//! (VIRTIO 1.2, 5.1.6.4).

use std::sync::atomic::Ordering;

use virtio_queue::{Error, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use super::MAX_CHAIN_LEN;
use super::backend::MAX_FRAME_LEN;
use super::header::NUM_BUFFERS;
use super::used::Used;
use crate::virtio::{ActiveQueue, GuestMemory};

/// What became of a frame.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Delivery {
    /// The guest has it.
    Delivered,
    /// The guest has not offered enough buffers yet.
    NoBuffers,
    /// No buffers that the guest offers could hold it.
    Dropped,
}

/// The queue and the frame that goes into it next.
pub(super) struct Rx {
    pub(super) active: ActiveQueue,
    used: Used,
    mergeable: bool,
    /// The frame, `frame_len` bytes of it; 0 when there is none.
    frame: Box<[u8]>,
    frame_len: usize,
    // Lists of one frame, kept for their memory.
    chains: Vec<(u16, u32)>,
    spans: Vec<(GuestAddress, u32)>,
}

impl Rx {
    pub(super) fn new(active: ActiveQueue, mergeable: bool) -> Self {
        let frame = vec![0; MAX_FRAME_LEN].into_boxed_slice();
        Self { active, used: Used::default(), mergeable, frame, frame_len: 0, chains: Vec::new(), spans: Vec::new() }
    }

    /// Whether a frame waits for buffers.
    pub(super) fn has_frame(&self) -> bool {
        self.frame_len > 0
    }

    /// Where the next frame is read to; [`Self::set_frame`] says how long it is.
    pub(super) fn frame_buffer(&mut self) -> &mut [u8] {
        &mut self.frame
    }

    pub(super) fn set_frame(&mut self, len: usize) {
        self.frame_len = len;
    }

    pub(super) fn frame_len(&self) -> usize {
        self.frame_len
    }

    /// Gives the frame to the guest.
    pub(super) fn deliver(&mut self, memory: &GuestMemory) -> Result<Delivery, Error> {
        let before = self.active.queue.next_avail();
        let fits = self.take_chains(memory);
        if !fits {
            let all_taken = self.chains.len() >= usize::from(self.active.queue.size());
            if !all_taken && (self.mergeable || self.chains.is_empty()) {
                self.active.queue.set_next_avail(before);
                return Ok(Delivery::NoBuffers);
            }
            self.chains.iter_mut().for_each(|(_, written)| *written = 0);
        }
        let delivered = fits && self.write_frame(memory);
        if !delivered {
            self.chains.iter_mut().for_each(|(_, written)| *written = 0);
        }
        self.frame_len = 0;
        self.used.put(&mut self.active.queue, memory, &self.chains)?;
        Ok(if delivered { Delivery::Delivered } else { Delivery::Dropped })
    }

    /// Takes as many chains as the frame needs; false when they do not hold it.
    fn take_chains(&mut self, memory: &GuestMemory) -> bool {
        self.chains.clear();
        self.spans.clear();
        let mut left = self.frame_len;
        let most = if self.mergeable { usize::from(self.active.queue.size()) } else { 1 };
        while left > 0 && self.chains.len() < most {
            let Some(chain) = self.active.queue.pop_descriptor_chain(memory) else { return false };
            let (head, mut written) = (chain.head_index(), 0);
            for buffer in chain.writable().take(MAX_CHAIN_LEN) {
                let len = buffer.len().min(u32::try_from(left).unwrap_or(u32::MAX));
                self.spans.push((buffer.addr(), len));
                written += len;
                left -= len as usize;
                if left == 0 {
                    break;
                }
            }
            self.chains.push((head, written));
        }
        left == 0
    }

    fn write_frame(&mut self, memory: &GuestMemory) -> bool {
        let count = if self.mergeable { self.chains.len() } else { 1 };
        let count = u16::try_from(count).expect("no more than the queue's size");
        self.frame[NUM_BUFFERS..NUM_BUFFERS + 2].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.frame[..self.frame_len];
        self.spans.iter().all(|(address, len)| {
            let (part, behind) = rest.split_at(*len as usize);
            rest = behind;
            memory.write_slice(part, *address).is_ok()
        })
    }

    /// Has the driver ring when it offers more than it has; true when it has just done so.
    pub(super) fn ask_for_buffers(&mut self, memory: &GuestMemory) -> Result<bool, Error> {
        let queue = &mut self.active.queue;
        let (taken, offered) = (queue.next_avail(), queue.avail_idx(memory, Ordering::Acquire)?);
        // The crate asks for a doorbell behind what it has taken. Chains that were put back lie before that.
        queue.set_next_avail(offered.0);
        let more = queue.enable_notification(memory);
        queue.set_next_avail(taken);
        if matches!(more, Ok(true)) {
            queue.disable_notification(memory)?;
        }
        more
    }

    /// Interrupts the driver when it wants to hear of what it got.
    pub(super) fn notify(&mut self, memory: &GuestMemory) -> Result<(), Error> {
        if self.used.wants_interrupt(&self.active.queue, memory)? {
            // A vector that the guest set to nonsense loses its own interrupts.
            let _ = self.active.interrupt.trigger();
        }
        Ok(())
    }
}
