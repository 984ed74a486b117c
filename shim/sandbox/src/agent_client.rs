//! Calls to the agent. Its answers are a guest's bytes: deadlines everywhere, text escaped, numbers taken as they are typed.

use std::time::Duration;

use agent_api::service::AgentClient as Stub;
use agent_api::{message, service};
use tokio::net::UnixStream;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;

use crate::text::escape;
use crate::{CallError, ProcessId};

/// Deadline of a call that only does work in the guest.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// Deadline of the farewell.
const SHUTDOWN_DEADLINE: Duration = Duration::from_millis(300);

/// The connection to the agent.
#[derive(Clone)]
pub(crate) struct AgentClient(Stub);

impl AgentClient {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self(service::AgentClient::new(ttrpc::asynchronous::Client::new(Socket::new(stream))))
    }

    pub(crate) async fn configure(&self, request: &message::ConfigureRequest) -> Result<(), CallError> {
        bounded("Configure", self.0.configure(context::with_duration(CALL_DEADLINE), request)).await.map(drop)
    }

    pub(crate) async fn create(&self, request: &message::CreateContainerRequest) -> Result<(), CallError> {
        let call = self.0.create_container(context::with_duration(CALL_DEADLINE), request);
        bounded("CreateContainer", call).await.map(drop)
    }

    pub(crate) async fn start(&self, container_id: &str) -> Result<(), CallError> {
        let request = container(container_id);
        bounded("StartContainer", self.0.start_container(context::with_duration(CALL_DEADLINE), &request))
            .await
            .map(drop)
    }

    pub(crate) async fn exec(&self, request: &message::ExecRequest) -> Result<(), CallError> {
        bounded("Exec", self.0.exec(context::with_duration(CALL_DEADLINE), request)).await.map(drop)
    }

    pub(crate) async fn run_exec(&self, request: &message::ExecRequest) -> Result<message::WaitReply, CallError> {
        // A process runs as long as it likes.
        self.0.run_exec(context::with_timeout(0), request).await.map_err(|error| translate("RunExec", error))
    }

    pub(crate) async fn wait(&self, id: &ProcessId) -> Result<message::WaitReply, CallError> {
        let request = message::ProcessRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            ..Default::default()
        };
        // A process runs as long as it likes.
        self.0.wait(context::with_timeout(0), &request).await.map_err(|error| translate("Wait", error))
    }

    pub(crate) async fn signal(&self, id: &ProcessId, signal: u32, all: bool) -> Result<(), CallError> {
        let request = message::SignalRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        bounded("Signal", self.0.signal(context::with_duration(CALL_DEADLINE), &request)).await.map(drop)
    }

    pub(crate) async fn resize(&self, id: &ProcessId, rows: u16, columns: u16) -> Result<(), CallError> {
        let request = message::ResizeRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            rows: rows.into(),
            columns: columns.into(),
            ..Default::default()
        };
        bounded("Resize", self.0.resize(context::with_duration(CALL_DEADLINE), &request)).await.map(drop)
    }

    pub(crate) async fn close_stdin(&self, id: &ProcessId, sent_bytes: u64) -> Result<(), CallError> {
        let request = message::CloseStdinRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            sent_bytes,
            ..Default::default()
        };
        bounded("CloseStdin", self.0.close_stdin(context::with_duration(CALL_DEADLINE), &request)).await.map(drop)
    }

    pub(crate) async fn state(&self, id: &ProcessId) -> Result<message::StateReply, CallError> {
        let request = message::ProcessRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            ..Default::default()
        };
        bounded("State", self.0.state(context::with_duration(CALL_DEADLINE), &request)).await
    }

    pub(crate) async fn next_events(&self) -> Result<message::EventsReply, CallError> {
        // Nothing may happen for as long as the sandbox lives.
        let request = message::Empty::new();
        self.0.next_events(context::with_timeout(0), &request).await.map_err(|error| translate("NextEvents", error))
    }

    pub(crate) async fn set_network(&self, request: &message::SetNetworkRequest) -> Result<(), CallError> {
        bounded("SetNetwork", self.0.set_network(context::with_duration(CALL_DEADLINE), request)).await.map(drop)
    }

    pub(crate) async fn set_clock(&self, realtime_ns: i64) -> Result<(), CallError> {
        let request = message::SetClockRequest { realtime_ns, ..Default::default() };
        bounded("SetClock", self.0.set_clock(context::with_duration(CALL_DEADLINE), &request)).await.map(drop)
    }

    pub(crate) async fn online_resources(&self) -> Result<message::OnlineResourcesReply, CallError> {
        let request = message::Empty::new();
        bounded("OnlineResources", self.0.online_resources(context::with_duration(CALL_DEADLINE), &request)).await
    }

    pub(crate) async fn stat_path(&self, container_id: &str, path: &str) -> Result<message::PathKind, CallError> {
        let request =
            message::PathRequest { container_id: container_id.to_owned(), path: path.to_owned(), ..Default::default() };
        let call = self.0.stat_path(context::with_duration(CALL_DEADLINE), &request);
        Ok(bounded("StatPath", call).await?.kind.enum_value_or_default())
    }

    /// Copies for as long as it takes.
    pub(crate) async fn copy_in(&self, request: &message::CopyRequest) -> Result<(), CallError> {
        let answer = self.0.copy_in(context::with_timeout(0), request).await;
        answer.map(drop).map_err(|error| translate("CopyIn", error))
    }

    /// As [`Self::copy_in`].
    pub(crate) async fn copy_out(&self, request: &message::CopyRequest) -> Result<(), CallError> {
        let answer = self.0.copy_out(context::with_timeout(0), request).await;
        answer.map(drop).map_err(|error| translate("CopyOut", error))
    }

    /// Answered when the connection is over.
    pub(crate) async fn forward(&self, request: &message::ForwardRequest) -> Result<(), CallError> {
        let answer = self.0.forward(context::with_timeout(0), request).await;
        answer.map(drop).map_err(|error| translate("Forward", error))
    }

    pub(crate) async fn update(&self, request: &message::UpdateRequest) -> Result<(), CallError> {
        bounded("Update", self.0.update(context::with_duration(CALL_DEADLINE), request)).await.map(drop)
    }

    pub(crate) async fn delete(&self, id: &ProcessId, force: bool) -> Result<(), CallError> {
        let request = message::DeleteRequest {
            container_id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            force,
            ..Default::default()
        };
        bounded("Delete", self.0.delete(context::with_duration(CALL_DEADLINE), &request)).await.map(drop)
    }

    pub(crate) async fn stats(&self, container_id: &str) -> Result<message::StatsReply, CallError> {
        bounded("Stats", self.0.stats(context::with_duration(CALL_DEADLINE), &container(container_id))).await
    }

    pub(crate) async fn pause(&self, container_id: &str) -> Result<(), CallError> {
        bounded("Pause", self.0.pause(context::with_duration(CALL_DEADLINE), &container(container_id))).await.map(drop)
    }

    pub(crate) async fn resume(&self, container_id: &str) -> Result<(), CallError> {
        bounded("Resume", self.0.resume(context::with_duration(CALL_DEADLINE), &container(container_id)))
            .await
            .map(drop)
    }

    pub(crate) async fn list_processes(&self, container_id: &str) -> Result<Vec<message::GuestProcess>, CallError> {
        let request = container(container_id);
        let call = self.0.list_processes(context::with_duration(CALL_DEADLINE), &request);
        Ok(bounded("ListProcesses", call).await?.processes)
    }

    pub(crate) async fn add_share(&self, tag: &str) -> Result<(), CallError> {
        let request = message::ShareRequest { tag: tag.to_owned(), ..Default::default() };
        bounded("AddShare", self.0.add_share(context::with_duration(CALL_DEADLINE), &request)).await.map(drop)
    }

    pub(crate) async fn remove_share(&self, tag: &str) -> Result<(), CallError> {
        let request = message::ShareRequest { tag: tag.to_owned(), ..Default::default() };
        bounded("RemoveShare", self.0.remove_share(context::with_duration(CALL_DEADLINE), &request)).await.map(drop)
    }

    pub(crate) async fn add_memory_volume(&self, request: &message::MemoryVolumeRequest) -> Result<(), CallError> {
        let call = self.0.add_memory_volume(context::with_duration(CALL_DEADLINE), request);
        bounded("AddMemoryVolume", call).await.map(drop)
    }

    pub(crate) async fn write_volume(&self, request: &message::WriteVolumeRequest) -> Result<(), CallError> {
        let call = self.0.write_volume(context::with_duration(CALL_DEADLINE), request);
        bounded("WriteVolume", call).await.map(drop)
    }

    pub(crate) async fn listen_socket(&self, request: &message::ListenSocketRequest) -> Result<(), CallError> {
        let call = self.0.listen_socket(context::with_duration(CALL_DEADLINE), request);
        bounded("ListenSocket", call).await.map(drop)
    }

    pub(crate) async fn accept_socket(&self, request: &message::AcceptSocketRequest) -> Result<(), CallError> {
        // Nobody may ever connect.
        let call = self.0.accept_socket(context::with_timeout(0), request);
        call.await.map(drop).map_err(|error| translate("AcceptSocket", error))
    }

    /// The guest may reset before it answers, so there is nothing to report.
    pub(crate) async fn shutdown(&self) {
        let request = message::Empty::new();
        let call = self.0.shutdown(context::with_duration(SHUTDOWN_DEADLINE), &request);
        let _ = tokio::time::timeout(SHUTDOWN_DEADLINE, call).await;
    }
}

fn container(container_id: &str) -> message::ContainerRequest {
    message::ContainerRequest { container_id: container_id.to_owned(), ..Default::default() }
}

async fn bounded<T>(call: &'static str, answer: impl Future<Output = ttrpc::Result<T>>) -> Result<T, CallError> {
    match tokio::time::timeout(CALL_DEADLINE, answer).await {
        Ok(answer) => answer.map_err(|error| translate(call, error)),
        Err(_) => Err(CallError::Deadline { call, deadline_ms: 30_000 }),
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
