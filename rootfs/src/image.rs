//! The image: an EROFS file system, made by `mkfs.erofs` from a folder that this module fills. Called once by main.
//!
//! The VMM maps it into the VM as persistent memory and the guest executes the agent in place (DAX), so the image is a
//! multiple of what such memory is mapped by, and the agent lies in it as it is: whole blocks, not compressed.
//! It holds nothing of the machine that built it: no time, no owner, no order of a real directory.

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::NamedTempFile;
use thiserror::Error;

use crate::manifest::{Entry, Kind};

/// Size of a block of the file system, and of a page of the guest.
const BLOCK: usize = 4096;
/// Linux maps persistent memory by subsections of this size (`PAGES_PER_SUBSECTION`).
const SUBSECTION: u64 = 2 << 20;
/// The identity of the file system, which would be a random number.
const UUID: &str = "766d7275-6e00-4000-8000-726f6f746673";

/// Why no image was made. The file at the output path is then what it was before.
#[derive(Debug, Error)]
pub(crate) enum ImageError {
    #[error("cannot put {path} into the folder that becomes the image; check that there is space in TMPDIR")]
    Stage { path: &'static str, source: io::Error },
    #[error("cannot run mkfs.erofs; install the package erofs-utils")]
    NoProgram(#[source] io::Error),
    #[error("mkfs.erofs failed: {0}")]
    Program(String),
    #[error("cannot write the image to {path}; check that its folder exists, is writable and has space")]
    Write { path: PathBuf, source: io::Error },
}

/// Puts an image of `entries`, with `agent` as content where the table says so, at `path`: whoever looks sees the old file
/// or the whole new one.
pub(crate) fn build(entries: &[Entry], agent: &[u8], path: &Path) -> Result<(), ImageError> {
    let write = |source| ImageError::Write { path: path.to_owned(), source };
    let staged = stage(entries, agent)?;
    let image = temporary_beside(path).map_err(write)?;
    make(staged.path(), image.path())?;
    finish(image, path).map_err(write)
}

/// A folder that looks like the root of the guest.
fn stage(entries: &[Entry], agent: &[u8]) -> Result<tempfile::TempDir, ImageError> {
    let folder = tempfile::tempdir().map_err(|source| ImageError::Stage { path: "/", source })?;
    for entry in entries {
        let path = folder.path().join(entry.path);
        let made = match entry.kind {
            Kind::Directory => fs::create_dir(&path),
            Kind::Agent => write_whole_blocks(&path, agent),
        };
        made.and_then(|()| fs::set_permissions(&path, Permissions::from_mode(entry.permissions)))
            .map_err(|source| ImageError::Stage { path: entry.path, source })?;
    }
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755))
        .map_err(|source| ImageError::Stage { path: "/", source })?;
    Ok(folder)
}

/// Zeros behind the end of a program are not part of it. Without them EROFS puts the last bytes beside the inode, and Linux
/// does not execute such a file in place.
fn write_whole_blocks(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::write(path, bytes)?;
    OpenOptions::new().write(true).open(path)?.set_len(bytes.len().next_multiple_of(BLOCK) as u64)
}

fn make(folder: &Path, image: &Path) -> Result<(), ImageError> {
    let mut command = Command::new("mkfs.erofs");
    command.args(["--quiet", "-T0", "--all-root", "-x-1", "-U", UUID]).arg(image).arg(folder);
    let output = command.output().map_err(ImageError::NoProgram)?;
    if output.status.success() {
        return Ok(());
    }
    Err(ImageError::Program(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())))
}

/// Beside the target, because a rename does not cross file systems. Removed by its guard when a step fails.
fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    tempfile::Builder::new().prefix(".rootfs-").tempfile_in(folder)
}

fn finish(image: NamedTempFile, path: &Path) -> io::Result<()> {
    let file = image.as_file();
    file.set_len(file.metadata()?.len().next_multiple_of(SUBSECTION))?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.sync_all()?;
    image.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::ENTRIES;

    fn image(agent: &[u8]) -> Vec<u8> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("image");
        build(ENTRIES, agent, &path).expect("it builds");
        assert_eq!(fs::read_dir(folder.path()).expect("it is there").count(), 1, "nothing else is left");
        fs::read(path).expect("it is there")
    }

    #[test]
    fn same_agent_gives_same_bytes() {
        assert_eq!(image(b"agent"), image(b"agent"));
    }

    #[test]
    fn the_agent_can_be_executed_in_place() {
        let agent: Vec<u8> = (0..3 * BLOCK + 5).map(|at| u8::try_from(at * 31 % 251).expect("small")).collect();
        let image = image(&agent);
        assert_eq!(image.len() as u64 % SUBSECTION, 0);
        assert_eq!(image[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes(), "the magic number of EROFS");
        let block = image.chunks(BLOCK).position(|block| block == &agent[..BLOCK]).expect("it begins a block");
        assert_eq!(image[block * BLOCK..][..agent.len()], agent);
    }

    #[test]
    fn the_mount_points_of_the_agent_are_there() {
        let staged = stage(ENTRIES, b"agent").expect("staged");
        let mode = |path| fs::metadata(staged.path().join(path)).expect("it is there").permissions().mode() & 0o7777;
        assert_eq!(["dev", "newroot", "init"].map(mode), [0o755; 3]);
    }

    #[test]
    fn names_the_output_that_cannot_be_written() {
        let error = build(ENTRIES, b"agent", Path::new("/nonexistent/image")).expect_err("the folder is missing");
        assert!(error.to_string().contains("/nonexistent/image"), "{error}");
    }
}
