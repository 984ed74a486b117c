//! A VM whose containers a story makes itself, through the host library: for what the command line does not reach.

use std::fs;
use std::time::Duration;

use oci_spec::runtime::Spec;
use sandbox::artifacts::Artifacts;
use sandbox::network::pod::{PodOptions, attach};
use sandbox::network::{Network, Policy};
use sandbox::plan::{ROOTFS_TAG, VmSize, guest_rootfs};
use sandbox::share::{Rootfs, Share, rootfs_tree};
use sandbox::{BootRequest, CachePolicy, CallError, ProcessId, ProcessStreams, Sandbox, WantedStreams};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

use crate::Story;
use crate::lan::Netns;

/// Generous: an emulated host takes seconds.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);

// Status codes of gRPC.
/// A malformed request.
pub const INVALID_ARGUMENT: i32 = 3;
/// No such thing.
pub const NOT_FOUND: i32 = 5;
/// The name is taken.
pub const ALREADY_EXISTS: i32 = 6;
/// The wrong state.
pub const FAILED_PRECONDITION: i32 = 9;
/// A known field that cannot be honoured.
pub const UNIMPLEMENTED: i32 = 12;

/// Enough for a few shells.
pub const SMALL: VmSize = VmSize { vcpus: 1, memory_mib: 384 };

/// A VM with a story's root file system.
pub struct Pod(pub Sandbox);

impl Pod {
    /// Boots it, small.
    ///
    /// # Panics
    /// When it does not boot.
    pub async fn boot(story: &Story) -> Self {
        Self::boot_with(story, SMALL, Network::default()).await
    }

    /// Boots it with a size and a network.
    ///
    /// # Panics
    /// When it does not boot.
    pub async fn boot_with(story: &Story, size: VmSize, network: Network) -> Self {
        let rootfs = Rootfs::Directory { path: story.rootfs(), read_only: false };
        let tree = rootfs_tree(rootfs, &story.scratch()).expect("the root file system is shared");
        let request = BootRequest {
            name: "pod".to_owned(),
            size,
            shares: vec![Share::of_tree(ROOTFS_TAG, tree, CachePolicy::Always)],
            network,
            cgroup: None,
            console: None,
            artifacts: Artifacts::find().expect("VMRUN_VMM, VMRUN_KERNEL and VMRUN_ROOTFS name the artefacts"),
            deadline: BOOT_DEADLINE,
        };
        Self(Sandbox::boot(request).await.expect("booted"))
    }

    /// Makes a container that runs a shell script; `change` edits its spec. It has a terminal if its spec says so.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn create(
        &self,
        id: &str,
        script: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<ProcessStreams, CallError> {
        let mut spec = spec(script);
        change(&mut spec);
        let terminal = (spec["process"]["terminal"] == json!(true)).then_some((24, 80));
        let spec: Spec = serde_json::from_value(spec).expect("a spec");
        let wanted = WantedStreams { stdin: false, output: true, terminal };
        self.0.create(id, &spec, wanted).await
    }

    /// Runs a container to its end; returns its exit status and its output, and deletes it.
    ///
    /// # Panics
    /// When it is not made.
    pub async fn run(&self, id: &str, script: &str, change: impl FnOnce(&mut Value)) -> (u32, String) {
        let streams = self.create(id, script, change).await.expect("created");
        self.0.start(id).await.expect("started");
        let output = read(streams.stdout).await + &read(streams.stderr).await;
        let exit = self.0.wait(&ProcessId::init(id)).await.expect("waited");
        self.0.delete(&ProcessId::init(id), false).await.expect("deleted");
        (exit.exit_code, output)
    }

    /// Names of the threads of its VMM; some kernels count vhost's among them.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0.vmm_pid())).expect("the VMM runs");
        tasks.map(|task| fs::read_to_string(task.expect("a thread").path().join("comm")).expect("a name")).collect()
    }

    /// Whether a thread of its VMM has a name that begins so.
    #[must_use]
    pub fn has_thread(&self, name: &str) -> bool {
        self.threads().iter().any(|thread| thread.starts_with(name))
    }
}

/// The network of a namespace with two pairs of queues, of which a guest with one CPU uses one.
///
/// # Panics
/// When the namespace is not joined.
#[must_use]
pub fn network(netns: &Netns, policy: Policy) -> Network {
    let options = PodOptions { queue_pairs: 2, resolv_conf: "nameserver 10.88.0.1\n".to_owned(), policy };
    attach(&netns.path(), &options).expect("the namespace is joined")
}

/// Changes a spec so that a container may ping, set the network up and listen at any port.
///
/// # Panics
/// When it has no capabilities.
pub fn net_capabilities(spec: &mut Value) {
    for set in ["bounding", "effective", "permitted"] {
        let set = spec["process"]["capabilities"][set].as_array_mut().expect("a set");
        set.extend(["CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"].map(Value::from));
    }
}

/// Reads a stream to its end.
///
/// # Panics
/// When the stream is not there.
pub async fn read(stream: Option<tokio::net::UnixStream>) -> String {
    let mut text = String::new();
    stream.expect("a stream").read_to_string(&mut text).await.expect("text");
    text
}

/// The gRPC status of a refusal, and its text.
///
/// # Panics
/// When the call was not refused.
pub fn refusal<T>(result: Result<T, CallError>) -> (i32, String) {
    match result {
        Err(CallError::Refused { code, message }) => (code, message),
        Err(other) => panic!("not refused: {other}"),
        Ok(_) => panic!("not refused"),
    }
}

/// A small spec with namespaces of its own and the usual mounts.
fn spec(script: &str) -> Value {
    let everything = ["CAP_CHOWN", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_MKNOD"];
    json!({
        "ociVersion": "1.2.0",
        "root": { "path": guest_rootfs(), "readonly": true },
        "hostname": "pod",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": { "bounding": everything, "effective": everything, "permitted": everything }
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] },
            { "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m", "mode=1777"] }
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "cgroup" }
            ],
            "resources": {}
        }
    })
}
