//! An empty root. All that is in it is `/proc/self/fd`, by which virtiofsd opens again what it holds; it shows only our own
//! descriptors, and no way leads up from it.

use std::fs::create_dir;
use std::os::fd::OwnedFd;

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount, mount_bind, mount_change, mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};

use super::{JailError, check, refused};

/// Any folder that every host has; it is covered in our mount namespace only.
const NEW_ROOT: &str = "/dev";
const BARE: MountFlags = MountFlags::NODEV.union(MountFlags::NOSUID).union(MountFlags::NOEXEC);

/// Replaces the root by one that can be neither written to nor left.
pub(super) fn replace() -> Result<(), JailError> {
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(refused("keep mounts from the host"))?;
    mount("vmm", NEW_ROOT, "tmpfs", BARE, Some(c"mode=555,size=64k,nr_inodes=8")).map_err(refused("mount a root"))?;
    for folder in ["/proc", "/proc/self", "/proc/self/fd"] {
        create_dir(format!("{NEW_ROOT}{folder}")).map_err(refused("make folders in the root"))?;
    }
    mount_bind("/proc/self/fd", format!("{NEW_ROOT}/proc/self/fd")).map_err(refused("mount /proc/self/fd"))?;
    chdir(NEW_ROOT).map_err(refused("enter the root"))?;
    pivot_root(".", ".").map_err(refused("change the root"))?;
    // The old root lies on top of the new one until then.
    unmount(".", UnmountFlags::DETACH).map_err(refused("leave the old root"))?;
    chdir("/").map_err(refused("enter the root"))?;
    for mount_point in ["/proc/self/fd", "/"] {
        mount_remount(mount_point, MountFlags::BIND | MountFlags::RDONLY | BARE, "")
            .map_err(refused("make the root read-only"))?;
        let flags = statvfs(mount_point).map_err(refused("read the flags of the root"))?.f_flag;
        let wanted = StatVfsMountFlags::RDONLY | StatVfsMountFlags::NODEV | StatVfsMountFlags::NOSUID;
        check("making the root read-only", flags.contains(wanted | StatVfsMountFlags::NOEXEC))?;
    }
    let entries = std::fs::read_dir("/").map_err(refused("list the root"))?;
    check("changing the root", entries.flatten().map(|entry| entry.file_name()).eq(["proc"]))
}

/// A tmpfs that is mounted nowhere, as large as its files, which have large pages where they are asked for.
///
/// # Errors
/// When the kernel refuses.
pub fn mount_for_ram() -> Result<OwnedFd, JailError> {
    let step = "make a file system for guest RAM";
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(refused(step))?;
    fsconfig_set_string(&tmpfs, "size", "0").map_err(refused(step))?;
    // A kernel without large pages refuses.
    let _ = fsconfig_set_string(&tmpfs, "huge", "advise");
    fsconfig_create(&tmpfs).map_err(refused(step))?;
    let bare = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, bare).map_err(refused(step))
}
