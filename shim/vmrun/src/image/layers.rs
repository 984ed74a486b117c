//! Layers on disk: each is verified while it is unpacked, once, into a folder named by its diff id.
//!
//! ```text
//!   LAYERS/<24 digits>          complete; locked (shared) by each container that uses it
//!   LAYERS/.<24 digits>.new     being unpacked, by the holder of
//!   LAYERS/.<24 digits>.lock    which is removed with it
//! ```
//! Unpacking is done by a child that has its target as its root ([`super::child`]): no path in an archive, and no symbolic
//! link that an earlier entry made, leads anywhere else. A layer appears under its name only when it is complete, verified
//! and on the disk.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::fs::{FlockOperation, Mode, OFlags, ResolveFlags, XattrFlags, flock, openat2};

use super::blob::Section;
use super::digest::{Digest, HashingReader};
use super::lock::NameLock;
use super::progress::{Bar, Progress};

/// overlayfs's mark of a directory that hides what lower layers have there.
const OPAQUE: &str = "trusted.overlay.opaque";
/// Longest report of the child, in bytes: its opaque directories.
const MAX_REPORT_LEN: u64 = 64 << 20;
/// Longest error of the child, in bytes.
const MAX_ERROR_LEN: u64 = 16 << 10;

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// What a media type says (image-spec, layer.md, and Docker's image manifest version 2, schema 2).
    pub(super) fn of_media_type(media_type: &str) -> Result<Self> {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar" => Ok(Self::None),
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Ok(Self::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Self::Zstd),
            other => bail!("layers of type {other:?} are not supported: tar, tar+gzip and tar+zstd are"),
        }
    }

    /// What the first bytes say, where nothing else does (docker-archive).
    pub(super) fn of_content(section: &Section) -> Result<Self> {
        let mut magic = Vec::new();
        section.clone().take(4).read_to_end(&mut magic)?;
        Ok(match magic.as_slice() {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd] => Self::Zstd,
            _ => Self::None,
        })
    }

    fn argument(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// A layer that can be unpacked.
pub(super) struct Layer {
    /// What the bytes must hash to; none in an archive that does not say.
    pub(super) digest: Option<Digest>,
    /// What the uncompressed bytes must hash to.
    pub(super) diff_id: Digest,
    pub(super) compression: Compression,
    pub(super) content: Section,
}

/// An unpacked layer, which nobody removes as long as this lives.
#[derive(Debug)]
pub(crate) struct UnpackedLayer {
    /// Name of its folder in the folder of layers.
    pub(crate) name: PathBuf,
    /// Whether it hides all layers below it.
    pub(crate) opaque: bool,
    _in_use: File,
}

/// Name of a layer's folder. Short names keep overlayfs's options below their limit of one page.
pub(super) fn folder_name(diff_id: &Digest) -> &str {
    &diff_id.hex()[..24]
}

/// Makes sure that all layers of an image are unpacked. On failure none is left that was not there before, unless another
/// process has begun to use it.
pub(super) fn unpack_all(layers: &[Layer], layer_dir: &Path, progress: &Progress) -> Result<Vec<UnpackedLayer>> {
    let mut unpacked = Vec::new();
    let mut new = Vec::new();
    for layer in layers {
        let name = folder_name(&layer.diff_id);
        if !layer_dir.join(name).exists() {
            new.push(name);
        }
        match unpack(layer, layer_dir, progress) {
            Ok(layer) => unpacked.push(layer),
            Err(error) => {
                drop(unpacked);
                for name in new {
                    remove(layer_dir, name)?;
                }
                return Err(error);
            }
        }
    }
    Ok(unpacked)
}

/// Makes sure that a layer is unpacked.
fn unpack(layer: &Layer, layer_dir: &Path, progress: &Progress) -> Result<UnpackedLayer> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(layer_dir)
        .with_context(|| format!("cannot make {}", layer_dir.display()))?;
    let name = folder_name(&layer.diff_id);
    if let Some(unpacked) = take_into_use(layer_dir, name)? {
        return Ok(unpacked);
    }
    let _lock = NameLock::wait(layer_dir, name)?;
    // Another process may have unpacked it while this one waited.
    if let Some(unpacked) = take_into_use(layer_dir, name)? {
        return Ok(unpacked);
    }
    let shown = layer.digest.as_ref().unwrap_or(&layer.diff_id);
    let unfinished = Unfinished::create(layer_dir, name)?;
    let bar = progress.bar("unpacking", shown, layer.content.len());
    unpack_in_child(layer, &unfinished.0, &bar).with_context(|| format!("cannot unpack layer {shown}"))?;
    let dir = File::open(&unfinished.0)?;
    rustix::fs::syncfs(&dir).context("cannot write the layer to the disk")?;
    fs::rename(&unfinished.0, layer_dir.join(name)).context("cannot put the layer in place")?;
    take_into_use(layer_dir, name)?.context("the layer was removed while it was being unpacked")
}

fn take_into_use(layer_dir: &Path, name: &str) -> Result<Option<UnpackedLayer>> {
    let path = layer_dir.join(name);
    let dir = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(|| format!("cannot open {}", path.display()))?,
    };
    flock(&dir, FlockOperation::LockShared)?;
    // `remove` holds the lock until the folder has another name.
    let is_there = fs::metadata(&path).is_ok_and(|there| dir.metadata().is_ok_and(|own| own.ino() == there.ino()));
    if !is_there {
        return Ok(None);
    }
    let mut value = [0; 1];
    let opaque = rustix::fs::fgetxattr(&dir, OPAQUE, &mut value).is_ok() && value == *b"y";
    Ok(Some(UnpackedLayer { name: PathBuf::from(name), opaque, _in_use: dir }))
}

/// Removes a layer that no container uses; returns whether it is gone.
pub(super) fn remove(layer_dir: &Path, name: &str) -> Result<bool> {
    let path = layer_dir.join(name);
    let Ok(dir) = File::open(&path) else { return Ok(true) };
    let Some(_lock) = NameLock::attempt(layer_dir, name)? else { return Ok(false) };
    if flock(&dir, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(false);
    }
    let unfinished = Unfinished(layer_dir.join(format!(".{name}.new")));
    fs::rename(&path, &unfinished.0).with_context(|| format!("cannot remove {}", path.display()))?;
    Ok(true)
}

/// Removes what processes left that died while they unpacked.
pub(super) fn remove_unfinished(layer_dir: &Path) {
    for entry in fs::read_dir(layer_dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(name) = name.strip_prefix('.').and_then(|n| n.strip_suffix(".new")) else { continue };
        if let Ok(Some(_lock)) = NameLock::attempt(layer_dir, name) {
            drop(Unfinished(entry.path()));
        }
    }
}

/// The folder of a layer that is not complete, removed when dropped; its holder holds the layer's lock.
struct Unfinished(PathBuf);

impl Unfinished {
    fn create(layer_dir: &Path, name: &str) -> Result<Self> {
        let path = layer_dir.join(format!(".{name}.new"));
        // What a process left that died.
        drop(Self(path.clone()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let unfinished = Self(path);
        fs::set_permissions(&unfinished.0, fs::Permissions::from_mode(0o755))?;
        Ok(unfinished)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.0.display(), %error, "cannot remove an unfinished layer");
            }
            _ => {}
        }
    }
}

/// Feeds a layer to a child, and checks what both have hashed.
fn unpack_in_child(layer: &Layer, target: &Path, bar: &Bar) -> Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["unpack-layer", layer.compression.argument()])
        .arg(target)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the process that unpacks")?;
    let mut stdin = child.stdin.take().context("the child has no standard input")?;
    let mut content = HashingReader::new(layer.content.clone());
    let fed = feed(&mut content, &mut stdin, bar);
    drop(stdin);
    let mut report = Vec::new();
    child.stdout.take().map(|out| out.take(MAX_REPORT_LEN).read_to_end(&mut report)).transpose()?;
    let mut cause = String::new();
    child.stderr.take().map(|err| err.take(MAX_ERROR_LEN).read_to_string(&mut cause)).transpose()?;
    let status = child.wait()?;
    fed.context("cannot read the layer")?;
    // A wrong byte shows as damage to the child; the wrong digest is the better answer, so it comes first.
    let (actual, _) = content.finish();
    layer.digest.as_ref().map_or(Ok(()), |digest| digest.verify(&actual))?;
    if !status.success() {
        let cause = cause.trim().trim_start_matches("vmrun: ");
        return Err(if cause.is_empty() {
            anyhow!("the process that unpacks ended with {status}")
        } else {
            anyhow!("{cause}")
        });
    }
    let mut fields = report.split(|byte| *byte == 0);
    let diff_id = fields.next().and_then(|field| std::str::from_utf8(field).ok()).unwrap_or_default();
    let diff_id = Digest::parse(diff_id).context("the process that unpacks reported nonsense")?;
    layer.diff_id.verify(&diff_id).context("what the layer unpacks to is not what the image's configuration names")?;
    fields.try_for_each(|path| mark_opaque(target, OsStr::from_bytes(path)))
}

/// Writes a layer to the child, and reads it to its end even if the child ends first, so that its digest is known.
fn feed(content: &mut impl Read, stdin: &mut impl io::Write, bar: &Bar) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut child_reads = true;
    loop {
        let count = match content.read(&mut buffer)? {
            0 => return Ok(()),
            count => count,
        };
        bar.advance(count as u64);
        // A child that ended says why on its standard error.
        child_reads = child_reads && stdin.write_all(&buffer[..count]).is_ok();
    }
}

/// The child cannot do this: it has not the privilege. The path is one in a tree that the image made.
fn mark_opaque(target: &Path, path: &OsStr) -> Result<()> {
    let root = File::open(target)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let path = if path.is_empty() { OsStr::new(".") } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let dir = openat2(&root, path, flags, Mode::empty(), resolve)
        .with_context(|| format!("cannot open {}", path.display()))?;
    rustix::fs::fsetxattr(&dir, OPAQUE, b"y", XattrFlags::empty())
        .with_context(|| format!("cannot mark {} as opaque", path.display()))
}

/// Bytes of the files in a layer; a file with several names counts once.
pub(super) fn content_size(dir: &Path) -> u64 {
    let mut seen = std::collections::HashSet::new();
    let mut dirs = vec![dir.to_owned()];
    let mut size = 0;
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                dirs.push(entry.path());
            } else if metadata.is_file() && (metadata.nlink() == 1 || seen.insert(metadata.ino())) {
                size += metadata.len();
            }
        }
    }
    size
}
