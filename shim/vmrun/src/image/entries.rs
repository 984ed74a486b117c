//! The entries of one layer's archive, put into a directory. Called by the unpacking child and by tests.
//!
//! Every name is resolved by openat2(2) with the directory as its root, and what is at its end is never followed: neither a
//! name with `..` nor a symbolic link that an earlier entry made leads anywhere else. OCI whiteouts (image-spec, layer.md)
//! become overlayfs's: a character device 0:0 for a name, and for opaque directories a list that the caller marks.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat,
    fsetxattr, ftruncate, linkat, mkdirat, mknodat, openat, openat2, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

/// Most entries of one layer.
const MAX_ENTRIES: u64 = 4_000_000;
/// Most bytes that the files of one layer hold, and most bytes of its archive.
pub(super) const MAX_BYTES: u64 = 256 << 30;
/// Deepest directory. Whoever removes the tree holds a descriptor for each level.
const MAX_DEPTH: usize = 256;
/// Files are written in blocks of this many bytes; a block of zeros becomes a hole.
const BLOCK_LEN: usize = 64 << 10;

/// Unpacks an archive into `root`; returns the directories that hide what lower layers have there.
pub(super) fn unpack(input: impl Read, root: OwnedFd) -> Result<Vec<PathBuf>> {
    let mut tree =
        LayerTree { root: Rc::new(root), parent: None, opaque: BTreeSet::new(), times: Vec::new(), bytes: 0 };
    let mut archive = Archive::new(input);
    let mut count = 0;
    for entry in archive.entries()? {
        let mut entry = entry.context("the archive is damaged")?;
        count += 1;
        if count > MAX_ENTRIES {
            bail!("the archive has more than {MAX_ENTRIES} entries");
        }
        let shown = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        tree.add(&mut entry).with_context(|| format!("cannot unpack {shown:?}"))?;
    }
    tree.finish()
}

/// What an entry finds under its name.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Existing {
    Nothing,
    Directory,
    Whiteout,
}

/// Owner, mode and time of an entry.
struct Attributes {
    uid: Uid,
    gid: Gid,
    mode: Mode,
    mtime: Timespec,
    xattrs: Vec<(OsString, Vec<u8>)>,
}

/// A layer that is being unpacked.
struct LayerTree {
    root: Rc<OwnedFd>,
    /// The last parent: entries of one directory follow each other.
    parent: Option<(PathBuf, Rc<OwnedFd>)>,
    opaque: BTreeSet<PathBuf>,
    /// A directory's time is set last, or what is unpacked into it would change it.
    times: Vec<(PathBuf, Timespec)>,
    bytes: u64,
}

impl LayerTree {
    fn add<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<()> {
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let path = clean(&entry.path_bytes())?;
        let attributes = attributes(entry)?;
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            return self.set_root(kind, &attributes);
        };
        let parent = self.open_parent(&path)?;
        if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
            return self.whiteout(&parent, &path, OsStr::from_bytes(hidden));
        }
        // Archives older than ustar mark a directory by its name only.
        let is_dir = kind.is_dir() || (kind.is_file() && entry.path_bytes().ends_with(b"/"));
        if kind.is_hard_link() {
            let target = clean(&entry.link_name_bytes().context("a hard link to nothing")?)?;
            return self.hard_link(&parent, &name, &target);
        }
        let existing = self.clear(&parent, &name, is_dir)?;
        match kind {
            _ if is_dir => return self.directory(&parent, &name, path, existing, &attributes),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.regular_file(&parent, &name, entry, &attributes)?;
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().context("a symbolic link to nothing")?.into_owned();
                symlinkat(OsStr::from_bytes(&target), &parent, &name)?;
                chownat(&parent, &name, Some(attributes.uid), Some(attributes.gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => node(&parent, &name, entry, &attributes)?,
            other => bail!("its type {:?} is unknown", char::from(other.as_byte())),
        }
        set_mtime(&parent, &name, attributes.mtime)
    }

    /// The entry `./` stands for the directory itself.
    fn set_root(&mut self, kind: EntryType, attributes: &Attributes) -> Result<()> {
        if !kind.is_dir() {
            bail!("it has no name");
        }
        let dir = openat(&self.root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        attributes.set(dir.as_fd())?;
        self.times.push((PathBuf::from("."), attributes.mtime));
        Ok(())
    }

    /// Opens the directory that will hold `path`, making what is missing of it.
    fn open_parent(&mut self, path: &Path) -> Result<Rc<OwnedFd>> {
        let dir = path.parent().unwrap_or(Path::new(""));
        if dir.as_os_str().is_empty() {
            return Ok(self.root.clone());
        }
        if let Some((last, parent)) = &self.parent
            && last == dir
        {
            return Ok(parent.clone());
        }
        let opened = match self.open_dir(dir) {
            Err(error) if is_missing(&error) => self.make_dirs(dir)?,
            opened => opened?,
        };
        let opened = Rc::new(opened);
        self.parent = Some((dir.to_owned(), opened.clone()));
        Ok(opened)
    }

    fn open_dir(&self, dir: &Path) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let plain = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let opened = match openat2(&self.root, dir, flags, Mode::empty(), plain) {
            Err(Errno::LOOP) => {
                let through_links = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
                let opened = openat2(&self.root, dir, flags, Mode::empty(), through_links)?;
                self.check_depth(&opened)?;
                opened
            }
            opened => opened?,
        };
        Ok(opened)
    }

    /// The depth of a name does not bound the depth of a directory that was reached through symbolic links.
    fn check_depth(&self, dir: &OwnedFd) -> Result<()> {
        let root = rustix::fs::fstat(&self.root)?;
        let mut above = openat(dir, ".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for _ in 0..MAX_DEPTH {
            let stat = rustix::fs::fstat(&above)?;
            if (stat.st_dev, stat.st_ino) == (root.st_dev, root.st_ino) {
                return Ok(());
            }
            above = openat(&above, "..", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        }
        bail!("it is more than {MAX_DEPTH} directories deep");
    }

    fn make_dirs(&mut self, dir: &Path) -> Result<OwnedFd> {
        let mut parent = self.root.as_fd().try_clone_to_owned()?;
        let mut made = PathBuf::new();
        for name in dir.iter() {
            made.push(name);
            parent = match self.open_dir(&made) {
                Err(error) if is_missing(&error) => {
                    if find(&parent, name)?.as_ref().is_some_and(is_whiteout) {
                        unlinkat(&parent, name, AtFlags::empty())?;
                        self.opaque.insert(made.clone());
                    }
                    mkdirat(&parent, name, Mode::from_raw_mode(0o755))
                        .with_context(|| format!("cannot make the directory {}", made.display()))?;
                    self.open_dir(&made)?
                }
                opened => opened?,
            };
        }
        Ok(parent)
    }

    /// A name that lower layers have and this one has not. What this layer itself put there stays (layer.md, Whiteouts).
    fn whiteout(&mut self, parent: &OwnedFd, path: &Path, hidden: &OsStr) -> Result<()> {
        let dir = path.parent().unwrap_or(Path::new("")).to_owned();
        match hidden.as_bytes() {
            b".wh..opq" => {
                self.opaque.insert(dir);
                return Ok(());
            }
            // Notes of AUFS to itself, which Docker still writes.
            reserved if reserved.starts_with(b".wh.") => return Ok(()),
            b"" | b"." | b".." => bail!("it is not a whiteout of anything"),
            _ => {}
        }
        match find(parent, hidden)? {
            None => mknodat(parent, hidden, FileType::CharacterDevice, Mode::empty(), 0)?,
            Some(stat) if FileType::from_raw_mode(stat.st_mode).is_dir() => drop(self.opaque.insert(dir.join(hidden))),
            Some(_) => {}
        }
        Ok(())
    }

    /// Removes what is in the way of an entry; a directory stays for a directory.
    fn clear(&mut self, parent: &OwnedFd, name: &OsStr, for_dir: bool) -> Result<Existing> {
        let Some(stat) = find(parent, name)? else { return Ok(Existing::Nothing) };
        if FileType::from_raw_mode(stat.st_mode).is_dir() {
            if for_dir {
                return Ok(Existing::Directory);
            }
            self.parent = None;
            remove_tree(parent, name, 0)?;
            return Ok(Existing::Nothing);
        }
        self.parent = None;
        unlinkat(parent, name, AtFlags::empty())?;
        Ok(if is_whiteout(&stat) { Existing::Whiteout } else { Existing::Nothing })
    }

    fn directory(
        &mut self,
        parent: &OwnedFd,
        name: &OsStr,
        path: PathBuf,
        existing: Existing,
        attributes: &Attributes,
    ) -> Result<()> {
        if existing != Existing::Directory {
            mkdirat(parent, name, Mode::from_raw_mode(0o700))?;
        }
        if existing == Existing::Whiteout {
            self.opaque.insert(path.clone());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = openat(parent, name, flags, Mode::empty())?;
        attributes.set(dir.as_fd())?;
        self.times.push((path, attributes.mtime));
        Ok(())
    }

    fn regular_file<R: Read>(
        &mut self,
        parent: &OwnedFd,
        name: &OsStr,
        entry: &mut Entry<'_, R>,
        attributes: &Attributes,
    ) -> Result<()> {
        let len = entry.size();
        self.bytes = self.bytes.saturating_add(len);
        if self.bytes > MAX_BYTES {
            bail!("the files of the archive have more than {MAX_BYTES} bytes");
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(openat(parent, name, flags, Mode::from_raw_mode(0o600))?);
        let copied = copy_with_holes(entry, &file)?;
        if copied != len {
            bail!("the archive ends within it");
        }
        attributes.set(file.as_fd())
    }

    fn hard_link(&mut self, parent: &OwnedFd, name: &OsStr, target: &Path) -> Result<()> {
        let shown = target.display();
        let target_name = target.file_name().with_context(|| format!("a hard link to the directory {shown}"))?;
        let dir = target.parent().unwrap_or(Path::new(""));
        let target_parent = match self.open_dir(if dir.as_os_str().is_empty() { Path::new(".") } else { dir }) {
            Err(error) if is_missing(&error) => bail!("it is a hard link to {shown}, which is not in this layer"),
            opened => opened?,
        };
        let Some(found) = find(&target_parent, target_name)? else {
            bail!("it is a hard link to {shown}, which is not in this layer");
        };
        if is_whiteout(&found) {
            bail!("it is a hard link to {shown}, which this layer deletes");
        }
        if let Some(own) = find(parent, name)?
            && (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)
        {
            return Ok(());
        }
        self.clear(parent, name, false)?;
        linkat(&target_parent, target_name, parent, name, AtFlags::empty())
            .with_context(|| format!("cannot link it to {shown}"))
    }

    fn finish(self) -> Result<Vec<PathBuf>> {
        for (path, mtime) in self.times.iter().rev() {
            // A later entry may have put something else in its place.
            if let Ok(dir) = self.open_dir(path) {
                set_mtime(&dir, OsStr::new("."), *mtime)?;
            }
        }
        let is_there = |path: &Path| path.as_os_str().is_empty() || self.open_dir(path).is_ok();
        Ok(self.opaque.iter().filter(|path| is_there(path)).cloned().collect())
    }
}

impl Attributes {
    /// Sets all but the time of a file or directory. Capabilities come after the owner, whose change clears them.
    fn set(&self, file: BorrowedFd<'_>) -> Result<()> {
        rustix::fs::fchown(file, Some(self.uid), Some(self.gid))?;
        rustix::fs::fchmod(file, self.mode)?;
        for (name, value) in &self.xattrs {
            match fsetxattr(file, name, value, XattrFlags::empty()) {
                // As Docker: what the file system cannot keep is lost, but never a capability.
                Err(Errno::OPNOTSUPP) if name != "security.capability" => {}
                set => set.with_context(|| format!("cannot set the attribute {}", name.display()))?,
            }
        }
        Ok(())
    }
}

fn attributes<R: Read>(entry: &mut Entry<'_, R>) -> Result<Attributes> {
    let header = entry.header();
    let id =
        |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX).context("its owner is not a number of a user");
    let (uid, gid) = (Uid::from_raw(id(header.uid()?)?), Gid::from_raw(id(header.gid()?)?));
    let mode = Mode::from_raw_mode(header.mode()? & 0o7777);
    let seconds = i64::try_from(header.mtime()?).context("its time is out of range")?;
    let mut attributes =
        Attributes { uid, gid, mode, mtime: Timespec { tv_sec: seconds, tv_nsec: 0 }, xattrs: Vec::new() };
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension.context("its extended header is damaged")?;
        let (key, value) = (extension.key_bytes(), extension.value_bytes());
        if key == b"mtime" {
            attributes.mtime = std::str::from_utf8(value).ok().and_then(time).context("its time is not a number")?;
        } else if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            if is_kept(name) {
                attributes.xattrs.push((OsStr::from_bytes(name).to_owned(), value.to_owned()));
            }
        } else if key.starts_with(b"GNU.sparse.") {
            bail!("it is sparse in the pax format, which is not supported");
        }
    }
    Ok(attributes)
}

/// Attributes that mean something in a guest. `trusted` belongs to overlayfs on the host, labels to the host's policy.
fn is_kept(name: &[u8]) -> bool {
    let ours = name.starts_with(b"user.overlay.");
    let acl = [&b"system.posix_acl_access"[..], b"system.posix_acl_default"].contains(&name);
    name == b"security.capability" || acl || (name.starts_with(b"user.") && !ours)
}

/// Time of a pax header (POSIX pax, mtime): seconds with a decimal fraction, which may be negative.
fn time(text: &str) -> Option<Timespec> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let mut seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let mut nanoseconds: i64 = digits.parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        seconds = seconds.checked_sub(1)?;
        nanoseconds = 1_000_000_000 - nanoseconds;
    }
    Some(Timespec { tv_sec: seconds, tv_nsec: nanoseconds })
}

/// A name without `/` at its beginning and `.` in it.
fn clean(name: &[u8]) -> Result<PathBuf> {
    if name.contains(&0) {
        bail!("the name has a NUL byte");
    }
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(name)).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::ParentDir => bail!("{:?} leads out of its directory", String::from_utf8_lossy(name)),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if path.components().count() > MAX_DEPTH {
        bail!("it is more than {MAX_DEPTH} directories deep");
    }
    Ok(path)
}

fn find(parent: &OwnedFd, name: &OsStr) -> Result<Option<Stat>> {
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(None),
        found => Ok(Some(found?)),
    }
}

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode).is_char_device() && stat.st_rdev == 0
}

fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(&(Errno::NOENT | Errno::NOTDIR)))
}

fn node<R: Read>(parent: &OwnedFd, name: &OsStr, entry: &Entry<'_, R>, attributes: &Attributes) -> Result<()> {
    let header = entry.header();
    let kind = match header.entry_type() {
        EntryType::Char => FileType::CharacterDevice,
        EntryType::Block => FileType::BlockDevice,
        _ => FileType::Fifo,
    };
    // A fifo has no numbers, and its fields may be empty.
    let device = match kind {
        FileType::Fifo => 0,
        _ => rustix::fs::makedev(header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0)),
    };
    if kind.is_char_device() && device == 0 {
        bail!("the device 0:0 is overlayfs's mark of a deletion; a layer says that with a .wh. file");
    }
    mknodat(parent, name, kind, Mode::empty(), device)?;
    chownat(parent, name, Some(attributes.uid), Some(attributes.gid), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(chmodat(parent, name, attributes.mode, AtFlags::empty())?)
}

fn set_mtime(parent: &OwnedFd, name: &OsStr, mtime: Timespec) -> Result<()> {
    let times = Timestamps { last_access: mtime, last_modification: mtime };
    utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW).context("cannot set its time")
}

/// Copies an entry's bytes; returns how many there were.
fn copy_with_holes(input: &mut impl Read, file: &File) -> Result<u64> {
    let mut block = vec![0; BLOCK_LEN];
    let mut len = 0;
    loop {
        let filled = fill(input, &mut block)?;
        if block[..filled].iter().any(|byte| *byte != 0) {
            file.write_all_at(&block[..filled], len)?;
        }
        len += filled as u64;
        if filled < BLOCK_LEN {
            ftruncate(file, len)?;
            return Ok(len);
        }
    }
}

fn fill(input: &mut impl Read, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match input.read(&mut block[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

fn remove_tree(parent: &OwnedFd, name: &OsStr, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        bail!("it replaces a directory more than {MAX_DEPTH} deep");
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(parent, name, flags, Mode::empty())?;
    let names: Vec<OsString> = rustix::fs::Dir::read_from(&dir)?
        .map(|entry| Ok(OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned()))
        .collect::<Result<_, Errno>>()?;
    for child in names.iter().filter(|child| *child != "." && *child != "..") {
        match unlinkat(&dir, child, AtFlags::empty()) {
            Err(Errno::ISDIR) => remove_tree(&dir, child, depth + 1)?,
            removed => removed?,
        }
    }
    Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

#[cfg(test)]
mod tests;
