//! The child that unpacks one layer: `vmrun unpack-layer`, started by [`super::layers`] with the layer on its standard input.
//!
//! It reads bytes that an attacker chose with decompressors and an archive reader, so first it gives up what it does not
//! need. Kept, and why:
//!
//! | kept | because |
//! |---|---|
//! | the target, as the root of its own mount namespace; nothing else is mounted, its devices cannot be opened | it is unpacked there |
//! | three pipes | the layer in; the result and the error out |
//! | user 0 of the host, CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID | files of every owner and mode, in directories of every owner |
//! | CAP_MKNOD | device nodes and whiteouts |
//! | CAP_SETFCAP | `security.capability` |
//!
//! A user namespace of its own is not possible: in one, mknod(2) is refused and capabilities of files are stored differently.
//! The mark of an opaque directory needs CAP_SYS_ADMIN: the parent sets it.

use std::io::{self, Read, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::digest::{Digest, HashingReader};
use super::entries;
use anyhow::{Context as _, Result, bail};
use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount_bind, mount_change, mount_remount, unmount,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Most memory of the child, in bytes: names and extended headers are read whole, and zstd's window may be 128 MiB.
const MAX_MEMORY: u64 = 1 << 30;
/// Most descriptors: one for each level of a directory that is replaced, and a few.
const MAX_DESCRIPTORS: u64 = 512;

/// Unpacks standard input into `target`; reports on standard output as [`super::layers`] reads it: the diff id, then
/// each opaque directory, with a NUL before each.
pub(crate) fn unpack_child(compression: &str, target: &Path) -> Result<u8> {
    confine(target).context("cannot confine the process that unpacks")?;
    match unpack(compression) {
        Err(error) if is_full(&error) => {
            bail!("{error:#}: free some space below the data root, or name another one with --data-root")
        }
        unpacked => unpacked,
    }
}

fn unpack(compression: &str) -> Result<u8> {
    let input = io::stdin().lock();
    let root = openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let (diff_id, opaque) = match compression {
        "none" => unpack_stream(input, root)?,
        "gzip" => {
            unpack_stream(flate2::bufread::MultiGzDecoder::new(io::BufReader::with_capacity(64 << 10, input)), root)?
        }
        "zstd" => unpack_stream(zstd::Decoder::new(input)?, root)?,
        other => bail!("unknown compression {other:?}"),
    };
    let mut report = diff_id.to_string().into_bytes();
    for path in opaque {
        report.push(0);
        report.extend_from_slice(path.as_os_str().as_bytes());
    }
    io::stdout().write_all(&report)?;
    Ok(0)
}

fn unpack_stream(input: impl Read, root: std::os::fd::OwnedFd) -> Result<(Digest, Vec<PathBuf>)> {
    let mut input = HashingReader::new(input.take(entries::MAX_BYTES));
    let opaque = entries::unpack(&mut input, root)?;
    // The digest is that of the whole stream, with what follows the last entry.
    io::copy(&mut input, &mut io::sink()).context("the archive is damaged")?;
    if input.len() == entries::MAX_BYTES {
        bail!("the archive is larger than {} bytes", entries::MAX_BYTES);
    }
    Ok((input.finish().0, opaque))
}

fn is_full(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| match (cause.downcast_ref::<io::Error>(), cause.downcast_ref::<Errno>()) {
        (Some(cause), _) => matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded),
        (None, cause) => matches!(cause, Some(&(Errno::NOSPC | Errno::DQUOT))),
    })
}

/// Leaves this process with `target` as its root and with what the table above says.
fn confine(target: &Path) -> Result<()> {
    nix::sched::unshare(
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS,
    )?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    mount_bind(target, target)?;
    let flags = MountFlags::BIND | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_remount(target, flags, "")?;
    std::env::set_current_dir(target)?;
    // pivot_root(2), NOTES: the old root is stacked on the new one, and detached.
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")?;
    rustix::process::umask(Mode::empty());
    for (resource, most) in [(Resource::As, MAX_MEMORY), (Resource::Nofile, MAX_DESCRIPTORS), (Resource::Core, 0)] {
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    }
    rustix::thread::set_no_new_privs(true)?;
    let kept = CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::MKNOD
        | CapabilitySet::SETFCAP;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}
