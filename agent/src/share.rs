//! Virtio-fs shares, mounted at `SHARE_DIR/TAG`.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use agent_api::SHARE_DIR;
use agent_api::message::ShareRequest;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::hotplug;

/// A tag that is also one safe path component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShareTag(String);

/// Time for a device to come that the host has plugged in.
const DEVICE_DEADLINE: Duration = Duration::from_secs(5);

/// Longest tag of a device (VIRTIO 1.2, 5.11.4).
const MAX_TAG_LEN: usize = 36;

impl TryFrom<&str> for ShareTag {
    type Error = String;

    fn try_from(tag: &str) -> Result<Self, String> {
        let plain = tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if tag.is_empty() || tag.len() > MAX_TAG_LEN || !plain || tag.starts_with('.') {
            return Err(format!("{tag:?} is not a share tag"));
        }
        Ok(Self(tag.to_owned()))
    }
}

impl ShareTag {
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(SHARE_DIR).join(&self.0)
    }

    pub(crate) fn mount(&self, request: &ShareRequest) -> io::Result<()> {
        let flags = if request.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
        fs::create_dir_all(self.path())?;
        mount(self.0.as_str(), self.path(), "virtiofs", flags, None)?;
        match request.readahead_kib {
            0 => Ok(()),
            kib => self.set_readahead(kib).inspect_err(|_| {
                // The first error is the one to tell.
                let _ = unmount(self.path(), UnmountFlags::DETACH);
            }),
        }
    }

    /// For files that are opened from now on.
    fn set_readahead(&self, kib: u32) -> io::Result<()> {
        // Answered after the device's first answer, with which the kernel lowers the readahead to what it was at the mount.
        let device = fs::metadata(self.path())?.dev();
        let name = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        fs::write(Path::new("/sys/class/bdi").join(name).join("read_ahead_kb"), kib.to_string())
    }

    /// Mounts a share whose device may not have been seen yet: looks at the PCI bus again, and tries at each event of the
    /// kernel until the device is there.
    pub(crate) async fn plug_in(&self, request: &ShareRequest) -> io::Result<()> {
        // Before the look at the bus, so that no event is missed.
        let events = hotplug::device_events()?;
        match self.mount(request) {
            Err(error) if is_no_such_device(&error) => hotplug::rescan_pci()?,
            done => return done,
        }
        let mounted = async {
            loop {
                match self.mount(request) {
                    Err(error) if is_no_such_device(&error) => hotplug::next_event(&events).await?,
                    done => return done,
                }
            }
        };
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no device for {} came in 5000 ms", self.0));
        tokio::time::timeout(DEVICE_DEADLINE, mounted).await.unwrap_or_else(|_| Err(late()))
    }

    /// Unmounts the share and lets go of its device.
    pub(crate) fn pull_out(&self) -> io::Result<()> {
        unmount(self.path(), UnmountFlags::empty())?;
        fs::remove_dir(self.path())?;
        match self.pci_device()? {
            Some(device) => fs::write(device.join("remove"), "1"),
            None => Ok(()),
        }
    }

    /// The PCI device of the tag: the kernel lists the file systems by number, each with its tag and its virtio device.
    fn pci_device(&self) -> io::Result<Option<PathBuf>> {
        for entry in fs::read_dir("/sys/fs/virtiofs")?.flatten() {
            let tag = fs::read_to_string(entry.path().join("tag")).unwrap_or_default();
            if tag.trim_end_matches('\n') == self.0 {
                let virtio = fs::canonicalize(entry.path().join("device"))?;
                return Ok(virtio.parent().map(PathBuf::from));
            }
        }
        Ok(None)
    }
}

/// virtiofs says EINVAL for a tag that no device has.
fn is_no_such_device(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_tag_that_leaves_the_share_folder() {
        assert!(ShareTag::try_from("../etc").is_err());
        assert!(ShareTag::try_from("..").is_err());
        assert!(ShareTag::try_from("").is_err());
    }

    #[test]
    fn accepts_plain_tag() {
        assert_eq!(ShareTag::try_from("rootfs-0"), Ok(ShareTag("rootfs-0".to_owned())));
    }
}
