//! A sandbox: one microVM and the containers in it, as the host sees them.
//!
//! Called by `vmrun` and by the containerd shim. Knows neither containerd nor virtio: it spawns `vmm`, hands it open file
//! descriptors, waits for the agent to dial in, and speaks the agent's protocol.
//!
//! ```text
//!   artifacts ─► plan (pure) ─► share (detached mounts) ─► VmmProcess::spawn ─► agent dials in ─► Sandbox
//! ```

mod agent_client;
pub mod artifacts;
mod boot;
pub mod cgroup;
mod copy;
pub mod error;
mod exec;
mod follow;
mod forward;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod io_limit;
pub mod network;
mod pid_namespace;
pub mod plan;
pub mod probe;
pub mod share;
pub mod socket;
pub mod state;
mod stream_call;
mod streams;
mod text;
mod vm;
mod vmm_control;
mod vmm_process;
mod vmm_words;
mod work;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

pub use agent_api::message;
use agent_client::AgentClient;
pub use boot::{BootRequest, BootTimes};
pub use error::{BootError, CallError, ControlError, RescanError};
pub use exec::RunningExec;
pub use stream_call::StreamCall;
pub use streams::ProcessStreams;
use streams::{STREAM_DEADLINE, StreamTable};
pub use vmm_api::CachePolicy;
pub use vmm_api::control::{Exit, ExitReason, State as VmState, Stats as VmmStats};
pub use vmm_api::fds;
use vmm_process::VmmProcess;

/// A running microVM whose agent answers. Dropping it ends the VM.
pub struct Sandbox {
    agent: AgentClient,
    streams: StreamTable,
    vmm: VmmProcess,
    times: BootTimes,
    // Let go after the VMM, which is dropped before it.
    network: tokio::sync::Mutex<network::Held>,
    network_work: work::Work,
    /// Mount namespaces that shares are in, by tag.
    namespaces: Mutex<HashMap<String, OwnedFd>>,
}

/// Which streams of a new process the caller wants; the others are `/dev/null`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct WantedStreams {
    /// The process reads from a stream of ours.
    pub stdin: bool,
    /// Its output reaches us. With a terminal this is one stream, `stdout`.
    pub output: bool,
    /// Rows and columns of its terminal, if it has one.
    pub terminal: Option<(u16, u16)>,
}

/// One process in the sandbox: a container's init (`exec_id` empty) or an exec.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ProcessId {
    /// The container.
    pub container_id: String,
    /// The exec in it, or empty.
    pub exec_id: String,
}

impl ProcessId {
    /// The init process of a container.
    #[must_use]
    pub fn init(container_id: &str) -> Self {
        Self { container_id: container_id.to_owned(), exec_id: String::new() }
    }
}

impl Sandbox {
    /// Stages of the boot with their times.
    #[must_use]
    pub fn times(&self) -> &BootTimes {
        &self.times
    }

    /// Process id of the VMM on the host.
    #[must_use]
    pub fn vmm_pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// Makes a container from its OCI spec, in which every path is a guest path. Its init process waits for [`Self::start`].
    ///
    /// # Errors
    /// What the agent says, or that it no longer answers.
    pub async fn create(
        &self,
        container_id: &str,
        spec: &oci_spec::runtime::Spec,
        wanted: WantedStreams,
    ) -> Result<ProcessStreams, CallError> {
        let expected = self.streams.expect(wanted);
        let request = message::CreateContainerRequest {
            container_id: container_id.to_owned(),
            spec: serde_json::to_vec(spec).map_err(CallError::Encode)?,
            stdio: Some(expected.stdio.clone()).into(),
            ..Default::default()
        };
        self.vmm.explain(self.agent.create(&request).await).await?;
        expected.streams(STREAM_DEADLINE).await
    }

    /// Lets the init process of a container run.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn start(&self, container_id: &str) -> Result<(), CallError> {
        self.vmm.explain(self.agent.start(container_id).await).await
    }

    /// Starts another process in a running container.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn exec(
        &self,
        id: &ProcessId,
        process: &oci_spec::runtime::Process,
        wanted: WantedStreams,
    ) -> Result<ProcessStreams, CallError> {
        let expected = self.streams.expect(wanted);
        self.vmm.explain(self.agent.exec(&exec::request(id, process, &expected)?).await).await?;
        expected.streams(STREAM_DEADLINE).await
    }

    /// Waits for a process to exit.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn wait(&self, id: &ProcessId) -> Result<message::WaitReply, CallError> {
        self.vmm.explain(self.agent.wait(id).await).await
    }

    /// Sends a signal to a process, or to every process of its container.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn signal(&self, id: &ProcessId, signal: u32, all: bool) -> Result<(), CallError> {
        self.agent.signal(id, signal, all).await
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn resize(&self, id: &ProcessId, rows: u16, columns: u16) -> Result<(), CallError> {
        self.agent.resize(id, rows, columns).await
    }

    /// Ends the standard input of a process after `sent_bytes`, all that was written to its stream. The way for whoever
    /// cannot shut the stream's writing side down.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn close_stdin(&self, id: &ProcessId, sent_bytes: u64) -> Result<(), CallError> {
        self.agent.close_stdin(id, sent_bytes).await
    }

    /// What a container or an exec is doing.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn state(&self, id: &ProcessId) -> Result<message::StateReply, CallError> {
        self.agent.state(id).await
    }

    /// Waits for the next events of all containers; each is told once, so this is for one caller.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn next_events(&self) -> Result<message::EventsReply, CallError> {
        self.vmm.explain(self.agent.next_events().await).await
    }

    /// Changes limits of a container; a resource that is not named stays as it is.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn update(
        &self,
        container_id: &str,
        resources: &oci_spec::runtime::LinuxResources,
    ) -> Result<(), CallError> {
        let request = message::UpdateRequest {
            container_id: container_id.to_owned(),
            resources: serde_json::to_vec(resources).map_err(CallError::Encode)?,
            ..Default::default()
        };
        self.agent.update(&request).await
    }

    /// Removes a created or stopped container, or kills and removes it; or forgets an exec.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn delete(&self, id: &ProcessId, force: bool) -> Result<(), CallError> {
        self.agent.delete(id, force).await
    }

    /// What a container uses.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn stats(&self, container_id: &str) -> Result<message::StatsReply, CallError> {
        self.agent.stats(container_id).await
    }

    /// Freezes a container by its cgroup.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn pause(&self, container_id: &str) -> Result<(), CallError> {
        self.agent.pause(container_id).await
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn resume(&self, container_id: &str) -> Result<(), CallError> {
        self.agent.resume(container_id).await
    }

    /// Processes of a container, with guest process ids.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn list_processes(&self, container_id: &str) -> Result<Vec<message::GuestProcess>, CallError> {
        self.agent.list_processes(container_id).await
    }

    /// Waits until the VM ends, for whatever reason.
    pub async fn ended(&self) -> Exit {
        self.vmm.ended().await
    }

    /// Ends the VMM at once, whatever it and its guest do.
    pub async fn kill(&self) {
        self.vmm.kill().await;
    }

    /// Asks the guest to write back, then ends the VMM, in at most two seconds.
    pub async fn stop(&self) {
        self.agent.shutdown().await;
        self.vmm.end().await;
    }
}
