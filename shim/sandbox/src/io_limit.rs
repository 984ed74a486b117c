//! Limits on what a VM reads from disks of the host and writes to them, as cgroup v2 has them in `io.max`. Finds the disks and
//! says what is to be written; `cgroup.rs` writes it.

use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, major, minor, stat};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A link for each block device, named by its numbers, to the folder that has its name.
const BLOCK_DEVICES: &str = "/sys/dev/block";

/// Why a disk has no limits.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The path leads to nothing.
    #[error("cannot look at {}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is no block device", path.display())]
    NotABlockDevice {
        /// The path.
        path: PathBuf,
    },
    /// The kernel has no such device.
    #[error("the host has no block device {major}:{minor}")]
    Missing {
        /// Its numbers.
        major: u32,
        /// The second one.
        minor: u32,
    },
    /// The kernel limits whole disks.
    #[error("{} is a partition, and the kernel limits whole disks: name {}", device.display(), disk.display())]
    Partition {
        /// What was named.
        device: PathBuf,
        /// What it is a part of.
        disk: PathBuf,
    },
}

/// A whole disk of the host.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Disk {
    /// Where the host has it.
    pub path: PathBuf,
    major: u32,
    minor: u32,
}

impl Disk {
    /// The disk at a path, which may be a link.
    ///
    /// # Errors
    /// Each variant of [`DiskError`].
    pub fn at(path: &Path) -> Result<Self, DiskError> {
        let found = stat(path).map_err(|error| DiskError::Open { path: path.to_owned(), source: error.into() })?;
        if FileType::from_raw_mode(found.st_mode) != FileType::BlockDevice {
            return Err(DiskError::NotABlockDevice { path: path.to_owned() });
        }
        Self::of(major(found.st_rdev), minor(found.st_rdev))
    }

    /// The disk that has these numbers.
    ///
    /// # Errors
    /// [`DiskError::Missing`] and [`DiskError::Partition`].
    pub fn of(major: u32, minor: u32) -> Result<Self, DiskError> {
        Self::find(Path::new(BLOCK_DEVICES), major, minor)
    }

    fn find(block_devices: &Path, major: u32, minor: u32) -> Result<Self, DiskError> {
        let link = block_devices.join(format!("{major}:{minor}"));
        let folder = link.read_link().ok();
        let path = folder.as_deref().and_then(device_path).ok_or(DiskError::Missing { major, minor })?;
        if link.join("partition").exists() {
            // The folder of a partition is in that of its disk.
            let disk = folder.as_deref().and_then(Path::parent).and_then(device_path).unwrap_or_default();
            return Err(DiskError::Partition { device: path, disk });
        }
        Ok(Self { path, major, minor })
    }
}

/// The path of the device that has a folder in sysfs, where a slash of its name is an exclamation mark.
fn device_path(folder: &Path) -> Option<PathBuf> {
    Some(Path::new("/dev").join(folder.file_name()?.to_str()?.replace('!', "/")))
}

/// What is limited, a second.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoKind {
    /// Bytes read.
    ReadBps,
    /// Bytes written.
    WriteBps,
    /// Requests to read.
    ReadIops,
    /// Requests to write.
    WriteIops,
}

impl IoKind {
    fn key(self) -> &'static str {
        match self {
            Self::ReadBps => "rbps",
            Self::WriteBps => "wbps",
            Self::ReadIops => "riops",
            Self::WriteIops => "wiops",
        }
    }
}

/// A limit of one kind on one disk.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct IoLimit {
    /// Which disk.
    pub disk: Disk,
    /// Of what.
    pub kind: IoKind,
    /// How much a second.
    pub rate: NonZeroU64,
}

impl IoLimit {
    /// What is written to `io.max`: it changes this limit and leaves the others.
    #[must_use]
    pub fn line(&self) -> String {
        let (Disk { major, minor, .. }, key, rate) = (&self.disk, self.kind.key(), self.rate);
        format!("{major}:{minor} {key}={rate}")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::num::NonZeroU64;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::{Disk, DiskError, IoKind, IoLimit};

    /// A sysfs with a disk 8:0, its partition 8:1, and a disk 104:0 whose name has a slash.
    fn sysfs() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temporary directory");
        for (numbers, folder) in [("8:0", "sda"), ("8:1", "sda/sda1"), ("104:0", "cciss!c0d0")] {
            fs::create_dir_all(dir.path().join("devices").join(folder)).expect("folders");
            symlink(Path::new("devices").join(folder), dir.path().join(numbers)).expect("a link");
        }
        fs::write(dir.path().join("devices/sda/sda1/partition"), "1\n").expect("written");
        dir
    }

    #[test]
    fn a_disk_has_the_name_that_the_kernel_gives_it() {
        let dir = sysfs();
        let path = |major| Disk::find(dir.path(), major, 0).expect("a disk").path;
        assert_eq!(path(8), Path::new("/dev/sda"));
        assert_eq!(path(104), Path::new("/dev/cciss/c0d0"));
    }

    #[test]
    fn a_partition_is_refused_with_the_name_of_its_disk() {
        let refused = Disk::find(sysfs().path(), 8, 1).expect_err("a partition").to_string();
        assert_eq!(refused, "/dev/sda1 is a partition, and the kernel limits whole disks: name /dev/sda");
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        assert!(matches!(Disk::find(sysfs().path(), 9, 0), Err(DiskError::Missing { major: 9, minor: 0 })));
        assert!(matches!(Disk::at(Path::new("/dev/null")), Err(DiskError::NotABlockDevice { .. })));
        assert!(matches!(Disk::at(Path::new("/does/not/exist")), Err(DiskError::Open { .. })));
    }

    #[test]
    fn a_limit_is_a_line_of_io_max() {
        let disk = Disk::find(sysfs().path(), 8, 0).expect("a disk");
        let line = |kind| IoLimit { disk: disk.clone(), kind, rate: NonZeroU64::MIN }.line();
        let kinds = [IoKind::ReadBps, IoKind::WriteBps, IoKind::ReadIops, IoKind::WriteIops];
        assert_eq!(kinds.map(line), ["8:0 rbps=1", "8:0 wbps=1", "8:0 riops=1", "8:0 wiops=1"]);
    }
}
