//! First steps of the guest: leaves its image for a tmpfs root, mounts the kernel's file systems, opens cgroup v2.
//!
//! Called once by `main`, before any thread or task exists.

use std::ffi::CStr;
use std::path::PathBuf;
use std::{fs, io};

use rustix::mount::{MountFlags, mount, mount_move};

/// Why the guest could not be prepared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("mount {fstype} on {target}")]
    Mount { fstype: &'static str, target: &'static str, source: io::Error },
    #[error("enter the new root")]
    EnterRoot { source: io::Error },
    #[error("bring the loopback interface up")]
    Loopback { source: io::Error },
    #[error("write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

const NEW_ROOT: &str = "/newroot";
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
const NODEV: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);
const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);

/// Filesystem, target, flags and data, in the order in which they are mounted.
const MOUNTS: &[(&str, &str, MountFlags, Option<&CStr>)] = &[
    ("proc", "/proc", NODEV, None),
    ("sysfs", "/sys", NODEV, None),
    ("devtmpfs", "/dev", MountFlags::NOSUID, None),
    ("devpts", "/dev/pts", DEVICES, Some(c"ptmxmode=0666,mode=0620,gid=5")),
    ("tmpfs", "/dev/shm", MountFlags::NOSUID.union(MountFlags::NODEV), None),
    ("mqueue", "/dev/mqueue", NODEV, None),
    ("cgroup2", CGROUP_ROOT, NODEV, Some(c"nsdelegate")),
    ("tmpfs", "/run", MountFlags::NOSUID.union(MountFlags::NODEV), Some(c"mode=0755")),
    ("tmpfs", "/tmp", MountFlags::NOSUID.union(MountFlags::NODEV), None),
];

/// Moves to a fresh root and mounts everything that the agent and `pivot_root` of a container need.
pub(crate) fn prepare_root() -> Result<(), BootError> {
    enter_tmpfs_root()?;
    for &(fstype, target, flags, data) in MOUNTS {
        fs::create_dir_all(target).map_err(|source| BootError::Mount { fstype, target, source })?;
        mount(fstype, target, fstype, flags, data).map_err(|error| BootError::Mount {
            fstype,
            target,
            source: error.into(),
        })?;
    }
    delegate_controllers()?;
    crate::sys::bring_loopback_up().map_err(|source| BootError::Loopback { source })?;
    write("/proc/self/oom_score_adj", "-1000")
}

/// The image cannot be written, and `pivot_root` of a container would refuse an initramfs in its place, hence the tmpfs.
/// `/proc/self/exe` stays valid across the move.
fn enter_tmpfs_root() -> Result<(), BootError> {
    let enter = || -> io::Result<()> {
        fs::create_dir_all(NEW_ROOT)?;
        mount("root", NEW_ROOT, "tmpfs", MountFlags::empty(), Some(c"mode=0755"))?;
        std::env::set_current_dir(NEW_ROOT)?;
        mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        std::env::set_current_dir("/")
    };
    enter().map_err(|source| BootError::EnterRoot { source })
}

/// The agent leaves the root group first: a group with processes cannot pass controllers on (cgroup-v2, no internal process).
fn delegate_controllers() -> Result<(), BootError> {
    let agent = format!("{CGROUP_ROOT}/agent");
    fs::create_dir_all(&agent).map_err(|source| BootError::Write { path: agent.clone().into(), source })?;
    write(&format!("{agent}/cgroup.procs"), "1")?;
    let path = format!("{CGROUP_ROOT}/cgroup.controllers");
    let controllers =
        fs::read_to_string(&path).map_err(|source| BootError::Write { path: path.clone().into(), source })?;
    let containers = format!("{CGROUP_ROOT}/containers");
    fs::create_dir_all(&containers).map_err(|source| BootError::Write { path: containers.clone().into(), source })?;
    for controller in controllers.split_whitespace() {
        for parent in [CGROUP_ROOT, &containers] {
            write(&format!("{parent}/cgroup.subtree_control"), &format!("+{controller}"))?;
        }
    }
    Ok(())
}

fn write(path: &str, text: &str) -> Result<(), BootError> {
    fs::write(path, text).map_err(|source| BootError::Write { path: path.into(), source })
}
