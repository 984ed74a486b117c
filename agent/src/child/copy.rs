//! Steps that enter a container's root and pack or unpack a tar archive there. Whatever the archive or the container's files
//! are, nothing outside of the container can be reached.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::FIRST_FD;
use crate::sys;

/// Prints `folder`, `file` or `none`.
pub(super) fn stat_path(pid: &str, path: &str) -> Result<()> {
    enter(pid)?;
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => print!("folder"),
        Ok(_) => print!("file"),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => print!("none"),
        Err(error) => return Err(error).with_context(|| format!("cannot look at {path}")),
    }
    Ok(())
}

/// Packs a path under another name.
pub(super) fn copy_out(pid: &str, path: &str, name: &str) -> Result<()> {
    let stream = File::from(sys::take_fd(FIRST_FD));
    enter(pid)?;
    let mut archive = tar::Builder::new(BufWriter::new(stream));
    archive.follow_symlinks(false);
    // With a slash behind it, a link is the folder that it leads to.
    let source = if path.ends_with('/') || name == "." { fs::canonicalize(path) } else { Ok(PathBuf::from(path)) };
    let source = source.with_context(|| format!("cannot read {path}"))?;
    pack(&mut archive, &source, Path::new(name)).with_context(|| format!("cannot copy {path}"))?;
    archive.into_inner()?.flush()?;
    Ok(())
}

fn pack(archive: &mut tar::Builder<impl io::Write>, source: &Path, name: &Path) -> Result<()> {
    // A stack, because folders may be nested without end.
    let mut waiting = vec![(source.to_owned(), name.to_owned())];
    while let Some((source, name)) = waiting.pop() {
        let shown = || source.display().to_string();
        let kind = fs::symlink_metadata(&source).with_context(shown)?.file_type();
        if kind.is_socket() {
            // An archive has no kind for it; tar(1) leaves sockets out as well.
            continue;
        }
        archive.append_path_with_name(&source, &name).with_context(shown)?;
        if kind.is_dir() {
            for entry in fs::read_dir(&source).with_context(shown)? {
                let entry = entry.with_context(shown)?;
                waiting.push((entry.path(), name.join(entry.file_name())));
            }
        }
    }
    Ok(())
}

/// Unpacks into a folder that is there.
pub(super) fn copy_in(pid: &str, path: &str) -> Result<()> {
    let mut stream = BufReader::new(File::from(sys::take_fd(FIRST_FD)));
    enter(pid)?;
    anyhow::ensure!(fs::metadata(path).is_ok_and(|metadata| metadata.is_dir()), "{path} is not a folder");
    let mut archive = tar::Archive::new(&mut stream);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.unpack(path).with_context(|| format!("cannot copy to {path}"))?;
    // What follows the end of the archive, so that its writer is not cut off.
    io::copy(&mut stream.by_ref().take(1 << 20), &mut io::sink())?;
    Ok(())
}

/// Makes the root of a process ours, in its mount namespace.
fn enter(pid: &str) -> Result<()> {
    let open = |file: &str| File::open(format!("/proc/{pid}/{file}"));
    let enter = || -> io::Result<()> {
        let (root, mounts) = (open("root")?, open("ns/mnt")?);
        move_into_link_name_space(mounts.as_fd(), Some(LinkNameSpaceType::Mount))?;
        rustix::process::fchdir(&root)?;
        rustix::process::chroot(".")?;
        std::env::set_current_dir("/")
    };
    enter().context("cannot enter the container")
}
