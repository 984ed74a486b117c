//! Takes ownership of the descriptors that the parent handed over by number.
#![expect(unsafe_code, reason = "a descriptor number becomes an owned descriptor")]

use std::collections::HashSet;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};

use rustix::io::{FdFlags, fcntl_setfd};
use vmm_api::{Fd, VmConfig};

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

/// Closes every descriptor but the standard streams and those of `config`: what the parent has not handed over by name is not
/// for us.
///
/// # Errors
/// What close_range(2) says.
pub fn close_others(config: &VmConfig) -> io::Result<()> {
    let mut kept: Vec<i32> = config.fds().into_iter().map(|fd| fd.0).filter(|fd| *fd > 2).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        close_range(first, fd - 1)?;
        first = fd + 1;
    }
    close_range(first, i32::MAX)
}

fn close_range(first: i32, last: i32) -> io::Result<()> {
    let (Ok(first), Ok(last)) = (u32::try_from(first), u32::try_from(last)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if first > last {
        return Ok(());
    }
    // SAFETY: nobody owns these descriptors: the process has opened none yet but those of its configuration.
    let closed = unsafe { libc::close_range(first, last, 0) };
    if closed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
