//! Ranges of guest RAM as writev(2) and sendmsg(2) take them: the host's kernel copies them, and nobody else does.
#![expect(unsafe_code, reason = "the kernel reads memory that the guest may write at the same time")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use libc::{MSG_DONTWAIT, MSG_NOSIGNAL, iovec, msghdr};
use vm_memory::volatile_memory::PtrGuard;
use vm_memory::{GuestAddress, GuestMemory as _};

use super::GuestMemory;

/// What one call is to take, in order.
#[derive(Default)]
pub(crate) struct Spans<'a> {
    iovecs: Vec<iovec>,
    guards: Vec<PtrGuard>,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> Spans<'a> {
    /// Adds memory of ours.
    pub(crate) fn add_slice(&mut self, bytes: &'a [u8]) {
        self.iovecs.push(iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
    }

    /// Adds `len` bytes of guest RAM.
    ///
    /// # Errors
    /// `InvalidInput` when they do not all lie there.
    pub(crate) fn add(&mut self, memory: &'a GuestMemory, address: GuestAddress, len: u32) -> io::Result<()> {
        for slice in memory.get_slices(address, len as usize) {
            let guard = slice.map_err(|_| io::ErrorKind::InvalidInput)?.ptr_guard();
            self.iovecs.push(iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() });
            self.guards.push(guard);
        }
        Ok(())
    }

    /// Calls writev(2); returns how many bytes it took.
    ///
    /// # Errors
    /// What it says.
    pub(crate) fn write_to(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let count = i32::try_from(self.iovecs.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: each span is a slice that is borrowed or a checked range of guest RAM whose guard is in `guards`; the kernel only reads
        // them, so it does not matter that the guest may write at the same time.
        uninterrupted(|| unsafe { libc::writev(file.as_raw_fd(), self.iovecs.as_ptr(), count) })
    }

    /// Calls sendmsg(2), which neither waits nor sends a signal; returns how many bytes it took.
    ///
    /// # Errors
    /// What it says.
    pub(crate) fn send_to(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: all zeros are a message without address, bytes and descriptors.
        let mut message: msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.iovecs.as_ptr().cast_mut();
        message.msg_iovlen = self.iovecs.len();
        // SAFETY: as above.
        uninterrupted(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, MSG_DONTWAIT | MSG_NOSIGNAL) })
    }
}

/// Calls again what a signal has interrupted.
fn uninterrupted(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read as _};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes as _, GuestAddress};

    use super::Spans;

    #[test]
    fn ranges_go_out_in_their_order_and_none_beyond_ram() {
        let memory = crate::memory::create(1).expect("memory");
        memory.write_slice(b"first second", GuestAddress(0x1000)).expect("in RAM");
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        let mut spans = Spans::default();
        spans.add_slice(b"head ");
        spans.add(&memory, GuestAddress(0x1006), 6).expect("in RAM");
        spans.add(&memory, GuestAddress(0x1000), 5).expect("in RAM");
        assert_eq!(spans.send_to(ours.as_fd()).expect("sent"), 16);
        assert_eq!(spans.write_to(ours.as_fd()).expect("written"), 16);
        let beyond = spans.add(&memory, GuestAddress((1 << 20) - 1), 2);
        assert_eq!(beyond.expect_err("not in RAM").kind(), io::ErrorKind::InvalidInput);
        drop(ours);
        let mut text = String::new();
        theirs.read_to_string(&mut text).expect("text");
        assert_eq!(text, "head secondfirsthead secondfirst");
    }

    #[test]
    fn a_full_socket_takes_what_it_has_room_for_and_then_says_so() {
        let memory = crate::memory::create(8).expect("memory");
        let (ours, _theirs) = UnixStream::pair().expect("a socket pair");
        let mut spans = Spans::default();
        spans.add(&memory, GuestAddress(0), 4 << 20).expect("in RAM");
        let taken = spans.send_to(ours.as_fd()).expect("some");
        assert!((1..4 << 20).contains(&taken), "{taken}");
        assert_eq!(spans.send_to(ours.as_fd()).expect_err("it is full").kind(), io::ErrorKind::WouldBlock);
    }
}
