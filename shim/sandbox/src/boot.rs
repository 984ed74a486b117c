//! The boot recipe: from artefacts and trees to a sandbox whose agent answers. Undone as a whole when a step fails.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use crate::agent_client::AgentClient;
use crate::artifacts::Artifacts;
use crate::network::Network;
use crate::plan::VmSize;
use crate::share::Share;
use crate::streams::StreamTable;
use crate::vmm_process::{Spawn, VmmProcess};
use crate::work::Work;
use crate::{BootError, Sandbox, message};

/// Everything a sandbox starts from.
pub struct BootRequest {
    /// Name of the sandbox; the guest's host name unless the container has its own.
    pub name: String,
    /// Size of the VM.
    pub size: VmSize,
    /// What to share.
    pub shares: Vec<Share>,
    /// Its network; the default is none but loopback.
    pub network: Network,
    /// The `cgroup.procs` that the VMM joins by; without it, it stays in its starter's cgroup.
    pub cgroup: Option<OwnedFd>,
    /// Where the guest's serial console goes.
    pub console: Option<OwnedFd>,
    /// The program, kernel and image.
    pub artifacts: Artifacts,
    /// Time that the agent has to dial in.
    pub deadline: Duration,
}

/// Stages of a boot: each the time from its beginning, in the order of the fields.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BootTimes {
    /// Until the VMM process ran.
    pub spawn: Duration,
    /// Until the agent dialled in.
    pub agent_ready: Duration,
    /// Until the guest was configured.
    pub configured: Duration,
}

impl Sandbox {
    /// Starts a VM and waits until its agent is ready.
    ///
    /// # Errors
    /// Each variant of [`BootError`]; the VM is gone then.
    pub async fn boot(mut request: BootRequest) -> Result<Self, BootError> {
        let start = Instant::now();
        let shares = request.shares.iter().map(Share::request).collect();
        let kept = |share: &mut Share| Some((share.tag.clone(), share.namespace.take()?));
        let namespaces = request.shares.iter_mut().filter_map(kept).collect();
        let (vmm, ports) = VmmProcess::spawn(Spawn {
            program: request.artifacts.vmm.clone(),
            name: request.name.clone(),
            size: request.size,
            kvm: open_kvm()?,
            kernel: open(&request.artifacts.kernel)?,
            root_image: open(&request.artifacts.rootfs)?,
            cgroup: request.cgroup,
            console: request.console,
            shares: request.shares,
            networks: request.network.interfaces,
        })?;
        let spawn = start.elapsed();
        let agent = tokio::select! {
            biased;
            Ok(connected) = ports.accept_agent() => AgentClient::new(connected, request.deadline),
            exit = vmm.ended() => {
                return Err(BootError::Ended { exit: Box::new(exit), elapsed_ms: start.elapsed().as_millis() });
            }
            () = tokio::time::sleep(request.deadline) => {
                return Err(BootError::AgentSilent { deadline_ms: request.deadline.as_millis() });
            }
        };
        let agent_ready = start.elapsed();
        let streams = StreamTable::serve(ports.streams)
            .map_err(|source| BootError::Host { action: "read random bytes", source })?;
        let configured = agent.configure(&configuration(request.name, shares)?).await;
        vmm.explain(configured).await.map_err(BootError::Configure)?;
        if request.network.guest != message::SetNetworkRequest::default() {
            let set = agent.set_network(&request.network.guest).await;
            vmm.explain(set).await.map_err(BootError::Configure)?;
        }
        let times = BootTimes { spawn, agent_ready, configured: start.elapsed() };
        Ok(Self {
            agent,
            streams,
            vmm,
            times,
            network: tokio::sync::Mutex::new(request.network.held),
            network_work: Work::default(),
            namespaces: Mutex::new(namespaces),
        })
    }
}

fn configuration(hostname: String, shares: Vec<message::ShareRequest>) -> Result<message::ConfigureRequest, BootError> {
    let mut entropy = vec![0; 64];
    let mut filled = 0;
    while filled < entropy.len() {
        filled += rustix::rand::getrandom(&mut entropy[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(|source| BootError::Host { action: "read random bytes", source: source.into() })?;
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(message::ConfigureRequest {
        realtime_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        entropy,
        hostname,
        shares,
        ..Default::default()
    })
}

fn open(path: &PathBuf) -> Result<OwnedFd, BootError> {
    let file = File::open(path).map_err(|source| BootError::Open { path: path.clone(), source })?;
    Ok(file.into())
}

fn open_kvm() -> Result<OwnedFd, BootError> {
    let opened = File::options().read(true).write(true).open(Path::new("/dev/kvm"));
    opened.map(OwnedFd::from).map_err(|source| {
        let remedy = match source.kind() {
            io::ErrorKind::NotFound => {
                "load the module kvm_intel or kvm_amd, and switch virtualization on in the firmware or in the outer VM"
            }
            io::ErrorKind::PermissionDenied => "run as root, or join the group that owns /dev/kvm",
            _ => "see `vmrun check`",
        };
        BootError::Kvm { remedy, source }
    })
}
