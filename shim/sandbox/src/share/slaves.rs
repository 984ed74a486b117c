//! A mount namespace in which volumes go on to be slaves of the host's mounts: what the host mounts below them comes there too, and
//! goes when the host unmounts it. Nothing else of the host stays mounted in it.
//!
//! A tree that is attached nowhere is left out of propagation, so this one stays in the namespace that it was made in. Nobody is
//! in that; a descriptor keeps it, and it ends with the last one.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{chdir, pivot_root};

/// The root of the namespace, and the namespace.
pub(super) struct Kept {
    pub(super) root: OwnedFd,
    pub(super) namespace: OwnedFd,
}

/// Makes `tree` the root of this thread's mount namespace, and takes every mount of the host out of it: as copies they would keep
/// file systems busy that the host unmounts. The thread is of no other use then.
pub(super) fn keep(tree: &Path) -> io::Result<Kept> {
    let namespace = File::open("/proc/thread-self/ns/mnt")?.into();
    chdir(tree)?;
    pivot_root(".", ".")?;
    // The old root lies on top of the new one until then.
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    let root = openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(Kept { root, namespace })
}
