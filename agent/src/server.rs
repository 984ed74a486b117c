//! The protocol: each method calls one function; errors become gRPC status codes here and nowhere else.

use agent_api::message::{
    ConfigureRequest, ContainerRequest, CreateContainerRequest, DeleteRequest, Empty, EventsReply, ExecRequest,
    GuestProcess, ListProcessesReply, OnlineResourcesReply, ProcessReply, ProcessRequest, ResizeRequest, ShareRequest,
    SignalRequest, StatsReply, UpdateRequest, WaitReply,
};
use agent_api::service::{self, Agent};
use agent_api::{CONTROL_PORT, HOST_CID};
use anyhow::{Context as _, Result};
use async_trait::async_trait;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::oneshot;
use tokio_vsock::{VsockAddr, VsockStream};
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::{Code, get_status};

use crate::cgroup::Cgroup;
use crate::container::{ContainerError, Containers};
use crate::reaper::Reaper;
use crate::share::ShareTag;
use crate::sys;

/// Dials the host and serves until the connection ends.
pub(crate) async fn serve() -> Result<()> {
    let reaper = Reaper::start()?;
    let stream = VsockStream::connect(VsockAddr::new(HOST_CID, CONTROL_PORT)).await.context("cannot dial the host")?;
    let (closed, on_close) = oneshot::channel::<()>();
    let connection = watched::Watched::new(stream, closed);
    let service = service::create_agent(std::sync::Arc::new(Service { containers: Containers::new(reaper) }));
    let incoming = async_stream(connection);
    let mut server = ttrpc::asynchronous::Server::new().add_listener(Listener::new(incoming)).register_service(service);
    server.start().await?;
    // The sender is dropped with the connection.
    let _ = on_close.await;
    Ok(())
}

/// A listener that has one connection and never another.
fn async_stream(connection: watched::Watched) -> impl futures::Stream<Item = std::io::Result<watched::Watched>> + Send {
    use futures::StreamExt as _;
    futures::stream::iter([Ok(connection)]).chain(futures::stream::pending())
}

mod watched;

struct Service {
    containers: Containers,
}

fn status(error: &ContainerError) -> ttrpc::Error {
    let code = match error {
        ContainerError::Id(_) | ContainerError::Json(_) => Code::INVALID_ARGUMENT,
        ContainerError::Exists { .. } => Code::ALREADY_EXISTS,
        ContainerError::NotFound { .. } => Code::NOT_FOUND,
        ContainerError::Unsupported(_) => Code::UNIMPLEMENTED,
        ContainerError::Child(_) => Code::FAILED_PRECONDITION,
        ContainerError::Io { .. } => Code::INTERNAL,
    };
    rpc(code, &chain(error))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

fn rpc(code: Code, message: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message))
}

fn share_tag(tag: &str) -> ttrpc::Result<ShareTag> {
    ShareTag::try_from(tag).map_err(|error| rpc(Code::INVALID_ARGUMENT, &error))
}

fn internal(action: &str, error: &dyn std::error::Error) -> ttrpc::Error {
    rpc(Code::INTERNAL, &format!("cannot {action}: {}", chain(error)))
}

#[async_trait]
impl Agent for Service {
    async fn configure(&self, _: &TtrpcContext, request: ConfigureRequest) -> ttrpc::Result<Empty> {
        let time = rustix::time::Timespec {
            tv_sec: request.realtime_ns / 1_000_000_000,
            tv_nsec: request.realtime_ns % 1_000_000_000,
        };
        rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)
            .map_err(|e| internal("set the clock", &e))?;
        sys::add_entropy(&request.entropy).map_err(|e| internal("add entropy", &e))?;
        rustix::system::sethostname(request.hostname.as_bytes()).map_err(|e| internal("set the host name", &e))?;
        for tag in &request.shares {
            share_tag(tag)?.mount(false).map_err(|e| internal(&format!("mount the share {tag}"), &e))?;
        }
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, request: CreateContainerRequest) -> ttrpc::Result<ProcessReply> {
        let pid = self.containers.create(&request).await.map_err(|e| status(&e))?;
        Ok(ProcessReply { pid: u32::try_from(pid).unwrap_or_default(), ..Default::default() })
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.start(&request.container_id).await.map_err(|e| status(&e))?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ProcessReply> {
        let pid = self.containers.exec(&request).await.map_err(|e| status(&e))?;
        Ok(ProcessReply { pid: u32::try_from(pid).unwrap_or_default(), ..Default::default() })
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitReply> {
        self.containers.wait(&request.container_id, &request.exec_id).await.map_err(|e| status(&e))
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        let pid = self.containers.pid(&request.container_id, &request.exec_id).map_err(|e| status(&e))?;
        if self.containers.exited(&request.container_id, &request.exec_id).map_err(|e| status(&e))? {
            return Err(rpc(Code::NOT_FOUND, "the process has exited"));
        }
        let number = i32::try_from(request.signal).unwrap_or_default();
        let signal = Signal::from_named_raw(number)
            .ok_or_else(|| rpc(Code::INVALID_ARGUMENT, &format!("no such signal: {number}")))?;
        let targets = if request.all {
            Cgroup::of(&request.container_id).processes().map_err(|e| internal("list processes", &e))?
        } else {
            vec![pid]
        };
        for pid in targets.into_iter().filter_map(Pid::from_raw) {
            kill_process(pid, signal).map_err(|e| internal("send the signal", &e))?;
        }
        Ok(Empty::new())
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<Empty> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        self.containers.resize(id, exec_id, request.rows, request.columns).map_err(|e| status(&e))?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        self.containers.close_stdin(&request.container_id, &request.exec_id).map_err(|e| status(&e))?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<Empty> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        self.containers.delete(id, exec_id, request.force).await.map_err(|e| status(&e))?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<StatsReply> {
        self.containers.pid(&request.container_id, "").map_err(|e| status(&e))?;
        Cgroup::of(&request.container_id).stats().map_err(|e| internal("read the cgroup", &e))
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        self.containers.pid(&request.container_id, "").map_err(|e| status(&e))?;
        let resources =
            serde_json::from_slice(&request.resources).map_err(|e| rpc(Code::INVALID_ARGUMENT, &e.to_string()))?;
        Cgroup::of(&request.container_id).update(&resources).map_err(|e| internal("write the cgroup", &e))?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.pid(&request.container_id, "").map_err(|e| status(&e))?;
        Cgroup::of(&request.container_id).freeze(true).map_err(|e| internal("freeze the cgroup", &e))?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.pid(&request.container_id, "").map_err(|e| status(&e))?;
        Cgroup::of(&request.container_id).freeze(false).map_err(|e| internal("thaw the cgroup", &e))?;
        Ok(Empty::new())
    }

    async fn list_processes(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<ListProcessesReply> {
        self.containers.pid(&request.container_id, "").map_err(|e| status(&e))?;
        let pids = Cgroup::of(&request.container_id).processes().map_err(|e| internal("list processes", &e))?;
        let process = |pid: i32| {
            // A process may end between the two looks; it is then listed without a command.
            let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = command.trim_end_matches('\0').replace('\0', " ");
            GuestProcess { pid: u32::try_from(pid).unwrap_or_default(), command, ..Default::default() }
        };
        Ok(ListProcessesReply { processes: pids.into_iter().map(process).collect(), ..Default::default() })
    }

    async fn add_share(&self, _: &TtrpcContext, request: ShareRequest) -> ttrpc::Result<Empty> {
        share_tag(&request.tag)?.mount(request.read_only).map_err(|e| internal("mount the share", &e))?;
        Ok(Empty::new())
    }

    async fn remove_share(&self, _: &TtrpcContext, request: ShareRequest) -> ttrpc::Result<Empty> {
        share_tag(&request.tag)?.unmount().map_err(|e| internal("unmount the share", &e))?;
        Ok(Empty::new())
    }

    async fn online_resources(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<OnlineResourcesReply> {
        Err(rpc(Code::UNIMPLEMENTED, "CPUs and memory cannot be added yet"))
    }

    async fn next_events(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<EventsReply> {
        Err(rpc(Code::UNIMPLEMENTED, "events are not sent yet; wait for each process"))
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        sys::reset_machine().map_err(|e| internal("reset the VM", &e))?;
        Ok(Empty::new())
    }
}
