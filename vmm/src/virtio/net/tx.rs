//! The transmit queue: frames of the guest, checked, go to the host (VIRTIO 1.2, 5.1.6.2).

use std::io;

use virtio_queue::{DescriptorChain, Error, QueueOwnedT as _, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use super::MAX_CHAIN_LEN;
use super::backend::{Backend, Frame, MAX_FRAME_LEN};
use super::header::{self, HEADER_LEN, Segmented};
use super::spoof::SpoofGuard;
use super::used::Used;
use crate::virtio::{ActiveQueue, GuestMemory};

/// Ethernet header, with one VLAN tag at most.
const ETHERNET_HEADER_LEN: usize = 14;
const MAX_ETHERNET_HEADER_LEN: usize = 18;
/// Bytes that are copied before anything looks at them: the headers of all layers, and most small frames.
const HEAD_LEN: usize = HEADER_LEN + 116;

/// What became of a frame.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Sending {
    /// The host has it: its length without the header.
    Sent(usize),
    /// The host does not take it now; it is still in the queue.
    Blocked,
    /// The host refused it.
    Dropped,
    /// It breaks the standard.
    Malformed,
    /// It is not from the guest's addresses.
    Spoofed,
    /// The link is down.
    NoLink,
    /// Nothing to send.
    Empty,
}

/// The queue and the rules for what comes from it.
pub(super) struct Tx {
    pub(super) active: ActiveQueue,
    used: Used,
    pub(super) features: u64,
    pub(super) mtu: u16,
    pub(super) guard: Option<SpoofGuard>,
    // Of one frame, kept for their memory.
    head: Vec<u8>,
    rest: Vec<(GuestAddress, u32)>,
}

impl Tx {
    pub(super) fn new(active: ActiveQueue, features: u64, mtu: u16, guard: Option<SpoofGuard>) -> Self {
        let (head, rest) = (Vec::with_capacity(HEAD_LEN), Vec::new());
        Self { active, used: Used::default(), features, mtu, guard, head, rest }
    }

    /// Sends the next frame.
    ///
    /// # Errors
    /// When the driver broke its rings, or the other side is gone.
    pub(super) fn send_next(
        &mut self,
        memory: &GuestMemory,
        backend: &mut dyn Backend,
        link_up: bool,
    ) -> Result<Sending, TxError> {
        let Some(chain) = self.active.queue.pop_descriptor_chain(memory) else { return Ok(Sending::Empty) };
        let head = chain.head_index();
        let sending = if link_up { self.send(chain, memory, backend)? } else { Sending::NoLink };
        if sending == Sending::Blocked {
            self.active.queue.go_to_previous_position();
        } else {
            self.used.put(&mut self.active.queue, memory, &[(head, 0)]).map_err(TxError::Ring)?;
        }
        Ok(sending)
    }

    fn send(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
        backend: &mut dyn Backend,
    ) -> Result<Sending, TxError> {
        let Some(frame_len) = self.take_frame(chain, memory) else { return Ok(Sending::Malformed) };
        let Some((header_bytes, beginning)) = self.head.split_first_chunk_mut::<HEADER_LEN>() else {
            return Ok(Sending::Malformed);
        };
        let longest = usize::from(self.mtu) + MAX_ETHERNET_HEADER_LEN;
        match header::check(header_bytes, frame_len, self.features) {
            Ok(Segmented(true)) => {}
            Ok(Segmented(false)) if frame_len <= longest => {}
            _ => return Ok(Sending::Malformed),
        }
        if self.guard.as_ref().is_some_and(|guard| !guard.allows(beginning)) {
            return Ok(Sending::Spoofed);
        }
        match backend.send(&Frame { head: &self.head, rest: &self.rest, memory }) {
            Ok(()) => Ok(Sending::Sent(frame_len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Sending::Blocked),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(Sending::Dropped),
            Err(error) => Err(TxError::Backend(error)),
        }
    }

    /// Copies the beginning and lists the rest; the length of the frame without the header, if it is one.
    fn take_frame(&mut self, chain: DescriptorChain<&GuestMemory>, memory: &GuestMemory) -> Option<usize> {
        self.head.clear();
        self.rest.clear();
        let mut total = 0;
        for (position, buffer) in chain.enumerate() {
            if position >= MAX_CHAIN_LEN || buffer.is_write_only() {
                return None;
            }
            total += buffer.len() as usize;
            if total > MAX_FRAME_LEN {
                return None;
            }
            let at = self.head.len();
            let copied = (HEAD_LEN - at).min(buffer.len() as usize);
            self.head.resize(at + copied, 0);
            memory.read_slice(&mut self.head[at..], buffer.addr()).ok()?;
            let left = buffer.len() - u32::try_from(copied).ok()?;
            if left > 0 {
                let address = buffer.addr().0.checked_add(copied as u64)?;
                self.rest.push((GuestAddress(address), left));
            }
        }
        total.checked_sub(HEADER_LEN).filter(|len| *len >= ETHERNET_HEADER_LEN)
    }

    /// Interrupts the driver when it wants to hear of what was sent.
    pub(super) fn notify(&mut self, memory: &GuestMemory) -> Result<(), Error> {
        if self.used.wants_interrupt(&self.active.queue, memory)? {
            // A vector that the guest set to nonsense loses its own interrupts.
            let _ = self.active.interrupt.trigger();
        }
        Ok(())
    }
}

/// Why sending cannot go on.
#[derive(Debug)]
pub(super) enum TxError {
    /// The driver broke its rings.
    Ring(Error),
    /// The other side is gone.
    Backend(io::Error),
}
