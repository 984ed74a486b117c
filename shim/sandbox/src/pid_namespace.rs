//! A pid namespace for one child: it finds no process but its own, and can signal none.
#![expect(unsafe_code, reason = "rustix calls unshare(2) unsafe for the sake of flags that are not used here")]

use std::io;
use std::os::fd::AsFd as _;

use rustix::fs::{CWD, Mode, OFlags, openat, readlink};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

const OURS: &str = "/proc/thread-self/ns/pid";
const OF_CHILDREN: &str = "/proc/thread-self/ns/pid_for_children";

/// Calls `spawn`, whose child is the first process of a new pid namespace. Until it returns, this thread can start no thread.
pub(crate) fn of_child<T>(spawn: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let ours = openat(CWD, OURS, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: descriptors, which other code counts on, stay shared; the namespace is one for children only.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
    let spawned = spawn().and_then(|child| {
        // The namespace has no name before its first process.
        let separate = readlink(OF_CHILDREN, Vec::new())? != readlink(OURS, Vec::new())?;
        if separate { Ok(child) } else { Err(io::Error::other("the child is in our pid namespace")) }
    });
    // A thread that stayed would put every later child into a namespace whose first process has ended.
    move_into_link_name_space(ours.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
    spawned
}
