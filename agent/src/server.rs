//! The protocol: each method calls one function; errors become gRPC status codes here and nowhere else.

use agent_api::message::{
    AcceptSocketRequest, CloseStdinRequest, ConfigureRequest, ContainerRequest, CopyRequest, CreateContainerRequest,
    DeleteRequest, Empty, EventsReply, ExecRequest, ForwardRequest, ListProcessesReply, ListenSocketRequest,
    MemoryVolumeRequest, OnlineResourcesReply, PathRequest, PathStat, ProcessReply, ProcessRequest, ResizeRequest,
    SetClockRequest, SetNetworkRequest, ShareRequest, SignalRequest, StateReply, StatsReply, UpdateRequest, WaitReply,
    WriteVolumeRequest,
};
use agent_api::service::{self, Agent};
use agent_api::{CONTROL_PORT, HOST_CID};
use anyhow::{Context as _, Result};
use async_trait::async_trait;
use tokio::sync::oneshot;
use tokio_vsock::{VsockAddr, VsockStream};
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::{Code, get_status};

use crate::cgroup::Cgroup;
use crate::container::{ContainerError, Containers};
use crate::events::Events;
use crate::network::NetworkError;
use crate::reaper::Reaper;
use crate::share::ShareTag;
use crate::socket_volume::Sockets;
use crate::{copied_volume, hotplug, memory_volume, network, sys};

/// Dials the host and serves until the connection ends.
pub(crate) async fn serve() -> Result<()> {
    let reaper = Reaper::start()?;
    let stream = VsockStream::connect(VsockAddr::new(HOST_CID, CONTROL_PORT)).await.context("cannot dial the host")?;
    let (closed, on_close) = oneshot::channel::<()>();
    let connection = watched::Watched::new(stream, closed);
    let events = Events::default();
    let containers = Containers::new(reaper, events.clone());
    let service =
        service::create_agent(std::sync::Arc::new(Service { containers, events, sockets: Sockets::default() }));
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
    events: Events,
    sockets: Sockets,
}

fn status(error: &ContainerError) -> ttrpc::Error {
    let code = match error {
        ContainerError::Id(_) | ContainerError::Json(_) | ContainerError::Invalid(_) => Code::INVALID_ARGUMENT,
        ContainerError::Exists { .. } => Code::ALREADY_EXISTS,
        ContainerError::NotFound { .. } | ContainerError::Exited => Code::NOT_FOUND,
        ContainerError::Unsupported(_) => Code::UNIMPLEMENTED,
        ContainerError::Child(_) | ContainerError::State { .. } | ContainerError::ExecRuns(_) => {
            Code::FAILED_PRECONDITION
        }
        ContainerError::Io { .. } => Code::INTERNAL,
    };
    rpc(code, &chain(error))
}

/// Answers with nothing but success or failure.
fn done(result: Result<(), ContainerError>) -> ttrpc::Result<Empty> {
    result.map(|()| Empty::new()).map_err(|error| status(&error))
}

fn made(pid: Result<i32, ContainerError>) -> ttrpc::Result<ProcessReply> {
    let pid = pid.map_err(|error| status(&error))?;
    Ok(ProcessReply { pid: u32::try_from(pid).unwrap_or_default(), ..Default::default() })
}

/// Runs a request to its end even when its caller gives up, so that nothing is left half made.
async fn to_the_end<T: Send + 'static>(
    request: impl Future<Output = Result<T, ContainerError>> + Send + 'static,
) -> Result<T, ContainerError> {
    let lost = |error| ContainerError::Child(format!("the request ended early: {error}"));
    tokio::spawn(request).await.unwrap_or_else(|error| Err(lost(error)))
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

fn set_clock(realtime_ns: i64) -> ttrpc::Result<()> {
    let time = rustix::time::Timespec { tv_sec: realtime_ns / 1_000_000_000, tv_nsec: realtime_ns % 1_000_000_000 };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time).map_err(|e| internal("set the clock", &e))
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
        set_clock(request.realtime_ns)?;
        sys::add_entropy(&request.entropy).map_err(|e| internal("add entropy", &e))?;
        rustix::system::sethostname(request.hostname.as_bytes()).map_err(|e| internal("set the host name", &e))?;
        for share in &request.shares {
            let action = format!("mount the share {}", share.tag);
            share_tag(&share.tag)?.mount(share).map_err(|e| internal(&action, &e))?;
        }
        Ok(Empty::new())
    }

    async fn set_clock(&self, _: &TtrpcContext, request: SetClockRequest) -> ttrpc::Result<Empty> {
        set_clock(request.realtime_ns)?;
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, request: CreateContainerRequest) -> ttrpc::Result<ProcessReply> {
        let containers = self.containers.clone();
        made(to_the_end(async move { containers.create(request).await }).await)
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        done(to_the_end(async move { containers.start(&request.container_id).await }).await)
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ProcessReply> {
        let containers = self.containers.clone();
        made(to_the_end(async move { containers.exec(request).await }).await)
    }

    async fn run_exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<WaitReply> {
        let containers = self.containers.clone();
        to_the_end(async move { containers.run_exec(request).await }).await.map_err(|error| status(&error))
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitReply> {
        self.containers.wait(&request.container_id, &request.exec_id).await.map_err(|e| status(&e))
    }

    async fn state(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<StateReply> {
        self.containers.state(&request.container_id, &request.exec_id).map_err(|e| status(&e))
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        done(self.containers.signal(&request))
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<Empty> {
        done(self.containers.resize(&request))
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: CloseStdinRequest) -> ttrpc::Result<Empty> {
        done(self.containers.close_stdin(&request.container_id, &request.exec_id, request.sent_bytes))
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        let delete = async move { containers.delete(&request.container_id, &request.exec_id, request.force).await };
        done(to_the_end(delete).await)
    }

    async fn stat_path(&self, _: &TtrpcContext, request: PathRequest) -> ttrpc::Result<PathStat> {
        self.containers.stat_path(&request).await.map_err(|e| status(&e))
    }

    async fn copy_out(&self, _: &TtrpcContext, request: CopyRequest) -> ttrpc::Result<Empty> {
        done(self.containers.copy_out(&request).await)
    }

    async fn copy_in(&self, _: &TtrpcContext, request: CopyRequest) -> ttrpc::Result<Empty> {
        done(self.containers.copy_in(&request).await)
    }

    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        done(self.containers.forward(&request).await)
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<StatsReply> {
        self.containers.stats(&request.container_id).map_err(|e| status(&e))
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        done(to_the_end(async move { containers.update(&request).await }).await)
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        done(to_the_end(async move { containers.freeze(&request.container_id, true).await }).await)
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        done(to_the_end(async move { containers.freeze(&request.container_id, false).await }).await)
    }

    async fn list_processes(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<ListProcessesReply> {
        let processes = self.containers.list_processes(&request.container_id).map_err(|e| status(&e))?;
        Ok(ListProcessesReply { processes, ..Default::default() })
    }

    async fn add_share(&self, _: &TtrpcContext, request: ShareRequest) -> ttrpc::Result<Empty> {
        let tag = share_tag(&request.tag)?;
        tag.plug_in(&request).await.map_err(|e| internal("mount the share", &e))?;
        Ok(Empty::new())
    }

    async fn remove_share(&self, _: &TtrpcContext, request: ShareRequest) -> ttrpc::Result<Empty> {
        share_tag(&request.tag)?.pull_out().map_err(|e| internal("unmount the share", &e))?;
        Ok(Empty::new())
    }

    async fn add_memory_volume(&self, _: &TtrpcContext, request: MemoryVolumeRequest) -> ttrpc::Result<Empty> {
        let volume = share_tag(&request.name)?;
        memory_volume::add(&volume, &request).map_err(|e| internal("make the volume in memory", &e))?;
        Ok(Empty::new())
    }

    async fn write_volume(&self, _: &TtrpcContext, request: WriteVolumeRequest) -> ttrpc::Result<Empty> {
        let volume = share_tag(&request.name)?;
        copied_volume::write(&volume, &request).map_err(|e| internal("write the volume", &e))?;
        Ok(Empty::new())
    }

    async fn listen_socket(&self, _: &TtrpcContext, request: ListenSocketRequest) -> ttrpc::Result<Empty> {
        let volume = share_tag(&request.name)?;
        self.sockets.listen(&volume, &request.ownership).map_err(|e| internal("make the socket", &e))?;
        Ok(Empty::new())
    }

    async fn accept_socket(&self, _: &TtrpcContext, request: AcceptSocketRequest) -> ttrpc::Result<Empty> {
        let volume = share_tag(&request.name)?;
        self.sockets.accept(&volume, request.stream).await.map_err(|e| internal("carry a connection", &e))?;
        Ok(Empty::new())
    }

    async fn find_devices(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        hotplug::rescan_pci().map_err(|e| internal("look at the PCI bus", &e))?;
        Ok(Empty::new())
    }

    async fn online_resources(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<OnlineResourcesReply> {
        hotplug::online_everything().map_err(|e| internal("bring CPUs and memory online", &e))
    }

    async fn set_network(&self, _: &TtrpcContext, request: SetNetworkRequest) -> ttrpc::Result<Empty> {
        network::apply(&request).await.map_err(|error| match error {
            NetworkError::Invalid { .. } => rpc(Code::INVALID_ARGUMENT, &chain(&error)),
            NetworkError::NoInterface(_) => rpc(Code::NOT_FOUND, &chain(&error)),
            error => rpc(Code::INTERNAL, &chain(&error)),
        })?;
        Ok(Empty::new())
    }

    async fn next_events(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<EventsReply> {
        Ok(self.events.next().await)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        // None may write while the file systems are flushed; there may be none.
        let _ = Cgroup::of_all().kill();
        // A share whose host does not answer stops everything here; the host waits for no guest.
        rustix::fs::sync();
        Ok(Empty::new())
    }
}
