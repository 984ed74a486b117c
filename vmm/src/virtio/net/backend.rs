//! What carries the frames of one queue pair on the host: a queue of a TAP interface, or a stream socket.

use std::io;
use std::os::fd::BorrowedFd;

use vm_memory::GuestAddress;

use super::header::HEADER_LEN;
use crate::virtio::GuestMemory;

/// Longest frame with its header: a full IP packet behind an Ethernet header with one VLAN tag.
pub(super) const MAX_FRAME_LEN: usize = HEADER_LEN + 18 + 65_535;

/// Carries frames; its descriptor is non-blocking.
pub(super) trait Backend: Send {
    /// What to watch.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Header features that the other side can work with (VIRTIO 1.2, 5.1.3).
    fn features(&self) -> u64;

    /// The driver has accepted these features.
    fn set_features(&self, features: u64) -> io::Result<()>;

    /// Lets the other side use this queue, or not.
    fn set_attached(&self, attached: bool) -> io::Result<()>;

    /// Reads one frame with its header, of at most [`MAX_FRAME_LEN`] bytes; returns its length.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; everything else means that the other side is gone.
    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize>;

    /// Sends one frame.
    ///
    /// # Errors
    /// `WouldBlock` when it has to be sent again later; `InvalidInput` when the host refuses this one; everything else means
    /// that the other side is gone.
    fn send(&mut self, frame: &Frame<'_>) -> io::Result<()>;

    /// Sends on what was kept of earlier frames.
    ///
    /// # Errors
    /// As [`Self::send`].
    fn flush(&mut self) -> io::Result<()>;

    /// Whether it keeps a part of an earlier frame, to be flushed when the host takes it.
    fn is_behind(&self) -> bool;
}

/// A frame of the guest.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    /// The checked header and the beginning of the frame, which the guest cannot change any more.
    pub(super) head: &'a [u8],
    /// Where the rest is, in guest RAM.
    pub(super) rest: &'a [(GuestAddress, u32)],
    /// Guest RAM.
    pub(super) memory: &'a GuestMemory,
}

impl Frame<'_> {
    /// Length with the header.
    pub(super) fn len(&self) -> usize {
        self.head.len() + self.rest.iter().map(|(_, len)| *len as usize).sum::<usize>()
    }
}
