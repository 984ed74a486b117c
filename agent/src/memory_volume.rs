//! File systems in the guest's memory, beside the shares: for volumes that are memory on the host too. They last as long as the VM.

use std::ffi::CString;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::{fs, io};

use agent_api::message::{MemoryVolumeRequest, Ownership};
use rustix::mount::{MountFlags, mount};

use crate::share::ShareTag;

/// Makes the volume and the folder, where they are not there yet.
pub(crate) fn add(volume: &ShareTag, request: &MemoryVolumeRequest) -> io::Result<()> {
    let root = volume.path();
    if !root.exists() {
        create(&root, request)?;
    }
    let mut path = root;
    for name in names(&request.folder)? {
        path.push(name);
        match fs::symlink_metadata(&path) {
            // Of a container, and it may lead to what is the guest's own.
            Ok(found) if found.is_symlink() => {
                return Err(io::Error::other(format!("{} is a symbolic link", path.display())));
            }
            // It may be a file: a path in a volume need not be a folder's.
            Ok(_) => {}
            Err(_) => {
                fs::create_dir(&path)?;
                own(&path, &request.folder_ownership)?;
            }
        }
    }
    Ok(())
}

fn create(root: &Path, request: &MemoryVolumeRequest) -> io::Result<()> {
    fs::create_dir_all(root)?;
    let flags = MountFlags::NODEV | MountFlags::NOSUID;
    let size = if request.size_bytes == 0 { "50%".to_owned() } else { bounded(request.size_bytes).to_string() };
    let mounted = CString::new(format!("size={size}"))
        .map_err(io::Error::from)
        .and_then(|options| Ok(mount("memory", root, "tmpfs", flags, Some(options.as_c_str()))?));
    if let Err(error) = mounted {
        // Whoever asks again must not find a folder of the guest's root.
        fs::remove_dir(root)?;
        return Err(error);
    }
    own(root, &request.root)
}

/// A file system that is larger than the memory would be the end of the guest, not of whoever fills it.
fn bounded(size_bytes: u64) -> u64 {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit.max(1));
    let memory_bytes = info.totalram.saturating_mul(unit);
    size_bytes.min(memory_bytes)
}

pub(crate) fn own(path: &Path, ownership: &Ownership) -> io::Result<()> {
    std::os::unix::fs::chown(path, Some(ownership.uid), Some(ownership.gid))?;
    fs::set_permissions(path, fs::Permissions::from_mode(ownership.mode & 0o7777))
}

/// The parts of a path that stays below where it begins.
pub(crate) fn names(folder: &str) -> io::Result<Vec<PathBuf>> {
    let name = |component| match component {
        Component::Normal(name) => Ok(PathBuf::from(name)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{folder:?} is not a folder of a volume"))),
    };
    Path::new(folder).components().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn a_folder_is_below_its_volume() {
        assert_eq!(names("a/b").expect("below").len(), 2);
        assert_eq!(names("").expect("the root").len(), 0);
        names("../a").expect_err("a way out");
        names("/a").expect_err("of the guest");
    }
}
