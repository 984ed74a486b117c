//! What a guest may ask of a shared directory, checked before the `virtiofsd` crate acts on it.
//!
//! The crate passes names on to the kernel as they came and relies on a root directory of its own (CVE-2026-47243), so here
//! a name is one path component or the request is refused. It also makes device nodes; ours never do. Called by the
//! crate's server on the workers' threads, after it has copied the request out of guest memory.
//!
//! The crate opens regular files and directories only, whatever the mount says about devices: a mount that the host has made since,
//! without `nodev`, leads to none.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;
use virtiofsd::passthrough::PassthroughFs;
use vmm_api::CachePolicy;

use super::unchanged::OpenedFiles;
use super::{ALWAYS_TIMEOUT, Rules};

/// A directory of the host behind the checks.
pub(super) struct CheckedFs {
    fs: PassthroughFs,
    /// How long the guest may believe that a name does not exist.
    missing_timeout: Duration,
    /// Where pages are kept and others write too: what the guest opened, to tell at the next open whether its pages are still true.
    opened: Option<OpenedFiles>,
    /// Whatever writes is refused. The mounts that were there at the start are read-only themselves; those that the host has made below
    /// them since are not.
    read_only: bool,
}

impl CheckedFs {
    /// The crate's file system with the rules of a cache policy that the crate does not have.
    pub(super) fn new(fs: PassthroughFs, Rules { cache, read_only }: Rules) -> Self {
        let missing_timeout = if cache == CachePolicy::Always { ALWAYS_TIMEOUT } else { Duration::ZERO };
        let compares = matches!(cache, CachePolicy::Auto | CachePolicy::InUse);
        Self { fs, missing_timeout, opened: compares.then(OpenedFiles::default), read_only }
    }

    /// Before each request that changes something.
    fn check_writable(&self) -> io::Result<()> {
        if self.read_only { Err(io::Error::from_raw_os_error(libc::EROFS)) } else { Ok(()) }
    }

    /// Before a file or a directory is opened: the crate passes the flags on.
    fn check_flags(&self, flags: u32) -> io::Result<()> {
        if flags & WRITES == 0 { Ok(()) } else { self.check_writable() }
    }
}

/// Flags of open(2) with which a file is written, made or emptied. `O_TMPFILE` has the bit of `O_DIRECTORY` as well.
const WRITES: u32 =
    (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY)).unsigned_abs();

/// Refuses everything but a plain name: a slash would lead out of the directory, and a kernel resolves the dots itself.
fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// Refuses device nodes: on the host they would be the host's devices. A character device 0:0 is overlayfs's whiteout.
fn check_node(mode: u32, device: u32) -> io::Result<()> {
    match mode & libc::S_IFMT {
        libc::S_IFBLK => Err(io::Error::from_raw_os_error(libc::EPERM)),
        libc::S_IFCHR if device != 0 => Err(io::Error::from_raw_os_error(libc::EPERM)),
        _ => Ok(()),
    }
}

/// A file system of the host without access control lists has none to show. Linux would take any other error than "no such
/// attribute" for the answer to a permission check.
fn without_access_list(name: &CStr, error: io::Error) -> io::Error {
    let unsupported = error.raw_os_error() == Some(libc::EOPNOTSUPP);
    if unsupported && name.to_bytes().starts_with(b"system.posix_acl_") {
        return io::Error::from_raw_os_error(libc::ENODATA);
    }
    error
}

type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;

impl FileSystem for CheckedFs {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // Linux offers it since 5.10. For any other client the crate prints a line, so a guest could fill the host's log.
        if !capable.contains(FsOptions::SUBMOUNTS) {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        self.fs.init(capable)
    }

    fn destroy(&self) {
        if let Some(opened) = &self.opened {
            opened.clear();
        }
        self.fs.destroy();
    }

    fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        match self.fs.lookup(ctx, parent, name) {
            // Node 0 says "does not exist" and, unlike an error, may be cached.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && !self.missing_timeout.is_zero() => Ok(Entry {
                inode: 0,
                generation: 0,
                attr: fuse::Attr::default(),
                attr_timeout: Duration::ZERO,
                entry_timeout: self.missing_timeout,
            }),
            other => other,
        }
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        if let Some(opened) = &self.opened {
            opened.forget(inode);
        }
        self.fs.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Inode, u64)>) {
        if let Some(opened) = &self.opened {
            requests.iter().for_each(|&(inode, _)| opened.forget(inode));
        }
        self.fs.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(fuse::Attr, Duration)> {
        self.fs.getattr(ctx, inode, handle)
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Inode,
        attr: fuse::SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(fuse::Attr, Duration)> {
        self.check_writable()?;
        self.fs.setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: Context, inode: Inode) -> io::Result<Vec<u8>> {
        self.fs.readlink(ctx, inode)
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.check_writable()?;
        // The link's target is text that the guest resolves; the host never follows it.
        check_name(name)?;
        self.fs.symlink(ctx, linkname, parent, name, extensions)
    }

    fn mknod(
        &self,
        ctx: Context,
        inode: Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.check_writable()?;
        check_name(name)?;
        check_node(mode, rdev)?;
        self.fs.mknod(ctx, inode, name, mode, rdev, umask, extensions)
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.check_writable()?;
        check_name(name)?;
        self.fs.mkdir(ctx, parent, name, mode, umask, extensions)
    }

    fn unlink(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        self.check_writable()?;
        check_name(name)?;
        self.fs.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        self.check_writable()?;
        check_name(name)?;
        self.fs.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: Context,
        olddir: Inode,
        oldname: &CStr,
        newdir: Inode,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.check_writable()?;
        check_name(oldname)?;
        check_name(newname)?;
        self.fs.rename(ctx, olddir, oldname, newdir, newname, flags)
    }

    fn link(&self, ctx: Context, inode: Inode, newparent: Inode, newname: &CStr) -> io::Result<Entry> {
        self.check_writable()?;
        check_name(newname)?;
        self.fs.link(ctx, inode, newparent, newname)
    }

    fn open(
        &self,
        ctx: Context,
        inode: Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.check_flags(flags)?;
        let (handle, mut options) = self.fs.open(ctx, inode, kill_priv, flags)?;
        if let Some(opened) = &self.opened {
            let unchanged = self.fs.getattr(ctx, inode, None).is_ok_and(|(attr, _)| opened.note(inode, &attr));
            options.set(OpenOptions::KEEP_CACHE, unchanged);
        }
        // What closing a file could tell is about what was written to it.
        options.set(OpenOptions::NOFLUSH, flags.cast_signed() & libc::O_ACCMODE == libc::O_RDONLY);
        Ok((handle, options))
    }

    fn create(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        self.check_writable()?;
        check_name(name)?;
        self.fs.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.fs.read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        self.check_writable()?;
        self.fs.write(ctx, inode, handle, r, size, offset, lock_owner, delayed_write, kill_priv, flags)
    }

    fn flush(&self, ctx: Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()> {
        self.fs.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.fs.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.check_writable()?;
        self.fs.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.fs.release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: Inode) -> io::Result<libc::statvfs64> {
        self.fs.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        self.check_writable()?;
        self.fs.setxattr(ctx, inode, name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.fs.getxattr(ctx, inode, name, size).map_err(|error| without_access_list(name, error))
    }

    fn listxattr(&self, ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        self.fs.listxattr(ctx, inode, size)
    }

    fn removexattr(&self, ctx: Context, inode: Inode, name: &CStr) -> io::Result<()> {
        self.check_writable()?;
        self.fs.removexattr(ctx, inode, name)
    }

    fn opendir(&self, ctx: Context, inode: Inode, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.check_flags(flags)?;
        self.fs.opendir(ctx, inode, flags)
    }

    fn readdir(&self, ctx: Context, inode: Inode, handle: Handle, size: u32, offset: u64) -> io::Result<Self::DirIter> {
        self.fs.readdir(ctx, inode, handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.fs.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()> {
        self.fs.releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: Context, inode: Inode, mask: u32) -> io::Result<()> {
        self.fs.access(ctx, inode, mask)
    }

    fn lseek(&self, ctx: Context, inode: Inode, handle: Handle, offset: u64, whence: u32) -> io::Result<u64> {
        self.fs.lseek(ctx, inode, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: Inode,
        handle_in: Handle,
        offset_in: u64,
        inode_out: Inode,
        handle_out: Handle,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        self.check_writable()?;
        self.fs.copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: Inode) -> io::Result<()> {
        self.fs.syncfs(ctx, inode)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::{check_name, check_node, without_access_list};

    #[test]
    fn a_name_is_one_component() {
        assert!(check_name(c"file").is_ok());
        assert!(check_name(c"...").is_ok());
        let refused = [c"", c".", c"..", c"a/b", c"../up", c"/etc", c"a/"];
        assert!(refused.into_iter().all(|name| check_name(name).is_err()));
    }

    #[test]
    fn a_file_system_without_access_lists_has_none() {
        let unsupported = || io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        let seen = |name| without_access_list(name, unsupported()).raw_os_error();
        assert_eq!(seen(c"system.posix_acl_access"), Some(libc::ENODATA));
        assert_eq!(seen(c"user.colour"), Some(libc::EOPNOTSUPP));
    }

    #[test]
    fn device_nodes_are_refused_and_whiteouts_are_not() {
        assert!(check_node(libc::S_IFBLK, 0x800).is_err());
        assert!(check_node(libc::S_IFCHR, 0x103).is_err());
        assert!(check_node(libc::S_IFCHR, 0).is_ok());
        assert!(check_node(libc::S_IFIFO, 0).is_ok());
    }
}
