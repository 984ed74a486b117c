//! The guest's buffers of one descriptor chain: packets are gathered from readable ones and put into writable ones.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use super::packet::{HEADER_LEN, Header};
use crate::virtio::GuestMemory;
use crate::virtio::spans::Spans;

/// Most descriptors of a chain that are looked at; Linux uses up to 18.
const MAX_BUFFERS: usize = 256;

/// Addresses and lengths, in order.
pub(super) struct Buffers(VecDeque<(GuestAddress, u32)>);

/// What a socket gave.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Payload {
    /// This many bytes, at least one.
    Bytes(u32),
    /// The same, and the socket had no more.
    Last(u32),
    /// Nothing now.
    Nothing,
    /// Nothing more, ever.
    End,
}

impl Buffers {
    /// What the guest has written for us.
    pub(super) fn readable(chain: DescriptorChain<Arc<GuestMemory>>) -> Self {
        Self(chain.readable().take(MAX_BUFFERS).map(|buffer| (buffer.addr(), buffer.len())).collect())
    }

    /// Where we may write.
    pub(super) fn writable(chain: DescriptorChain<Arc<GuestMemory>>) -> Self {
        Self(chain.writable().take(MAX_BUFFERS).map(|buffer| (buffer.addr(), buffer.len())).collect())
    }

    /// Whether there is room for a header in the first buffer and for a byte of payload behind it.
    pub(super) fn hold_a_packet(&self) -> bool {
        let first_len = self.0.front().map_or(0, |(_, len)| *len);
        let total: u64 = self.0.iter().map(|(_, len)| u64::from(*len)).sum();
        first_len >= HEADER_LEN && total > HEADER_LEN.into()
    }

    /// Copies `into.len()` bytes from the front; nothing when the buffers hold less or do not lie in guest RAM.
    pub(super) fn gather(&mut self, memory: &GuestMemory, into: &mut [u8]) -> Option<()> {
        let len = u32::try_from(into.len()).ok()?;
        let mut rest = into;
        for (address, there) in &self.0 {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at_mut(rest.len().min(*there as usize));
            memory.read_slice(now, *address).ok()?;
            rest = later;
        }
        self.skip(len)
    }

    /// Writes up to `len` bytes from the front to the socket; returns how many it took. One whose other end is closed is an error.
    pub(super) fn take_payload(&mut self, memory: &GuestMemory, socket: &UnixStream, len: u32) -> io::Result<u32> {
        let mut spans = Spans::default();
        let mut left = len;
        for (address, there) in &self.0 {
            let most = left.min(*there);
            if most > 0 {
                spans.add(memory, *address, most)?;
                left -= most;
            }
        }
        if left == len {
            return Ok(0);
        }
        let taken = match spans.send_to(socket.as_fd()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            taken => u32::try_from(taken?).unwrap_or(len),
        };
        self.skip(taken).ok_or(io::ErrorKind::InvalidData)?;
        Ok(taken)
    }

    /// Leaves `len` bytes out at the front; nothing when there are fewer.
    fn skip(&mut self, mut len: u32) -> Option<()> {
        while len > 0 {
            let (address, there) = self.0.pop_front()?;
            if there > len {
                self.0.push_front((GuestAddress(address.0.checked_add(len.into())?), there - len));
            }
            len = len.saturating_sub(there);
        }
        Some(())
    }

    /// Writes a header to the front; returns the length written, 0 when the guest gave no place for it.
    pub(super) fn put_header(&self, memory: &GuestMemory, header: &Header) -> u32 {
        let place = self.0.front().filter(|(_, len)| *len >= HEADER_LEN);
        let written = place.is_some_and(|(address, _)| memory.write_slice(&header.encode(), *address).is_ok());
        if written { HEADER_LEN } else { 0 }
    }

    /// Reads at most `room` bytes from the socket behind the place of the header.
    pub(super) fn put_payload(&self, memory: &GuestMemory, socket: &mut UnixStream, room: u32) -> io::Result<Payload> {
        let mut left = room;
        let mut total = 0;
        let mut drained = false;
        for (index, (address, len)) in self.0.iter().enumerate() {
            let skip = if index == 0 { HEADER_LEN } else { 0 };
            let want = len.saturating_sub(skip).min(left);
            let Some(at) = address.0.checked_add(skip.into()).filter(|_| want > 0) else { continue };
            match memory.read_volatile_from(GuestAddress(at), socket, want as usize) {
                Ok(0) if total == 0 => return Ok(Payload::End),
                Ok(count) => {
                    let count = u32::try_from(count).unwrap_or(want);
                    total += count;
                    left -= count;
                    drained = count < want;
                }
                Err(GuestMemoryError::IOError(error)) if error.kind() == io::ErrorKind::WouldBlock => drained = true,
                // What was read before is lost with the connection.
                Err(GuestMemoryError::IOError(error)) => return Err(error),
                Err(error) => return Err(io::Error::other(error)),
            }
            if drained {
                break;
            }
        }
        Ok(match total {
            0 => Payload::Nothing,
            total if drained => Payload::Last(total),
            total => Payload::Bytes(total),
        })
    }
}
