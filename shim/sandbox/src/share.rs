//! Shared directories as detached mounts: trees that no mount table shows and that vanish with their last descriptor, so a
//! killed process leaves none behind.
//!
//! Each tree is put together by a thread of its own in a private mount namespace, then cloned with open_tree(2). Read-only
//! is a flag of the mount: nothing that a guest sends, and no fault of the VMM, can write through it.
//!
//! Volumes that later mounts of the host come to are the exception: their tree stays in its namespace (`share/slaves.rs`), and a
//! mount that comes later is read-only because the VMM refuses to write, not by a flag of its own.

mod mount_table;
mod mounts;
mod slaves;

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::thread;

use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, mount, mount_bind_recursive, mount_change, mount_remount,
    open_tree,
};

use crate::plan::{ShareTags, Volume, VolumeShare};
use crate::{BootError, CachePolicy, message};
pub use mount_table::{Mounted, mount_of, mount_table};
pub use mounts::HostMount;
use slaves::Kept;

/// A directory that a guest mounts by its tag.
#[derive(Debug)]
pub struct Share {
    /// The tag.
    pub tag: String,
    /// The directory: its own parent, so that no way leads up from it.
    pub root: OwnedFd,
    /// How long the guest may trust what it cached.
    pub cache: CachePolicy,
    /// The VMM refuses whatever writes, also where the mounts below the directory would allow it.
    pub read_only: bool,
    /// The mount namespace that the directory is the root of, to be kept as long as it is shared; without one it is attached nowhere.
    pub namespace: Option<OwnedFd>,
}

impl Share {
    /// A tree that is attached nowhere, whose mounts say what may be written.
    #[must_use]
    pub fn of_tree(tag: &str, root: OwnedFd, cache: CachePolicy) -> Self {
        Self { tag: tag.to_owned(), root, cache, read_only: false, namespace: None }
    }

    /// What the agent mounts it by. A volume is read ahead; of what a container's own tree holds, most are programs, of which Linux
    /// would read as much around each page that is touched.
    pub(crate) fn request(&self) -> message::ShareRequest {
        let readahead_kib = if self.cache == CachePolicy::Always { 0 } else { READAHEAD_KIB };
        message::ShareRequest { tag: self.tag.clone(), readahead_kib, ..Default::default() }
    }
}

/// What one request can carry: a queue has 128 descriptors, 4 of which virtiofs keeps for headers.
const READAHEAD_KIB: u32 = 124 * 4;

/// The root file system of a container.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Rootfs {
    /// The directory itself.
    Directory {
        /// Host path.
        path: PathBuf,
        /// Whether the guest may write to it.
        read_only: bool,
    },
    /// Layers below a writable directory (overlayfs).
    Layers {
        /// Directories, topmost first; their paths are relative to `layer_dir`, or absolute.
        lower: Vec<PathBuf>,
        /// Working directory for the relative paths, which keeps the mount's options short.
        layer_dir: PathBuf,
        /// Holds `upper` and `work`, made when absent; without it the root is read-only.
        writable: Option<PathBuf>,
    },
    /// What a snapshotter asks for, mounted in this order.
    Mounts {
        /// The mounts.
        mounts: Vec<HostMount>,
        /// Whether the guest may write to it.
        read_only: bool,
    },
}

/// Makes the tree of a container's root.
///
/// # Errors
/// [`BootError::Share`] with the path that could not be used.
pub fn rootfs_tree(rootfs: Rootfs, scratch: &Path) -> Result<OwnedFd, BootError> {
    let shown = match &rootfs {
        Rootfs::Directory { path, .. } => path.clone(),
        Rootfs::Layers { lower, layer_dir, .. } => {
            lower.first().map_or_else(|| layer_dir.clone(), |l| layer_dir.join(l))
        }
        Rootfs::Mounts { mounts, .. } => mounts.last().map_or_else(|| scratch.to_owned(), |m| PathBuf::from(&m.source)),
    };
    let scratch = scratch.to_owned();
    in_namespace(MountPropagationFlags::PRIVATE, move || mount_rootfs(&rootfs, &scratch))
        .map_err(|source| BootError::Share { path: shown, source })
}

/// Makes a share of volumes: `v0`, `v1`, ... each a directory or a single file.
///
/// # Errors
/// [`BootError::Share`] with the volume that could not be used.
pub fn volumes_share(
    tags: &ShareTags,
    share: VolumeShare,
    volumes: Vec<Volume>,
    scratch: &Path,
) -> Result<Share, BootError> {
    for volume in &volumes {
        fs::metadata(&volume.source).map_err(|source| BootError::Share { path: volume.source.clone(), source })?;
    }
    let shown = volumes.first().map_or_else(|| scratch.to_owned(), |volume| volume.source.clone());
    let failed = |source| BootError::Share { path: shown, source };
    let (tag, scratch) = (tags.of_volumes(share), scratch.to_owned());
    if share == VolumeShare::Private {
        let build = move || mount_volumes(&volumes, &scratch).and_then(|()| clone_tree(&scratch));
        let root = in_namespace(MountPropagationFlags::PRIVATE, build).map_err(failed)?;
        return Ok(Share::of_tree(&tag, root, CachePolicy::Auto));
    }
    let build = move || mount_volumes(&volumes, &scratch).and_then(|()| slaves::keep(&scratch));
    let Kept { root, namespace } = in_namespace(MountPropagationFlags::DOWNSTREAM, build).map_err(failed)?;
    let read_only = share == VolumeShare::ReadOnlySlave;
    Ok(Share { tag, root, cache: CachePolicy::InUse, read_only, namespace: Some(namespace) })
}

/// Runs `build` on a thread with its own working directory and its own mount namespace, in which every mount has this propagation.
fn in_namespace<T, F>(propagation: MountPropagationFlags, build: F) -> io::Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> io::Result<T> + Send + 'static,
{
    let work = move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
        mount_change("/", MountPropagationFlags::REC | propagation)?;
        build()
    };
    let thread = thread::Builder::new().name("mounts".to_owned()).spawn(work)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that makes the mounts panicked")))
}

fn mount_rootfs(rootfs: &Rootfs, scratch: &Path) -> io::Result<OwnedFd> {
    match rootfs {
        Rootfs::Directory { path, read_only } => {
            mount_bind_recursive(path, scratch)?;
            add_flags(scratch, flags_of_share(*read_only))?;
        }
        Rootfs::Layers { lower, layer_dir, writable } => {
            let options = overlay_options(lower, writable.as_deref())?;
            std::env::set_current_dir(layer_dir)?;
            let flags = flags_of_share(writable.is_none());
            let options = std::ffi::CString::new(options)?;
            mount("overlay", scratch, "overlay", flags, Some(options.as_c_str()))?;
        }
        Rootfs::Mounts { mounts, read_only } => {
            mounts.iter().try_for_each(|mount| mount.mount_below(scratch))?;
            add_flags(scratch, flags_of_share(*read_only))?;
        }
    }
    clone_tree(scratch)
}

fn mount_volumes(volumes: &[Volume], scratch: &Path) -> io::Result<()> {
    mount("tmpfs", scratch, "tmpfs", MountFlags::NODEV | MountFlags::NOSUID, Some(c"mode=755,size=1m"))?;
    for (index, volume) in volumes.iter().enumerate() {
        let target = scratch.join(format!("v{index}"));
        if fs::metadata(&volume.source)?.is_dir() {
            fs::create_dir(&target)?;
        } else {
            File::create(&target)?;
        }
        mount_bind_recursive(&volume.source, &target)?;
        // The guest's kernel follows the links of a volume. Those of a root file system we follow ourselves: `open_in_tree`.
        add_flags(&target, flags_of_share(volume.read_only) | MountFlags::NOSYMFOLLOW)?;
    }
    Ok(mount_remount(scratch, MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID, "")?)
}

/// No device and no other user's rights of the host are ever reached through a share.
fn flags_of_share(read_only: bool) -> MountFlags {
    let read_only = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    MountFlags::NODEV | MountFlags::NOSUID | read_only
}

/// Gives the mount at `target` and every mount below it these flags, beside those that the host gave it: what is read-only on the host
/// stays so. For mounts that come later, to a slave, the VMM's file system device keeps what matters.
fn add_flags(target: &Path, added: MountFlags) -> io::Result<()> {
    for mounted in mount_table()? {
        if mounted.mount_point.starts_with(target) {
            // A remount takes away each flag that it does not name.
            let flags = MountFlags::BIND | mounted.flags() | added;
            mount_remount(mounted.mount_point.as_path(), flags, "")?;
        }
    }
    Ok(())
}

fn clone_tree(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(CWD, path, flags)?)
}

fn overlay_options(lower: &[PathBuf], writable: Option<&Path>) -> io::Result<String> {
    let lower: Vec<String> = lower.iter().map(|path| escape(path)).collect();
    let mut options = format!("lowerdir={}", lower.join(":"));
    if let Some(dir) = writable {
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        fs::create_dir_all(&upper)?;
        fs::create_dir_all(&work)?;
        options.push_str(&format!(",upperdir={},workdir={}", escape(&upper), escape(&work)));
    }
    Ok(options)
}

/// overlayfs splits its options at commas and its lower directories at colons.
fn escape(path: &Path) -> String {
    path.display().to_string().replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,")
}

/// Makes a directory below a tree, with what is missing above it, as if the tree were the root; symbolic links cannot lead
/// out of it. What is there stays as it is.
///
/// # Errors
/// What openat2(2) and mkdirat(2) say; `InvalidInput` for a path with `..`.
pub fn make_dirs_in_tree(tree: &OwnedFd, path: &Path) -> io::Result<()> {
    let resolve = rustix::fs::ResolveFlags::IN_ROOT | rustix::fs::ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut made = PathBuf::from(".");
    let mut parent = rustix::fs::openat2(tree, &made, flags, Mode::empty(), resolve)?;
    for component in path.components() {
        let name = match component {
            Component::Normal(name) => name,
            Component::ParentDir => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
            _ => continue,
        };
        made.push(name);
        parent = match rustix::fs::openat2(tree, &made, flags, Mode::empty(), resolve) {
            Err(rustix::io::Errno::NOENT) => {
                rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
                rustix::fs::openat2(tree, &made, flags, Mode::empty(), resolve)?
            }
            opened => opened?,
        };
    }
    Ok(())
}

/// Opens a file below a tree, as if the tree were the root; symbolic links cannot lead out of it.
///
/// # Errors
/// What openat2(2) says; `InvalidInput` for something that is not a regular file.
pub fn open_in_tree(tree: &OwnedFd, path: &str) -> io::Result<File> {
    let resolve = rustix::fs::ResolveFlags::IN_ROOT | rustix::fs::ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::openat2(tree, path, flags, Mode::empty(), resolve)?);
    if !file.metadata()?.is_file() || file.metadata()?.mode() & 0o170_000 != 0o100_000 {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use super::make_dirs_in_tree;

    #[test]
    fn directories_are_made_below_the_tree_only() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let root = dir.path().join("root");
        fs::create_dir(&root).expect("root");
        std::os::unix::fs::symlink("/real", root.join("link")).expect("link");
        fs::create_dir(root.join("real")).expect("real");
        let tree = OwnedFd::from(fs::File::open(&root).expect("tree"));
        make_dirs_in_tree(&tree, Path::new("/link/a/b")).expect("made");
        make_dirs_in_tree(&tree, Path::new("/link/a/b")).expect("there");
        assert!(root.join("real/a/b").is_dir());
        std::os::unix::fs::symlink("../../out", root.join("out")).expect("link");
        make_dirs_in_tree(&tree, Path::new("/out/a")).expect_err("a link to nothing");
        make_dirs_in_tree(&tree, Path::new("/../out")).expect_err("a way out");
        assert!(!dir.path().join("out").exists());
    }
}
