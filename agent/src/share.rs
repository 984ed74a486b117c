//! Virtio-fs shares, mounted at `SHARE_DIR/TAG`.

use std::path::PathBuf;
use std::{fs, io};

use agent_api::SHARE_DIR;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A tag that is also one safe path component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShareTag(String);

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
    fn path(&self) -> PathBuf {
        PathBuf::from(SHARE_DIR).join(&self.0)
    }

    pub(crate) fn mount(&self, read_only: bool) -> io::Result<()> {
        let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
        fs::create_dir_all(self.path())?;
        Ok(mount(self.0.as_str(), self.path(), "virtiofs", flags, None)?)
    }

    pub(crate) fn unmount(&self) -> io::Result<()> {
        unmount(self.path(), UnmountFlags::empty())?;
        fs::remove_dir(self.path())
    }
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
