//! Copies of small volumes of the host in the guest's memory, so that what watches them by inotify(7) learns of a change, as it would
//! on the host.

use std::collections::HashSet;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::{fs, io};

use agent_api::message::volume_entry::What;
use agent_api::message::{MemoryVolumeRequest, WriteVolumeRequest};

use crate::memory_volume::{self, names, own};
use crate::share::ShareTag;

/// More than the host sends in one message.
const SIZE_BYTES: u64 = 16 << 20;
/// Beside a name that is replaced. The kubelet has the same for `..data`.
const TEMPORARY: &str = "_tmp";

/// Makes the volume as the request says. Links come after what they lead to, and what is not wanted any more goes last, so that the swap
/// of a link is a swap of everything behind it.
pub(crate) fn write(volume: &ShareTag, request: &WriteVolumeRequest) -> io::Result<()> {
    let size = MemoryVolumeRequest { size_bytes: SIZE_BYTES, root: request.root.clone(), ..Default::default() };
    memory_volume::add(volume, &size)?;
    let root = volume.path();
    let mut wanted = HashSet::new();
    for entry in &request.entries {
        let path = below(&root, &entry.path)?;
        match &entry.what {
            Some(What::Folder(_)) => put_folder(&path)?,
            Some(What::File(bytes)) => put_file(&path, bytes)?,
            _ => continue,
        }
        own(&path, &entry.ownership)?;
        wanted.insert(path);
    }
    for entry in &request.entries {
        if let Some(What::Link(target)) = &entry.what {
            let path = below(&root, &entry.path)?;
            put_link(&path, target)?;
            wanted.insert(path);
        }
    }
    remove_others(&root, &wanted)
}

fn below(root: &Path, path: &str) -> io::Result<PathBuf> {
    Ok(names(path)?.into_iter().fold(root.to_owned(), |path, name| path.join(name)))
}

fn put_folder(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => fs::remove_file(path)?,
        Err(_) => {}
    }
    fs::create_dir(path)
}

fn put_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() && fs::read(path)? == bytes => Ok(()),
        Ok(found) if found.is_dir() => {
            fs::remove_dir_all(path)?;
            fs::write(path, bytes)
        }
        // A reader has the old one or the new one, and neither in part.
        Ok(_) => {
            let temporary = beside(path)?;
            fs::write(&temporary, bytes)?;
            fs::rename(temporary, path)
        }
        Err(_) => fs::write(path, bytes),
    }
}

fn put_link(path: &Path, target: &str) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_symlink() && fs::read_link(path)? == Path::new(target) => Ok(()),
        Ok(found) if found.is_dir() => {
            fs::remove_dir_all(path)?;
            symlink(target, path)
        }
        Ok(_) => {
            let temporary = beside(path)?;
            symlink(target, &temporary)?;
            fs::rename(temporary, path)
        }
        Err(_) => symlink(target, path),
    }
}

/// A free name beside a path. What has it is of a write that failed, or of the kubelet in the middle of a swap.
fn beside(path: &Path) -> io::Result<PathBuf> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(TEMPORARY);
    let path = path.with_file_name(name);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(path),
    }
}

fn remove_others(folder: &Path, wanted: &HashSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (path, is_dir) = (entry.path(), entry.file_type()?.is_dir());
        match (wanted.contains(&path), is_dir) {
            (true, true) => remove_others(&path, wanted)?,
            (true, false) => {}
            (false, true) => fs::remove_dir_all(path)?,
            (false, false) => fs::remove_file(path)?,
        }
    }
    Ok(())
}
