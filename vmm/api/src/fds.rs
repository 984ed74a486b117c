//! Passing file descriptors over Unix sockets (`SCM_RIGHTS`, unix(7)).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Most descriptors in one message: the queue pairs of a network interface.
pub const MAX_FDS: usize = 16;

/// Sends `payload` (at least one byte) together with `fds`.
///
/// # Errors
/// What sendmsg(2) says; `InvalidInput` for an empty payload or more than [`MAX_FDS`] descriptors.
pub fn send(socket: BorrowedFd<'_>, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if payload.is_empty() || fds.len() > MAX_FDS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let sent = sendmsg(socket, &[IoSlice::new(payload)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent < payload.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}

/// Receives one message into `payload`; returns its length (0 at end of stream) and the descriptors that came with it,
/// close-on-exec.
///
/// # Errors
/// What recvmsg(2) says; `InvalidData` when control data was cut off.
pub fn recv(socket: BorrowedFd<'_>, payload: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(socket, &mut [IoSliceMut::new(payload)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for item in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = item {
            fds.extend(rights);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::{recv, send};

    #[test]
    fn a_descriptor_arrives_with_its_payload() {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let (mut kept, passed) = UnixStream::pair().expect("socket pair");
        send(ours.as_fd(), b"port", &[passed.as_fd()]).expect("send");
        drop(passed);
        let mut payload = [0; 8];
        let (len, mut fds) = recv(theirs.as_fd(), &mut payload).expect("receive");
        assert_eq!(&payload[..len], b"port");
        let mut received = UnixStream::from(fds.pop().expect("one descriptor"));
        received.write_all(b"hello").expect("write");
        drop(received);
        let mut text = String::new();
        kept.read_to_string(&mut text).expect("read");
        assert_eq!(text, "hello");
    }

    #[test]
    fn end_of_stream_is_length_zero() {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        drop(ours);
        let (len, fds) = recv(theirs.as_fd(), &mut [0; 4]).expect("receive");
        assert_eq!((len, fds.len()), (0, 0));
    }
}
