//! Cgroups of the host: one for each VM, so that all that it costs is accounted and limited as a whole (cgroup v2 only).
//!
//! The VMM joins its cgroup itself, before it takes memory: what was charged to another cgroup stays there.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use agent_api::message::StatsReply;
use thiserror::Error;

use crate::io_limit::IoLimit;
use crate::plan::VmSize;

const ROOT: &str = "/sys/fs/cgroup";
/// Controllers whose limits a VM has.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Controllers of a VM with limits of I/O: what is written back later is charged to the cgroup that its memory is charged to.
const IO_CONTROLLERS: [&str; 2] = ["io", "memory"];
/// What a VM may take beside its RAM, in MiB: the VMM, the kernel's memory for both, and pages of files that it reads and writes.
const OVERHEAD_MIB: u64 = 64;
/// Threads that a VM may have beside its vCPUs.
const THREADS: u32 = 256;
/// A period of the CPU limit, in microseconds.
const CPU_PERIOD_US: u64 = 100_000;
/// Time that killed processes have to leave a cgroup, and between two looks.
const EMPTY_DEADLINE: Duration = Duration::from_secs(2);
const EMPTY_INTERVAL: Duration = Duration::from_millis(5);
/// The last cgroup of a parent takes the parent with it, maybe just when somebody else makes one there.
const ATTEMPTS: u32 = 10;

/// Why there is no cgroup.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The path is not one.
    #[error("{} is not the path of a cgroup", path.display())]
    Path {
        /// What was asked for.
        path: PathBuf,
    },
    /// The host has version 1.
    #[error("there is no cgroup v2 at {ROOT}: boot the host with systemd.unified_cgroup_hierarchy=1")]
    Version1,
    /// Its kernel, or whoever started it, left the controller out.
    #[error("the host cannot limit I/O: {ROOT}/cgroup.controllers has no io (CONFIG_BLK_CGROUP)")]
    NoIo,
    /// The host refused.
    #[error("cannot {action} {}", path.display())]
    Host {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl CgroupError {
    fn host(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Host { action, path, source }
    }
}

/// A cgroup of ours.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostCgroup(PathBuf);

impl HostCgroup {
    /// Makes the cgroup that a spec names (`linux.cgroupsPath`), without limits: whoever made its parent set those of the pod.
    ///
    /// # Errors
    /// Each variant of [`CgroupError`].
    pub fn create(cgroups_path: &Path) -> Result<Self, CgroupError> {
        let relative = relative(cgroups_path).ok_or_else(|| CgroupError::Path { path: cgroups_path.to_owned() })?;
        check_version()?;
        let cgroup = Self(Path::new(ROOT).join(relative));
        fs::create_dir_all(&cgroup.0).map_err(CgroupError::host("make the cgroup", &cgroup.0))?;
        // Without controllers nobody knows what it uses. Where the parent has processes of its own, the kernel allows none.
        if let Err(error) = cgroup.above().try_for_each(|parent| enable_controllers(parent, &CONTROLLERS)) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, cgroup = %cgroup.0.display(), "what the VM uses is not known");
        }
        Ok(cgroup)
    }

    /// Makes this cgroup with the limits of a VM of that size: memory and CPU time of the guest and of what serves it, threads, and I/O.
    ///
    /// # Errors
    /// [`CgroupError::Version1`], [`CgroupError::NoIo`] and [`CgroupError::Host`]; nothing is left then.
    pub fn create_limited(&self, size: VmSize, io_limits: &[IoLimit]) -> Result<(), CgroupError> {
        check_version()?;
        let mut attempt = 1;
        while let Err(error) = self.make() {
            let parent_went =
                matches!(&error, CgroupError::Host { source, .. } if source.kind() == io::ErrorKind::NotFound);
            if !parent_went || attempt == ATTEMPTS {
                return Err(error);
            }
            attempt += 1;
        }
        self.limit(size).and_then(|()| self.limit_io(io_limits)).inspect_err(|_| self.remove_with_parent())
    }

    /// Limits what its processes read from disks and write to them. Those above it get the controllers, if there is a limit.
    ///
    /// # Errors
    /// [`CgroupError::Version1`], [`CgroupError::NoIo`] and [`CgroupError::Host`].
    pub fn limit_io(&self, limits: &[IoLimit]) -> Result<(), CgroupError> {
        if limits.is_empty() {
            return Ok(());
        }
        check_io()?;
        self.above().try_for_each(|parent| enable_controllers(parent, &IO_CONTROLLERS))?;
        limits.iter().try_for_each(|limit| self.write("io.max", &limit.line()))
    }

    /// One that was made before.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// The cgroup `name` below `parent`, a path below the root.
    #[must_use]
    pub fn below(parent: &Path, name: &str) -> Option<Self> {
        Some(Self(Path::new(ROOT).join(relative(&parent.join(name))?)))
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What a process writes `0` to when it joins.
    ///
    /// # Errors
    /// [`CgroupError::Host`].
    pub fn procs(&self) -> Result<OwnedFd, CgroupError> {
        let path = self.0.join("cgroup.procs");
        let opened = File::options().write(true).open(&path);
        Ok(opened.map_err(CgroupError::host("open", &path))?.into())
    }

    /// Whether a process is in it.
    #[must_use]
    pub fn holds(&self, pid: u32) -> bool {
        let pids = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        pids.lines().any(|line| line.parse() == Ok(pid))
    }

    /// Whether the kernel killed a process of it for its memory.
    #[must_use]
    pub fn was_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.0.join("memory.events")).unwrap_or_default();
        agent_api::cgroup::keyed(&events).any(|(key, count)| key == "oom_kill" && count != 0)
    }

    /// What its processes use.
    ///
    /// # Errors
    /// [`CgroupError::Host`].
    pub fn stats(&self) -> Result<StatsReply, CgroupError> {
        agent_api::cgroup::stats(&self.0).map_err(CgroupError::host("read", &self.0))
    }

    /// Removes it. Somebody else's processes keep it.
    pub fn remove(&self) {
        if let Err(error) = self.try_remove() {
            tracing::warn!(%error, cgroup = %self.0.display(), "a cgroup cannot be removed");
        }
    }

    /// Removes it as soon as processes that were killed have left it, or those of somebody else have stayed too long.
    pub fn remove_when_empty(&self) {
        let deadline = Instant::now() + EMPTY_DEADLINE;
        while self.try_remove().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
            && Instant::now() < deadline
        {
            thread::sleep(EMPTY_INTERVAL);
        }
        self.remove();
    }

    /// As [`Self::remove_when_empty`], and removes its parent when nothing else is below that.
    pub fn remove_with_parent(&self) {
        self.remove_when_empty();
        // Others are in it, as a rule.
        let _ = self.0.parent().map(fs::remove_dir);
    }

    /// What is not there is removed.
    fn try_remove(&self) -> io::Result<()> {
        match fs::remove_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Makes the folder and those above it.
    fn make(&self) -> Result<(), CgroupError> {
        for parent in self.above() {
            make_folder(parent)?;
            enable_controllers(parent, &CONTROLLERS)?;
        }
        make_folder(&self.0)
    }

    /// The cgroups that it is in, the root first.
    fn above(&self) -> impl Iterator<Item = &Path> {
        let above: Vec<&Path> = self.0.ancestors().skip(1).take_while(|path| path.starts_with(ROOT)).collect();
        above.into_iter().rev()
    }

    fn limit(&self, size: VmSize) -> Result<(), CgroupError> {
        let memory_bytes = (u64::from(size.memory_mib) + OVERHEAD_MIB) << 20;
        let cpu_us = (u64::from(size.vcpus) + 1) * CPU_PERIOD_US;
        let limits = [
            ("memory.max", memory_bytes.to_string()),
            ("cpu.max", format!("{cpu_us} {CPU_PERIOD_US}")),
            ("pids.max", (u32::from(size.vcpus) + THREADS).to_string()),
        ];
        limits.iter().try_for_each(|(file, limit)| self.write(file, limit))
    }

    fn write(&self, file: &str, limit: &str) -> Result<(), CgroupError> {
        let path = self.0.join(file);
        fs::write(&path, limit).map_err(CgroupError::host("write", &path))
    }
}

/// Whether the host can limit I/O.
///
/// # Errors
/// [`CgroupError::Version1`] and [`CgroupError::NoIo`].
pub fn check_io() -> Result<(), CgroupError> {
    // Version 1 has no such file.
    let found = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).map_err(|_| CgroupError::Version1)?;
    if missing(&found, &["io"]).is_empty() { Ok(()) } else { Err(CgroupError::NoIo) }
}

fn check_version() -> Result<(), CgroupError> {
    // Version 1 has no such file.
    fs::metadata(Path::new(ROOT).join("cgroup.controllers")).map(drop).map_err(|_| CgroupError::Version1)
}

fn make_folder(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(CgroupError::host("make the cgroup", path)),
    }
}

/// Lets what is below a cgroup have limits.
fn enable_controllers(cgroup: &Path, controllers: &[&str]) -> Result<(), CgroupError> {
    let path = cgroup.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&path).map_err(CgroupError::host("read", &path))?;
    let missing: Vec<String> = missing(&enabled, controllers).iter().map(|name| format!("+{name}")).collect();
    if missing.is_empty() {
        return Ok(());
    }
    fs::write(&path, missing.join(" ")).map_err(CgroupError::host("turn on controllers by", &path))
}

/// Those that a list of the kernel does not have.
fn missing<'a>(list: &str, controllers: &[&'a str]) -> Vec<&'a str> {
    controllers.iter().copied().filter(|wanted| !list.split_whitespace().any(|name| name == *wanted)).collect()
}

/// Where a spec's cgroup is below the root. systemd's form is `SLICE:PREFIX:NAME`, and a slice `a-b.slice` is in `a.slice`.
fn relative(cgroups_path: &Path) -> Option<PathBuf> {
    let text = cgroups_path.to_str()?;
    let words: Vec<&str> = text.split(':').collect();
    let path = match words.as_slice() {
        [slice, prefix, name] => slice_path(slice)?.join(format!("{prefix}-{name}.scope")),
        _ => PathBuf::from(text.trim_start_matches('/')),
    };
    let plain = path.components().all(|component| matches!(component, Component::Normal(_)));
    (plain && !path.as_os_str().is_empty()).then_some(path)
}

/// The folders of a slice of systemd.
fn slice_path(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    let mut whole = String::new();
    for part in name.split('-').filter(|part| !part.is_empty()) {
        if !whole.is_empty() {
            whole.push('-');
        }
        whole.push_str(part);
        path.push(format!("{whole}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::{IO_CONTROLLERS, missing, relative};

    #[test]
    fn only_controllers_that_are_missing_are_turned_on() {
        assert_eq!(missing("cpu memory pids\n", &IO_CONTROLLERS), ["io"]);
        assert_eq!(missing("cpuset cpu io memory\n", &IO_CONTROLLERS), [""; 0]);
        assert_eq!(missing("", &IO_CONTROLLERS), IO_CONTROLLERS);
    }

    #[test]
    fn both_forms_of_a_path_are_known() {
        let of = |path: &str| relative(Path::new(path));
        assert_eq!(of("/default/box"), Some(PathBuf::from("default/box")));
        let systemd = of("kubepods-burstable-pod1.slice:cri-containerd:box");
        let expected = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-box.scope";
        assert_eq!(systemd, Some(PathBuf::from(expected)));
    }

    #[test]
    fn no_path_leads_out_or_to_the_root() {
        let of = |path: &str| relative(Path::new(path));
        assert_eq!(of("/../x"), None);
        assert_eq!(of("/"), None);
        assert_eq!(of("a/../../b"), None);
    }
}
