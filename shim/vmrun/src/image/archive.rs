//! Tar archives of images, read in place: an index of what is where, and nothing is unpacked. A compressed archive is first
//! expanded into a file without a name.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use tar::Archive;

use super::blob::Section;

/// Most files of an archive. An image has a few for each layer.
const MAX_MEMBERS: usize = 100_000;

/// An archive and what it holds.
pub(super) struct ArchiveFile {
    shown: PathBuf,
    file: Arc<File>,
    members: HashMap<PathBuf, Member>,
}

enum Member {
    File {
        start: u64,
        len: u64,
    },
    /// `docker save` wrote a layer once and links to it.
    Link(PathBuf),
}

impl ArchiveFile {
    /// Opens an archive; `temporary` is where it is expanded.
    pub(super) fn open(path: &Path, temporary: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        if !file.metadata()?.is_file() {
            bail!("{} is not a file", path.display());
        }
        Self::read(file, path, temporary)
    }

    /// Reads an archive from a pipe.
    pub(super) fn copy_from(mut input: impl Read, temporary: &Path) -> Result<Self> {
        let mut file = unnamed_file(temporary)?;
        io::copy(&mut input, &mut file).context("cannot keep what standard input brought")?;
        Self::read(file, Path::new("standard input"), temporary)
    }

    fn read(mut file: File, shown: &Path, temporary: &Path) -> Result<Self> {
        let file =
            expand(&mut file, temporary).with_context(|| format!("cannot expand {}", shown.display()))?.unwrap_or(file);
        let file = Arc::new(file);
        let members = index(&file).with_context(|| format!("{} is not a complete tar archive", shown.display()))?;
        Ok(Self { shown: shown.to_owned(), file, members })
    }

    /// The content of a file in the archive.
    pub(super) fn member(&self, name: &str) -> Result<Section> {
        let mut path = normal(Path::new(name));
        if let Some(Member::Link(target)) = self.members.get(&path) {
            path = target.clone();
        }
        match self.members.get(&path) {
            Some(Member::File { start, len }) => Ok(Section::new(self.file.clone(), *start, *len)),
            _ => bail!("{} has no file {name:?}", self.shown.display()),
        }
    }

    /// Whether a file is in the archive.
    pub(super) fn has(&self, name: &str) -> bool {
        self.members.contains_key(Path::new(name))
    }
}

/// A file that is gone when it is closed, however that happens.
fn unnamed_file(folder: &Path) -> Result<File> {
    tempfile::tempfile_in(folder).with_context(|| format!("cannot make a file in {}", folder.display()))
}

fn expand(file: &mut File, temporary: &Path) -> Result<Option<File>> {
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(0))?;
    let count = file.read(&mut magic)?;
    file.seek(SeekFrom::Start(0))?;
    let mut expanded = match &magic[..count] {
        [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd] => unnamed_file(temporary)?,
        _ => return Ok(None),
    };
    if magic[0] == 0x1f {
        io::copy(&mut flate2::bufread::MultiGzDecoder::new(io::BufReader::new(file)), &mut expanded)?;
    } else {
        io::copy(&mut zstd::Decoder::new(file)?, &mut expanded)?;
    }
    expanded.seek(SeekFrom::Start(0))?;
    Ok(Some(expanded))
}

fn index(file: &File) -> Result<HashMap<PathBuf, Member>> {
    let len = file.metadata()?.len();
    let mut members = HashMap::new();
    let mut archive = Archive::new(file);
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        if members.len() == MAX_MEMBERS {
            bail!("it has more than {MAX_MEMBERS} files");
        }
        let path = normal(&entry.path()?);
        let kind = entry.header().entry_type();
        if kind.is_file() || kind.is_contiguous() {
            let (start, size) = (entry.raw_file_position(), entry.size());
            if start.checked_add(size).is_none_or(|end| end > len) {
                bail!("it ends within {}: it was cut off", path.display());
            }
            members.insert(path, Member::File { start, len: size });
        } else if kind.is_symlink() || kind.is_hard_link() {
            let link = entry.link_name()?.context("a link to nothing")?;
            let base = if kind.is_symlink() { path.parent().unwrap_or(Path::new("")) } else { Path::new("") };
            members.insert(path.clone(), Member::Link(normal(&base.join(link))));
        }
    }
    if members.is_empty() {
        bail!("it has no files");
    }
    Ok(members)
}

/// A path without `.` and `..`; it names a member of an archive, never a file of the host.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => normal.push(part),
            Component::ParentDir => drop(normal.pop()),
            _ => {}
        }
    }
    normal
}

#[cfg(test)]
mod tests;
