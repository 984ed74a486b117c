//! Mounts as a snapshotter describes them: a type, a source, and the options of mount(8) in one list.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount, mount_bind_recursive};

use super::add_flags;

/// Data of a mount is one page with its final zero byte (mount(2)).
const MAX_DATA_LEN: usize = 4095;

/// One mount.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct HostMount {
    /// Type of the file system, or `bind`.
    pub fstype: String,
    /// Device or directory.
    pub source: String,
    /// Where below the root; empty is the root itself.
    pub target: String,
    /// Flags and data of the file system.
    pub options: Vec<String>,
}

impl HostMount {
    /// Mounts it in this thread's namespace.
    pub(super) fn mount_below(&self, root: &Path) -> io::Result<()> {
        let target = root.join(self.target.trim_start_matches('/'));
        let (flags, mut data) = self.flags_and_data();
        if self.is_bind() {
            mount_bind_recursive(self.source.as_str(), &target)?;
            // The mount that binds takes no flags.
            return add_flags(&target, flags);
        }
        if data.iter().map(|option| option.len() + 1).sum::<usize>() > MAX_DATA_LEN && self.fstype == "overlay" {
            std::env::set_current_dir(shorten(&mut data)?)?;
        }
        let data = CString::new(data.join(","))?;
        let flags = flags | MountFlags::NODEV;
        Ok(mount(self.source.as_str(), &target, self.fstype.as_str(), flags, Some(data.as_c_str()))?)
    }

    fn is_bind(&self) -> bool {
        self.fstype == "bind" || self.options.iter().any(|option| option == "bind" || option == "rbind")
    }

    fn flags_and_data(&self) -> (MountFlags, Vec<String>) {
        let mut flags = MountFlags::empty();
        let mut data = Vec::new();
        for option in &self.options {
            match option.as_str() {
                "ro" => flags |= MountFlags::RDONLY,
                "nosuid" => flags |= MountFlags::NOSUID,
                "noexec" => flags |= MountFlags::NOEXEC,
                "noatime" => flags |= MountFlags::NOATIME,
                "nodiratime" => flags |= MountFlags::NODIRATIME,
                "relatime" => flags |= MountFlags::RELATIME,
                "sync" => flags |= MountFlags::SYNCHRONOUS,
                "rw" | "nodev" | "dev" | "suid" | "exec" | "defaults" | "async" => {}
                other => data.push(other.to_owned()),
            }
        }
        (flags, data)
    }
}

/// Makes the lower directories of an overlay relative to one that all are in, and returns that one.
fn shorten(data: &mut [String]) -> io::Result<PathBuf> {
    let is_lower = |option: &&mut String| option.starts_with("lowerdir=");
    let lower = data.iter_mut().find(is_lower).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let paths: Vec<&str> = lower.trim_start_matches("lowerdir=").split(':').collect();
    let mut common = Path::new(paths.first().copied().unwrap_or("/")).parent().unwrap_or(Path::new("/"));
    while !paths.iter().all(|path| Path::new(path).starts_with(common)) {
        common = common.parent().unwrap_or(Path::new("/"));
    }
    let relative = |path: &&str| Path::new(path).strip_prefix(common).unwrap_or(Path::new(path)).display().to_string();
    let (common, short) = (common.to_owned(), paths.iter().map(relative).collect::<Vec<_>>().join(":"));
    *lower = format!("lowerdir={short}");
    Ok(common)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::mount::MountFlags;

    use super::{HostMount, shorten};

    #[test]
    fn flags_are_told_from_data() {
        let options = ["ro", "nosuid", "index=off", "lowerdir=/a:/b"].map(str::to_owned).to_vec();
        let mount = HostMount { fstype: "overlay".to_owned(), options, ..HostMount::default() };
        let (flags, data) = mount.flags_and_data();
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NOSUID);
        assert_eq!(data, ["index=off", "lowerdir=/a:/b"]);
    }

    #[test]
    fn many_layers_become_relative_to_what_they_share() {
        let mut data = ["upperdir=/s/3/fs".to_owned(), "lowerdir=/s/2/fs:/s/1/fs".to_owned()];
        let common = shorten(&mut data).expect("an overlay");
        assert_eq!(common, Path::new("/s"));
        assert_eq!(data[1], "lowerdir=2/fs:1/fs");
        assert_eq!(data[0], "upperdir=/s/3/fs");
    }
}
