//! Calls to the agent. Its answers are a guest's bytes: deadlines everywhere, text escaped, numbers taken as they are typed.

use std::time::Duration;

use agent_api::service::AgentClient as Stub;
use agent_api::{message, service};
use tokio::net::UnixStream;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{self, Context};

use crate::text::escape;
use crate::{CallError, ProcessId};

/// Deadline of a call that only does work in the guest.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// Deadline of the farewell.
const SHUTDOWN_DEADLINE: Duration = Duration::from_millis(300);

/// The connection to the agent.
#[derive(Clone)]
pub(crate) struct AgentClient {
    stub: Stub,
    /// Deadline of calls that begin something: a host whose boots are slow is slow in these as well, half as much.
    begin_deadline: Duration,
}

impl AgentClient {
    /// Of a guest that has `boot_deadline` to boot.
    pub(crate) fn new(stream: UnixStream, boot_deadline: Duration) -> Self {
        let stub = service::AgentClient::new(ttrpc::asynchronous::Client::new(Socket::new(stream)));
        Self { stub, begin_deadline: CALL_DEADLINE.max(boot_deadline / 2) }
    }

    pub(crate) async fn configure(&self, request: &message::ConfigureRequest) -> Result<(), CallError> {
        bounded("Configure", self.begin_deadline, |context| self.stub.configure(context, request)).await.map(drop)
    }

    pub(crate) async fn create(&self, request: &message::CreateContainerRequest) -> Result<(), CallError> {
        bounded("CreateContainer", self.begin_deadline, |context| self.stub.create_container(context, request))
            .await
            .map(drop)
    }

    pub(crate) async fn start(&self, container_id: &str) -> Result<(), CallError> {
        let request = container(container_id);
        bounded("StartContainer", self.begin_deadline, |context| self.stub.start_container(context, &request))
            .await
            .map(drop)
    }

    pub(crate) async fn exec(&self, request: &message::ExecRequest) -> Result<(), CallError> {
        bounded("Exec", self.begin_deadline, |context| self.stub.exec(context, request)).await.map(drop)
    }

    pub(crate) async fn run_exec(&self, request: &message::ExecRequest) -> Result<message::WaitReply, CallError> {
        // A process runs as long as it likes.
        self.stub.run_exec(context::with_timeout(0), request).await.map_err(|error| translate("RunExec", error))
    }

    pub(crate) async fn wait(&self, id: &ProcessId) -> Result<message::WaitReply, CallError> {
        let request = message::ProcessRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            ..Default::default()
        };
        // A process runs as long as it likes.
        self.stub.wait(context::with_timeout(0), &request).await.map_err(|error| translate("Wait", error))
    }

    pub(crate) async fn signal(&self, id: &ProcessId, signal: u32, all: bool) -> Result<(), CallError> {
        let request = message::SignalRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        bounded("Signal", CALL_DEADLINE, |context| self.stub.signal(context, &request)).await.map(drop)
    }

    pub(crate) async fn resize(&self, id: &ProcessId, rows: u16, columns: u16) -> Result<(), CallError> {
        let request = message::ResizeRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            rows: rows.into(),
            columns: columns.into(),
            ..Default::default()
        };
        bounded("Resize", CALL_DEADLINE, |context| self.stub.resize(context, &request)).await.map(drop)
    }

    pub(crate) async fn close_stdin(&self, id: &ProcessId, sent_bytes: u64) -> Result<(), CallError> {
        let request = message::CloseStdinRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            sent_bytes,
            ..Default::default()
        };
        bounded("CloseStdin", CALL_DEADLINE, |context| self.stub.close_stdin(context, &request)).await.map(drop)
    }

    pub(crate) async fn state(&self, id: &ProcessId) -> Result<message::StateReply, CallError> {
        let request = message::ProcessRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            ..Default::default()
        };
        bounded("State", CALL_DEADLINE, |context| self.stub.state(context, &request)).await
    }

    pub(crate) async fn next_events(&self) -> Result<message::EventsReply, CallError> {
        // Nothing may happen for as long as the sandbox lives.
        let request = message::Empty::new();
        self.stub.next_events(context::with_timeout(0), &request).await.map_err(|error| translate("NextEvents", error))
    }

    pub(crate) async fn set_network(&self, request: &message::SetNetworkRequest) -> Result<(), CallError> {
        bounded("SetNetwork", CALL_DEADLINE, |context| self.stub.set_network(context, request)).await.map(drop)
    }

    pub(crate) async fn set_clock(&self, realtime_ns: i64) -> Result<(), CallError> {
        let request = message::SetClockRequest { realtime_ns, ..Default::default() };
        bounded("SetClock", CALL_DEADLINE, |context| self.stub.set_clock(context, &request)).await.map(drop)
    }

    pub(crate) async fn find_devices(&self) -> Result<(), CallError> {
        let request = message::Empty::new();
        bounded("FindDevices", CALL_DEADLINE, |context| self.stub.find_devices(context, &request)).await.map(drop)
    }

    pub(crate) async fn online_resources(&self) -> Result<message::OnlineResourcesReply, CallError> {
        let request = message::Empty::new();
        bounded("OnlineResources", CALL_DEADLINE, |context| self.stub.online_resources(context, &request)).await
    }

    pub(crate) async fn stat_path(&self, container_id: &str, path: &str) -> Result<message::PathKind, CallError> {
        let request =
            message::PathRequest { container_id: container_id.to_owned(), path: path.to_owned(), ..Default::default() };
        Ok(bounded("StatPath", CALL_DEADLINE, |context| self.stub.stat_path(context, &request))
            .await?
            .kind
            .enum_value_or_default())
    }

    /// Copies for as long as it takes.
    pub(crate) async fn copy_in(&self, request: &message::CopyRequest) -> Result<(), CallError> {
        let answer = self.stub.copy_in(context::with_timeout(0), request).await;
        answer.map(drop).map_err(|error| translate("CopyIn", error))
    }

    /// As [`Self::copy_in`].
    pub(crate) async fn copy_out(&self, request: &message::CopyRequest) -> Result<(), CallError> {
        let answer = self.stub.copy_out(context::with_timeout(0), request).await;
        answer.map(drop).map_err(|error| translate("CopyOut", error))
    }

    /// Answered when the connection is over.
    pub(crate) async fn forward(&self, request: &message::ForwardRequest) -> Result<(), CallError> {
        let answer = self.stub.forward(context::with_timeout(0), request).await;
        answer.map(drop).map_err(|error| translate("Forward", error))
    }

    pub(crate) async fn update(&self, request: &message::UpdateRequest) -> Result<(), CallError> {
        bounded("Update", CALL_DEADLINE, |context| self.stub.update(context, request)).await.map(drop)
    }

    pub(crate) async fn delete(&self, id: &ProcessId, force: bool) -> Result<(), CallError> {
        let request = message::DeleteRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            force,
            ..Default::default()
        };
        bounded("Delete", CALL_DEADLINE, |context| self.stub.delete(context, &request)).await.map(drop)
    }

    pub(crate) async fn stats(&self, container_id: &str) -> Result<message::StatsReply, CallError> {
        let request = container(container_id);
        bounded("Stats", CALL_DEADLINE, |context| self.stub.stats(context, &request)).await
    }

    pub(crate) async fn pause(&self, container_id: &str) -> Result<(), CallError> {
        let request = container(container_id);
        bounded("Pause", CALL_DEADLINE, |context| self.stub.pause(context, &request)).await.map(drop)
    }

    pub(crate) async fn resume(&self, container_id: &str) -> Result<(), CallError> {
        let request = container(container_id);
        bounded("Resume", CALL_DEADLINE, |context| self.stub.resume(context, &request)).await.map(drop)
    }

    pub(crate) async fn list_processes(&self, container_id: &str) -> Result<Vec<message::GuestProcess>, CallError> {
        let request = container(container_id);
        Ok(bounded("ListProcesses", CALL_DEADLINE, |context| self.stub.list_processes(context, &request))
            .await?
            .processes)
    }

    pub(crate) async fn add_share(&self, request: &message::ShareRequest) -> Result<(), CallError> {
        bounded("AddShare", CALL_DEADLINE, |context| self.stub.add_share(context, request)).await.map(drop)
    }

    pub(crate) async fn remove_share(&self, tag: &str) -> Result<(), CallError> {
        let request = message::ShareRequest { tag: tag.to_owned(), ..Default::default() };
        bounded("RemoveShare", CALL_DEADLINE, |context| self.stub.remove_share(context, &request)).await.map(drop)
    }

    pub(crate) async fn add_memory_volume(&self, request: &message::MemoryVolumeRequest) -> Result<(), CallError> {
        bounded("AddMemoryVolume", CALL_DEADLINE, |context| self.stub.add_memory_volume(context, request))
            .await
            .map(drop)
    }

    pub(crate) async fn write_volume(&self, request: &message::WriteVolumeRequest) -> Result<(), CallError> {
        bounded("WriteVolume", CALL_DEADLINE, |context| self.stub.write_volume(context, request)).await.map(drop)
    }

    pub(crate) async fn listen_socket(&self, request: &message::ListenSocketRequest) -> Result<(), CallError> {
        bounded("ListenSocket", CALL_DEADLINE, |context| self.stub.listen_socket(context, request)).await.map(drop)
    }

    pub(crate) async fn accept_socket(&self, request: &message::AcceptSocketRequest) -> Result<(), CallError> {
        // Nobody may ever connect.
        let call = self.stub.accept_socket(context::with_timeout(0), request);
        call.await.map(drop).map_err(|error| translate("AcceptSocket", error))
    }

    /// A guest that does not answer is ended all the same, so there is nothing to report.
    pub(crate) async fn shutdown(&self) {
        let request = message::Empty::new();
        let call = self.stub.shutdown(context::with_duration(SHUTDOWN_DEADLINE), &request);
        let _ = tokio::time::timeout(SHUTDOWN_DEADLINE, call).await;
    }
}

fn container(container_id: &str) -> message::ContainerRequest {
    message::ContainerRequest { container_id: container_id.to_owned(), ..Default::default() }
}

async fn bounded<T, F: Future<Output = ttrpc::Result<T>>>(
    call: &'static str,
    deadline: Duration,
    ask: impl FnOnce(Context) -> F,
) -> Result<T, CallError> {
    // Later than our own deadline, which has a message of its own.
    let context = context::with_duration(deadline + Duration::from_secs(1));
    match tokio::time::timeout(deadline, ask(context)).await {
        Ok(answer) => answer.map_err(|error| translate(call, error)),
        Err(_) => Err(CallError::Deadline { call, deadline_ms: deadline.as_millis() }),
    }
}

fn translate(call: &'static str, error: ttrpc::Error) -> CallError {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            CallError::Refused { code: status.code.value(), message: escape(&status.message) }
        }
        other => CallError::Broken { call, detail: escape(&other.to_string()) },
    }
}
