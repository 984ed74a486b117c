//! The VM of a pod, and the way to kill it that needs nobody else.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use sandbox::artifacts::Artifacts;
use sandbox::cgroup::HostCgroup;
use sandbox::io_limit::IoLimit;
use sandbox::network::Network;
use sandbox::network::pod::{PodOptions, attach};
use sandbox::plan::VmSize;
use sandbox::share::Share;
use sandbox::{BootRequest, Sandbox};

use crate::config::Config;
use crate::error::TaskError;
use crate::metrics;
use crate::record::Record;

/// Longest time for a friendly end, which writes back what the guest has not.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// Where a VM belongs on the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    /// Folder of its pod, for the record.
    pub(crate) bundle: &'a Path,
    /// Its cgroup, as specs name it.
    pub(crate) cgroups_path: Option<&'a Path>,
    /// What it may read from disks of the host and write to them.
    pub(crate) io_limits: &'a [IoLimit],
    /// The network namespace whose interfaces it gets; without one, those that come into the VMM's own.
    pub(crate) netns: Option<&'a Path>,
}

/// A VM that has booted.
pub(crate) struct Vm {
    pub(crate) sandbox: Sandbox,
    pub(crate) size: VmSize,
    pub(crate) started_at: SystemTime,
    /// Its first address.
    pub(crate) address: Option<String>,
    pidfd: OwnedFd,
    cgroup: Option<HostCgroup>,
    /// Somebody wanted it to end.
    end_asked: AtomicBool,
}

impl Vm {
    /// Boots it, and writes down which process it is.
    pub(crate) async fn boot(
        config: &Config,
        name: &str,
        size: VmSize,
        shares: Vec<Share>,
        place: Place<'_>,
    ) -> Result<Self, TaskError> {
        let artifacts = Artifacts::find()?;
        // containerd gives each container its resolv.conf.
        let policy = config.network.policy();
        let options = PodOptions { queue_pairs: size.vcpus, resolv_conf: String::new(), policy };
        let network = join(place.netns, &options).await?;
        let address = network.first_address().map(str::to_owned);
        let cgroup = join_cgroup(place)?;
        let cgroup_path = cgroup.as_ref().map(|(cgroup, _)| cgroup.path().to_owned());
        let write_down = |pid| -> std::io::Result<()> {
            let record = Record { cgroup: cgroup_path.clone(), ..Record::of(pid)? };
            record.write(place.bundle)
        };
        write_down(None).map_err(TaskError::host("write down the pod's cgroup"))?;
        let (cgroup, procs) = cgroup.unzip();
        let sandbox = Sandbox::boot(BootRequest {
            name: name.to_owned(),
            size,
            network,
            shares,
            cgroup: procs,
            console: None,
            artifacts,
            deadline: config.vm.boot_deadline(),
        })
        .await?;
        let pid = sandbox.vmm_pid();
        let identify = || -> std::io::Result<OwnedFd> {
            let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let pidfd = pidfd_open(raw.ok_or(std::io::ErrorKind::NotFound)?, PidfdFlags::empty())?;
            // containerd protects its shims from the OOM killer; what a guest fills is not worth more than others.
            let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "0");
            Ok(pidfd)
        };
        if place.netns.is_none() {
            sandbox.offer_network(&options).await?;
        }
        let pidfd = write_down(Some(pid)).and_then(|()| identify());
        let pidfd = pidfd.map_err(TaskError::host("write down the VMM's process"))?;
        let times = sandbox.times();
        tracing::info!(
            pid,
            vcpus = size.vcpus,
            memory_mib = size.memory_mib,
            address,
            ready_ms = u64::try_from(times.configured.as_millis()).unwrap_or(u64::MAX),
            "VM booted"
        );
        let (started_at, end_asked) = (SystemTime::now(), AtomicBool::new(false));
        Ok(Self { sandbox, size, started_at, address, pidfd, cgroup, end_asked })
    }

    /// Process id of the VMM, which stands for the guest's processes on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.sandbox.vmm_pid()
    }

    /// What it uses of the host, its guest's memory included, and what its interfaces have carried. Of one that stayed in its
    /// starter's cgroup only the latter is known, and of one that has ended only the former.
    pub(crate) async fn metrics(&self) -> Metrics {
        let stats = self.cgroup.as_ref().and_then(|cgroup| cgroup.stats().ok());
        let mut told = stats.map_or_else(Metrics::new, |stats| metrics::metrics(&stats));
        let interfaces = self.sandbox.network_stats().await.unwrap_or_default();
        told.network = interfaces.into_iter().map(metrics::interface).collect();
        told
    }

    /// Changes what it may read from disks of the host and write to them.
    pub(crate) fn limit_io(&self, limits: &[IoLimit]) -> Result<(), TaskError> {
        match &self.cgroup {
            Some(cgroup) => Ok(cgroup.limit_io(limits)?),
            None if limits.is_empty() => Ok(()),
            None => Err(no_cgroup()),
        }
    }

    /// Ends it as it is. Takes no lock and waits for nothing.
    pub(crate) fn kill(&self) {
        self.end_asked.store(true, Ordering::Relaxed);
        // An error says that it has ended.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Ends it after the guest has written back what it holds, or at once when that takes too long.
    pub(crate) async fn stop(&self) {
        self.end_asked.store(true, Ordering::Relaxed);
        if tokio::time::timeout(STOP_DEADLINE, self.sandbox.stop()).await.is_err() {
            self.kill();
        }
    }

    /// Lets go of the host, after its end.
    pub(crate) async fn clean_up(&self) {
        self.sandbox.leave_network().await;
        if let Some(cgroup) = self.cgroup.clone() {
            // What a kernel's thread does for the VM may end after it.
            let _ = tokio::task::spawn_blocking(move || cgroup.remove_when_empty()).await;
        }
    }

    /// Whether it was to end.
    pub(crate) fn end_asked(&self) -> bool {
        self.end_asked.load(Ordering::Relaxed)
    }
}

/// Makes the pod's cgroup for the VMM to join. A host without cgroup v2 at the usual place has none, and no limits.
fn join_cgroup(place: Place<'_>) -> Result<Option<(HostCgroup, OwnedFd)>, TaskError> {
    let Some(path) = place.cgroups_path else {
        return if place.io_limits.is_empty() { Ok(None) } else { Err(no_cgroup()) };
    };
    let joined = HostCgroup::create(path).and_then(|cgroup| {
        let limited = cgroup.limit_io(place.io_limits).and_then(|()| cgroup.procs());
        let procs = limited.inspect_err(|_| cgroup.remove())?;
        Ok((cgroup, procs))
    });
    match joined {
        Err(error) if place.io_limits.is_empty() => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, path = %path.display(), "the VMM stays in the cgroup of its starter");
            Ok(None)
        }
        joined => Ok(Some(joined?)),
    }
}

fn no_cgroup() -> TaskError {
    TaskError::Invalid("the VM has no cgroup of its own that linux.resources.blockIO could limit".to_owned())
}

/// Joins the interfaces of a network namespace to a VM that is yet to be booted, off the threads that answer requests.
async fn join(netns: Option<&Path>, options: &PodOptions) -> Result<Network, TaskError> {
    let Some(path) = netns.map(PathBuf::from) else { return Ok(Network::default()) };
    let options = options.clone();
    let joined = tokio::task::spawn_blocking(move || attach(&path, &options)).await;
    Ok(joined.map_err(|error| TaskError::Invalid(error.to_string()))??)
}
