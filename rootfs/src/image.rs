//! The initramfs: a "newc" archive, which the kernel's populate_rootfs() unpacks. Called once by main.
//!
//! It holds nothing of the machine that built it: no time, no owner, no inode number of a real file, no order of a real
//! directory. It is not compressed: the kernel then needs no decompressor, and unpacking is one copy.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};
use thiserror::Error;

use crate::manifest::{Entry, Kind};

/// Why no image was made. The file at the output path is then what it was before.
#[derive(Debug, Error)]
pub(crate) enum ImageError {
    #[error("the agent has {len} bytes and the archive format ends at 4 GiB; build it in release mode and strip it")]
    AgentTooLarge { len: usize },
    #[error("cannot pack {path} into the image")]
    Pack { path: &'static str, source: io::Error },
    #[error("cannot write the image to {path}; check that its folder exists, is writable and has space")]
    Write { path: PathBuf, source: io::Error },
}

/// The bytes of an image that holds `entries`, with `agent` as content where the table says so.
pub(crate) fn build(entries: &[Entry], agent: &[u8]) -> Result<Vec<u8>, ImageError> {
    // The archive is held in memory on purpose: it is a few MiB, and it must be complete before it is put into place.
    let mut archive = Vec::with_capacity(agent.len() + 4096);
    for (inode, entry) in (1..).zip(entries) {
        let content = if matches!(entry.kind, Kind::Agent) { agent } else { &[] };
        let len = u32::try_from(content.len()).map_err(|_| ImageError::AgentTooLarge { len: content.len() })?;
        // Pads header and content to four bytes, as the kernel expects of every member.
        let mut member = header(entry, inode).write(&mut archive, len);
        member
            .write_all(content)
            .and_then(|()| member.finish())
            .map_err(|source| ImageError::Pack { path: entry.path, source })?;
    }
    trailer(&mut archive).map_err(|source| ImageError::Pack { path: "the end mark", source })?;
    Ok(archive)
}

/// Puts an image into place: whoever looks sees the old file or the whole new one.
pub(crate) fn write(path: &Path, image: &[u8]) -> Result<(), ImageError> {
    write_and_rename(path, image).map_err(|source| ImageError::Write { path: path.to_owned(), source })
}

fn write_and_rename(path: &Path, image: &[u8]) -> io::Result<()> {
    // Beside the target, because a rename does not cross file systems. Removed by its guard when a step fails.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary = tempfile::Builder::new().prefix(".rootfs-").tempfile_in(folder)?;
    temporary.write_all(image)?;
    temporary.as_file().set_permissions(Permissions::from_mode(0o644))?;
    temporary.as_file().sync_all()?;
    temporary.persist(path)?;
    Ok(())
}

fn header(entry: &Entry, inode: u32) -> Builder {
    // A link count of 1 for files: the kernel would take members with equal inodes and more links for one file.
    let header = Builder::new(entry.path).ino(inode).mode(entry.permissions);
    match entry.kind {
        Kind::Directory => header.set_mode_file_type(ModeFileType::Directory).nlink(2),
        Kind::Agent => header.set_mode_file_type(ModeFileType::Regular).nlink(1),
        Kind::Device { major, minor } => {
            header.set_mode_file_type(ModeFileType::Char).nlink(1).rdev_major(major).rdev_minor(minor)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use cpio::NewcReader;

    use super::*;
    use crate::manifest::ENTRIES;

    /// Each member as `mode uid mtime size path`.
    fn listing(archive: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        let mut rest = archive;
        loop {
            let member = NewcReader::new(rest).expect("the archive is well formed");
            let entry = member.entry();
            if entry.is_trailer() {
                return lines;
            }
            let line = format!("{:o} {} {}", entry.mode(), entry.uid() + entry.gid(), entry.mtime());
            lines.push(format!("{line} {} {}", entry.file_size(), entry.name()));
            rest = member.finish().expect("the member is complete");
        }
    }

    #[test]
    fn same_agent_gives_same_bytes() {
        let first = build(ENTRIES, b"agent").expect("it builds");
        let second = build(ENTRIES, b"agent").expect("it builds");
        assert_eq!(first, second);
    }

    #[test]
    fn holds_the_agent_the_console_and_mount_points() {
        let archive = build(ENTRIES, b"agent").expect("it builds");
        let expected = [
            "40755 0 0 0 dev",
            "20600 0 0 0 dev/console",
            "40555 0 0 0 proc",
            "40755 0 0 0 run",
            "40555 0 0 0 sys",
            "41777 0 0 0 tmp",
            "100755 0 0 5 init",
        ];
        assert_eq!(listing(&archive), expected);
    }

    #[test]
    fn console_is_device_5_1() {
        let archive = build(&ENTRIES[1..2], b"").expect("it builds");
        let member = NewcReader::new(&archive[..]).expect("the archive is well formed");
        assert_eq!((member.entry().rdev_major(), member.entry().rdev_minor()), (5, 1));
    }

    #[test]
    fn inodes_differ() {
        let first = header(&ENTRIES[0], 1).write(Vec::new(), 0).finish().expect("memory takes it");
        let second = header(&ENTRIES[0], 2).write(Vec::new(), 0).finish().expect("memory takes it");
        assert_ne!(first, second);
    }

    #[test]
    fn is_padded_to_four_bytes_whatever_the_agent_is() {
        let lengths = [0, 1, 2, 3].map(|len| build(ENTRIES, &vec![7; len]).expect("it builds").len() % 4);
        assert_eq!(lengths, [0; 4]);
    }

    #[test]
    fn replaces_the_output_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let output = folder.path().join("image");
        fs::write(&output, "old").expect("it is writable");
        write(&output, b"new").expect("it is replaced");
        assert_eq!(fs::read(&output).expect("it is there"), b"new");
        assert_eq!(fs::read_dir(folder.path()).expect("it is there").count(), 1);
    }

    #[test]
    fn names_the_output_that_cannot_be_written() {
        let error = write(Path::new("/nonexistent/image"), b"new").expect_err("the folder is missing");
        assert!(error.to_string().contains("/nonexistent/image"), "{error}");
    }
}
