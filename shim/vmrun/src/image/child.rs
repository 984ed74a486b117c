//! The child that unpacks one layer: it makes the target its root, so that no name in the archive means anything outside.
//! OCI whiteouts (image-spec, layer.md) become overlayfs's: a character device 0:0, and the opaque xattr.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat, setxattr};
use tar::{Archive, Entry};

/// Most entries of one layer.
const MAX_ENTRIES: u64 = 4_000_000;
/// Most bytes that one layer unpacks to.
const MAX_BYTES: u64 = 256 << 30;

/// Unpacks standard input into `target`, which becomes the root of this process.
pub(crate) fn unpack_child(compression: &str, target: &Path) -> Result<u8> {
    rustix::process::chroot(target).with_context(|| format!("cannot make {} the root", target.display()))?;
    std::env::set_current_dir("/")?;
    rustix::process::umask(Mode::empty());
    let input = io::stdin().lock();
    match compression {
        "none" => unpack(input)?,
        "gzip" => unpack(flate2::read::MultiGzDecoder::new(input))?,
        "zstd" => unpack(zstd::Decoder::new(input)?)?,
        other => bail!("unknown compression {other:?}"),
    }
    Ok(0)
}

fn unpack(input: impl Read) -> Result<()> {
    let mut archive = Archive::new(input.take(MAX_BYTES));
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_preserve_mtime(true);
    archive.set_unpack_xattrs(true);
    archive.set_overwrite(true);
    // A directory's times and mode are set last, or what is unpacked into it would change them.
    let mut directories = Vec::new();
    let mut count = 0;
    for entry in archive.entries()? {
        let mut entry = entry.context("the archive is damaged")?;
        count += 1;
        if count > MAX_ENTRIES {
            bail!("more than {MAX_ENTRIES} entries");
        }
        let path = entry.path().context("an entry has no usable name")?.into_owned();
        if whiteout(&path)? {
            continue;
        }
        if entry.header().entry_type().is_dir() {
            directories.push((path.clone(), entry.header().mode()?, entry.header().mtime()?));
        }
        unpack_entry(&mut entry, &path).with_context(|| format!("cannot unpack {}", path.display()))?;
    }
    for (path, mode, mtime) in directories.into_iter().rev() {
        finish_directory(&path, mode, mtime).with_context(|| format!("cannot finish {}", path.display()))?;
    }
    Ok(())
}

fn unpack_entry<R: Read>(entry: &mut Entry<'_, R>, path: &Path) -> Result<()> {
    let kind = entry.header().entry_type();
    if kind.is_character_special() || kind.is_block_special() || kind.is_fifo() {
        return make_node(entry, path);
    }
    entry.unpack_in("/")?;
    Ok(())
}

fn make_node<R: Read>(entry: &Entry<'_, R>, path: &Path) -> Result<()> {
    let header = entry.header();
    let kind = match header.entry_type() {
        kind if kind.is_character_special() => FileType::CharacterDevice,
        kind if kind.is_block_special() => FileType::BlockDevice,
        _ => FileType::Fifo,
    };
    let device = rustix::fs::makedev(header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0));
    mknodat(CWD, path, kind, Mode::from_raw_mode(header.mode()?), device)?;
    let (uid, gid) = (u32::try_from(header.uid()?)?, u32::try_from(header.gid()?)?);
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))?;
    Ok(())
}

/// Whether the entry stood for a deletion.
fn whiteout(path: &Path) -> Result<bool> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return Ok(false) };
    let Some(hidden) = name.strip_prefix(".wh.") else { return Ok(false) };
    let parent = path.parent().map_or_else(|| PathBuf::from("/"), Path::to_owned);
    fs::create_dir_all(&parent)?;
    if hidden == ".wh..opq" {
        setxattr(&parent, "trusted.overlay.opaque", b"y", XattrFlags::empty())?;
    } else if hidden.is_empty() || hidden == "." || hidden == ".." {
        bail!("{} is not a whiteout of anything", path.display());
    } else {
        mknodat(CWD, parent.join(hidden), FileType::CharacterDevice, Mode::empty(), 0)?;
    }
    Ok(true)
}

fn finish_directory(path: &Path, mode: u32, mtime: u64) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777))?;
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(mtime);
    fs::File::open(path)?.set_modified(time)?;
    Ok(())
}
