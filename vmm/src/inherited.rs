//! Takes ownership of the descriptors that the parent handed over by number.
#![expect(unsafe_code, reason = "a descriptor number becomes an owned descriptor")]

use std::collections::HashSet;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};

use rustix::io::{FdFlags, fcntl_setfd};
use vmm_api::Fd;

/// Numbers that have been taken.
#[derive(Debug, Default)]
pub struct InheritedFds(HashSet<i32>);

impl InheritedFds {
    /// Takes the descriptor `fd` and marks it close-on-exec.
    ///
    /// # Errors
    /// `InvalidInput` for standard streams and for a number taken before; `EBADF` when it is not open.
    pub fn take(&mut self, fd: Fd) -> io::Result<OwnedFd> {
        if fd.0 <= 2 || !self.0.insert(fd.0) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the number is 3 or more, so not a standard stream, and was not taken before; the process opens no
        // descriptor before it has taken the inherited ones, so nobody else owns it. If it is not open, the next call fails
        // and the forgotten number is never used.
        let owned = unsafe { OwnedFd::from_raw_fd(fd.0) };
        if let Err(error) = fcntl_setfd(&owned, FdFlags::CLOEXEC) {
            std::mem::forget(owned);
            return Err(error.into());
        }
        Ok(owned)
    }
}
