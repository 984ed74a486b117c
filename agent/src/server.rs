//! The ttrpc service on the one connection that the agent dials.
//!
//! Containers are not made yet: `CreateContainer` is refused as UNIMPLEMENTED, so no container id is ever known and
//! every other container request keeps its default answer, NOT_FOUND.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use agent_api::message::{ConfigureRequest, CreateContainerRequest, Empty, ProcessReply, ShareRequest};
use agent_api::service::{Agent, create_agent};
use agent_api::{CONTROL_PORT, HOST_CID};
use async_trait::async_trait;
use futures::StreamExt as _;
use rustix::time::{ClockId, Timespec, clock_settime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use ttrpc::r#async::transport::{Listener, Socket};
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::{Code, get_status};

use crate::share::ShareTag;
use crate::sys;

const MIN_ENTROPY_LEN: usize = 32;

/// Dials the host and serves until the connection is gone.
pub(crate) async fn serve_host() -> Result<(), ttrpc::Error> {
    let socket = Socket::connect(format!("vsock://{HOST_CID}:{CONTROL_PORT}"))
        .await
        .map_err(|error| ttrpc::Error::Others(format!("dial host port {CONTROL_PORT}: {error}")))?;
    let (closed, lost) = oneshot::channel();
    let watched = Watched { socket, _closed: closed };
    // The stream stays pending after its one socket: its end would mean nothing to the server.
    let incoming = futures::stream::iter([io::Result::Ok(watched)]).chain(futures::stream::pending());
    let service = create_agent(Arc::new(AgentService));
    let mut server = Server::new().add_listener(Listener::new(incoming)).register_service(service);
    server.start().await?;
    // Only the drop of `_closed` ends this, hence always an error that says nothing.
    let _ = lost.await;
    Ok(())
}

/// The connection; its drop tells `serve_host` that the host is gone.
struct Watched {
    socket: Socket,
    _closed: oneshot::Sender<()>,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

struct AgentService;

#[async_trait]
impl Agent for AgentService {
    async fn configure(&self, _: &TtrpcContext, request: ConfigureRequest) -> ttrpc::Result<Empty> {
        if request.entropy.len() < MIN_ENTROPY_LEN {
            return Err(status(Code::INVALID_ARGUMENT, "entropy is shorter than 32 bytes"));
        }
        let tags = request.shares.iter().map(|tag| share_tag(tag)).collect::<ttrpc::Result<Vec<_>>>()?;
        let now = Timespec {
            tv_sec: request.realtime_ns.div_euclid(1_000_000_000),
            tv_nsec: request.realtime_ns.rem_euclid(1_000_000_000),
        };
        clock_settime(ClockId::Realtime, now).map_err(|error| internal("set the clock", error.into()))?;
        sys::add_entropy(&request.entropy).map_err(|error| internal("add entropy", error))?;
        rustix::system::sethostname(request.hostname.as_bytes())
            .map_err(|error| internal("set the host name", error.into()))?;
        for tag in tags {
            tag.mount(false).map_err(|error| internal("mount a share", error))?;
        }
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, _: CreateContainerRequest) -> ttrpc::Result<ProcessReply> {
        Err(status(Code::UNIMPLEMENTED, "containers are not implemented in this agent"))
    }

    async fn add_share(&self, _: &TtrpcContext, request: ShareRequest) -> ttrpc::Result<Empty> {
        let tag = share_tag(&request.tag)?;
        tag.mount(request.read_only).map_err(|error| internal("mount a share", error))?;
        Ok(Empty::new())
    }

    async fn remove_share(&self, _: &TtrpcContext, request: ShareRequest) -> ttrpc::Result<Empty> {
        share_tag(&request.tag)?.unmount().map_err(|error| internal("unmount a share", error))?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        sys::reset_machine().map_err(|error| internal("reset the machine", error))?;
        Ok(Empty::new())
    }
}

fn share_tag(tag: &str) -> ttrpc::Result<ShareTag> {
    ShareTag::try_from(tag).map_err(|error| status(Code::INVALID_ARGUMENT, &error))
}

fn internal(what: &str, error: io::Error) -> ttrpc::Error {
    status(Code::INTERNAL, &format!("{what}: {error}"))
}

fn status(code: Code, text: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, text))
}
