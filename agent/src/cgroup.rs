//! The cgroup of a container (Documentation/admin-guide/cgroup-v2.rst): its processes, freezing, killing, its events.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, mem};

use agent_api::cgroup;
use agent_api::message::StatsReply;
use bpf::{BPF_CGROUP_DEVICE, BPF_PROG_TYPE_CGROUP_DEVICE};
use oci_spec::runtime::LinuxDeviceCgroup;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

use crate::{devices, sys};

/// Where cgroup v2 is mounted.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Time that the kernel has to freeze or to kill.
const EVENT_DEADLINE: Duration = Duration::from_secs(10);

/// The cgroup of one container.
#[derive(Clone)]
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    pub(crate) fn of(container_id: &str) -> Self {
        Self(Path::new(CGROUP_ROOT).join(Self::oci_path(container_id).trim_start_matches('/')))
    }

    /// The one that all containers are below.
    pub(crate) fn of_all() -> Self {
        Self(Path::new(CGROUP_ROOT).join("containers"))
    }

    /// Its `linux.cgroupsPath`, whatever the request says: that one names a cgroup of the host.
    pub(crate) fn oci_path(container_id: &str) -> String {
        format!("/containers/{container_id}")
    }

    /// Freezes or thaws, and waits until the kernel says that it is done.
    pub(crate) async fn freeze(&self, frozen: bool) -> io::Result<()> {
        let value = if frozen { "1" } else { "0" };
        fs::write(self.0.join("cgroup.freeze"), value)?;
        self.until("frozen", u64::from(frozen)).await
    }

    /// Kills every process at once; a cgroup that is gone has none.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match fs::write(self.0.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Kills every process, waits until none is left and removes the cgroup, with those that the container made in it.
    pub(crate) async fn remove(&self) -> io::Result<()> {
        if !self.0.exists() {
            return Ok(());
        }
        self.kill()?;
        self.until("populated", 0).await?;
        remove_tree(&self.0)
    }

    /// Every process, also of the cgroups that the container made in it.
    pub(crate) fn processes(&self) -> io::Result<Vec<i32>> {
        let mut pids: Vec<i32> = self.read("cgroup.procs")?.lines().filter_map(|line| line.parse().ok()).collect();
        for below in fs::read_dir(&self.0)?.flatten().filter(|entry| entry.path().is_dir()) {
            // One that is removed meanwhile has no processes.
            pids.extend(Self(below.path()).processes().unwrap_or_default());
        }
        Ok(pids)
    }

    /// What it uses.
    pub(crate) fn stats(&self) -> io::Result<StatsReply> {
        cgroup::stats(&self.0)
    }

    /// How many processes the OOM killer has killed in it.
    pub(crate) fn oom_kill_count(&self) -> u64 {
        let events = self.read("memory.events").unwrap_or_default();
        cgroup::keyed(&events).find(|(key, _)| *key == "oom_kill").map_or(0, |(_, count)| count)
    }

    /// Lets its processes open and make the devices that the rules allow, and no others.
    pub(crate) fn restrict_devices(&self, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
        let folder = fs::File::open(&self.0)?;
        let program = bpf::load(BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE, &devices::program(rules)?)?;
        bpf::attach(&program, &folder, BPF_CGROUP_DEVICE)
    }

    pub(crate) fn memory_events_path(&self) -> PathBuf {
        self.0.join("memory.events")
    }

    /// Waits until `cgroup.events` has the value; each change of the file is an event.
    async fn until(&self, key: &str, wanted: u64) -> io::Result<()> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let changes = sys::watch(inotify)?;
        inotify::add_watch(changes.get_ref(), self.0.join("cgroup.events"), WatchFlags::MODIFY)?;
        let wait = async {
            loop {
                let events = self.read("cgroup.events")?;
                if cgroup::keyed(&events).any(|(found, value)| found == key && value == wanted) {
                    return Ok(());
                }
                next_change(&changes).await?;
            }
        };
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("`{key} {wanted}` did not come in 10000 ms"));
        tokio::time::timeout(EVENT_DEADLINE, wait).await.unwrap_or_else(|_| Err(late()))
    }

    fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.0.join(file))
    }
}

/// Waits for inotify events and takes them all; returns the watch that the last one is of.
pub(crate) async fn next_change(inotify: &AsyncFd<std::os::fd::OwnedFd>) -> io::Result<i32> {
    inotify
        .async_io(tokio::io::Interest::READABLE, |fd| {
            let mut space = [mem::MaybeUninit::uninit(); 512];
            Ok(inotify::Reader::new(fd, &mut space).next()?.wd())
        })
        .await
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for below in fs::read_dir(path)?.flatten().filter(|entry| entry.path().is_dir()) {
        remove_tree(&below.path())?;
    }
    fs::remove_dir(path)
}
