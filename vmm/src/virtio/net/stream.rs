//! Frames over a stream socket, each behind its length as 4 bytes, big-endian: what QEMU's stream network back end and
//! `passt` speak. Whoever is at the other end sees no header, so nothing is offloaded.
//!
//! What is at the other end may be a process with sockets of the host, so frames for the host's loopback end here: passt of
//! 2023 (Debian 12) connects to 127.0.0.1 for a guest that sends such frames, a kernel behind a TAP interface drops them.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vm_memory::Bytes as _;

use super::backend::{Backend, Frame, MAX_FRAME_LEN};
use super::header::HEADER_LEN;
use super::spoof::{ETHERNET_HEADER_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6};

const LENGTH_LEN: usize = 4;
/// Bytes read at once.
const RECEIVE_LEN: usize = 4 * (LENGTH_LEN + MAX_FRAME_LEN);

/// The socket, with what was read ahead and what could not be written yet.
pub(super) struct Stream {
    socket: UnixStream,
    received: Box<[u8]>,
    // start <= end <= received.len()
    start: usize,
    end: usize,
    unsent: Vec<u8>,
    sent: usize,
}

impl Stream {
    /// Takes a connected socket.
    pub(super) fn open(socket: OwnedFd) -> io::Result<Self> {
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        let received = vec![0; RECEIVE_LEN].into_boxed_slice();
        Ok(Self { socket, received, start: 0, end: 0, unsent: Vec::new(), sent: 0 })
    }

    /// The next frame that was received as a whole: where it lies.
    fn next_frame(&self) -> io::Result<Option<(usize, usize)>> {
        let Some(prefix) = self.received[self.start..self.end].first_chunk::<LENGTH_LEN>() else { return Ok(None) };
        let len = u32::from_be_bytes(*prefix) as usize;
        if len > MAX_FRAME_LEN - HEADER_LEN {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame is too long"));
        }
        let start = self.start + LENGTH_LEN;
        Ok((start + len <= self.end).then_some((start, len)))
    }

    fn read_more(&mut self) -> io::Result<()> {
        self.received.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        match self.socket.read(&mut self.received[self.end..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.end += count;
                Ok(())
            }
        }
    }
}

impl Backend for Stream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn features(&self) -> u64 {
        0
    }

    fn set_features(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        let (start, len) = loop {
            match self.next_frame()? {
                Some(found) => break found,
                None => self.read_more()?,
            }
        };
        frame[..HEADER_LEN].fill(0);
        frame[HEADER_LEN..HEADER_LEN + len].copy_from_slice(&self.received[start..start + len]);
        self.start = start + len;
        Ok(HEADER_LEN + len)
    }

    fn send(&mut self, frame: &Frame<'_>) -> io::Result<()> {
        if is_for_loopback(&frame.head[HEADER_LEN..]) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.flush()?;
        let len = u32::try_from(frame.len() - HEADER_LEN).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.unsent.extend(len.to_be_bytes());
        self.unsent.extend_from_slice(&frame.head[HEADER_LEN..]);
        for (address, len) in frame.rest {
            let at = self.unsent.len();
            self.unsent.resize(at + *len as usize, 0);
            if frame.memory.read_slice(&mut self.unsent[at..], *address).is_err() {
                self.unsent.clear();
                return Err(io::ErrorKind::InvalidInput.into());
            }
        }
        match self.flush() {
            // The rest is kept, and nothing else goes before it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.sent < self.unsent.len() {
            match self.socket.write(&self.unsent[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.unsent.clear();
        self.sent = 0;
        Ok(())
    }

    fn is_behind(&self) -> bool {
        !self.unsent.is_empty()
    }
}

/// Whether a frame, of which `frame` is the beginning, is for the host that receives it whatever the host's addresses are:
/// loopback, and the unspecified address, to which a socket connects as to loopback (RFC 1122, 3.2.1.3; RFC 4291, 2.5).
fn is_for_loopback(frame: &[u8]) -> bool {
    let Some((ethernet, packet)) = frame.split_at_checked(ETHERNET_HEADER_LEN) else { return false };
    let is_local_v4 = |address: Ipv4Addr| address.is_loopback() || address.octets()[0] == 0;
    let v4 = || packet.get(16..20).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map(Ipv4Addr::from);
    let v6 = || packet.get(24..40).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(Ipv6Addr::from);
    match u16::from_be_bytes([ethernet[12], ethernet[13]]) {
        ETHERTYPE_IPV4 => v4().is_some_and(is_local_v4),
        // The compatible and the mapped form of an IPv4 address are the same to a socket.
        ETHERTYPE_IPV6 => v6().is_some_and(|address| address.to_ipv4().is_some_and(is_local_v4)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use vm_memory::GuestAddress;

    use super::*;

    fn pair() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        (Stream::open(ours.into()).expect("a stream"), theirs)
    }

    #[test]
    fn frames_are_cut_out_wherever_the_stream_was_cut() {
        let (mut stream, mut passt) = pair();
        let mut frame = vec![0xff; MAX_FRAME_LEN];
        passt.write_all(&[0, 0, 0, 3, 1, 2, 3, 0, 0]).expect("written");
        assert_eq!(stream.receive(&mut frame).expect("a frame"), HEADER_LEN + 3);
        assert_eq!(frame[..HEADER_LEN + 3], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3]);
        let half = stream.receive(&mut frame).expect_err("half a length");
        assert_eq!(half.kind(), io::ErrorKind::WouldBlock);
        passt.write_all(&[0, 1, 9]).expect("written");
        assert_eq!(stream.receive(&mut frame).expect("a frame"), HEADER_LEN + 1);
        drop(passt);
        let end = stream.receive(&mut frame).expect_err("the end");
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_length_that_no_frame_has_ends_the_stream() {
        let (mut stream, mut passt) = pair();
        passt.write_all(&[0, 1, 0, 200]).expect("written");
        let error = stream.receive(&mut vec![0; MAX_FRAME_LEN]).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    fn frame_to(destination: IpAddr) -> Vec<u8> {
        let (ethertype, packet) = match destination {
            IpAddr::V4(address) => (ETHERTYPE_IPV4, [&[0x45; 16][..], &address.octets()].concat()),
            IpAddr::V6(address) => (ETHERTYPE_IPV6, [&[0x60; 24][..], &address.octets()].concat()),
        };
        [&[2; 12][..], &ethertype.to_be_bytes(), &packet].concat()
    }

    #[test]
    fn frames_for_the_host_s_loopback_are_not_sent() {
        let (mut stream, mut passt) = pair();
        let memory = crate::memory::create(64).expect("memory");
        let mut send = |destination: &str| {
            let head = [vec![0; HEADER_LEN], frame_to(destination.parse().expect("an address"))].concat();
            stream.send(&Frame { head: &head, rest: &[], memory: &memory }).map_err(|error| error.kind())
        };
        for local in ["127.0.0.1", "127.255.0.9", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"] {
            assert_eq!(send(local), Err(io::ErrorKind::InvalidInput), "{local}");
        }
        for other in ["10.0.0.1", "128.0.0.1", "255.255.255.255", "fd00::1", "::ffff:10.0.0.1"] {
            assert_eq!(send(other), Ok(()), "{other}");
        }
        let mut first = [0; LENGTH_LEN + 34];
        passt.read_exact(&mut first).expect("a frame");
        assert_eq!(first[LENGTH_LEN..], frame_to("10.0.0.1".parse().expect("v4")));
    }

    #[test]
    fn a_frame_that_does_not_fit_into_the_socket_is_sent_on_before_the_next() {
        let (mut stream, mut passt) = pair();
        let memory = crate::memory::create(64).expect("memory");
        let rest = [(GuestAddress(0x10_0000), 60_000)];
        let head = [7; HEADER_LEN + 20];
        let frame = Frame { head: &head, rest: &rest, memory: &memory };
        let mut count = 0;
        while stream.send(&frame).is_ok() {
            count += 1;
        }
        assert!(count > 0 && stream.unsent.len() == LENGTH_LEN + 60_020);
        let mut taken = vec![0; count * (LENGTH_LEN + 60_020)];
        let reader = std::thread::spawn(move || passt.read_exact(&mut taken).map(|()| taken));
        while stream.flush().is_err() {
            std::thread::yield_now();
        }
        let taken = reader.join().expect("no panic").expect("every byte");
        let last = &taken[taken.len() - 60_024..];
        assert_eq!(last[..LENGTH_LEN + 1], [0, 0, 0xea, 0x74, 7]);
    }
}
