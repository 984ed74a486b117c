//! The control socket of a container: what other `vmrun` processes ask of the process that owns it.
//!
//! One JSON object per line each way; only root reaches the socket (mode 0600). An exec is answered by [`Answer::Started`]
//! together with the connected streams of the process as descriptors, in the order stdin, stdout, stderr: the owner is not in
//! the data path, so no reader of output can hold it up.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use sandbox::{CallError, ProcessId, ProcessStreams, StreamCall, fds, message};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, Interest, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};

use crate::container::{CANNOT_START, Container, Exec, ExecExit};
use crate::signals::SIGKILL;

/// What can be asked of the owner.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Start a process; more requests about it may follow on the same connection.
    Exec(Box<ExecRequest>),
    /// Resize the terminal of the exec.
    Resize(u16, u16),
    /// Signal the exec of this connection, or else the container's command. SIGKILL is answered when the command is dead.
    Signal(u32),
    /// Ask the command to end by a signal, or by its own stop signal; kill it when it has not ended in time.
    Stop { signal: Option<u32>, patience_ms: u64 },
    /// Tell the exit status of the command when the container has ended.
    Wait,
    /// Freeze the container.
    Pause,
    /// Let it go on.
    Unpause,
    /// What the container uses.
    Stats,
    /// What is at a path of the container.
    StatPath(String),
    /// Read a path as an archive in which it is called `name`; the stream comes with the answer, the outcome follows.
    CopyOut { path: String, name: String },
    /// Unpack an archive into a folder, likewise.
    CopyIn { path: String },
    /// Connect a stream with a port of the container, likewise.
    Forward { port: u16 },
}

/// A process that is to run in the container.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct ExecRequest {
    /// The command and its arguments.
    pub(crate) command: Vec<String>,
    /// Variables beside the container's own.
    pub(crate) env: Vec<String>,
    /// Working directory, or the container's.
    pub(crate) workdir: Option<String>,
    /// `USER[:GROUP]`, or the container's.
    pub(crate) user: Option<String>,
    /// Whether it reads from a stream.
    pub(crate) stdin: bool,
    /// Rows and columns of its terminal.
    pub(crate) terminal: Option<(u16, u16)>,
    /// Nobody stays with it.
    pub(crate) detach: bool,
}

/// What the owner answers.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// The process runs; its streams come with this message.
    Started,
    /// The process has exited, or the container.
    Exited(u8),
    /// Done.
    Done,
    /// What the container uses.
    Stats(Usage),
    /// What is at the path.
    Path(PathKind),
    /// Refused or failed, with the cause.
    Failed(String),
}

/// What is at a path; symbolic links are followed.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PathKind {
    Nothing,
    Folder,
    File,
}

impl From<message::PathKind> for PathKind {
    fn from(kind: message::PathKind) -> Self {
        match kind {
            message::PathKind::PATH_KIND_NONE => Self::Nothing,
            message::PathKind::PATH_KIND_FOLDER => Self::Folder,
            message::PathKind::PATH_KIND_FILE => Self::File,
        }
    }
}

/// What a container uses, in the units of cgroup v2, and what its VM's interfaces have carried.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Usage {
    pub(crate) cpu_usage_us: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) memory_limit_bytes: u64,
    pub(crate) io_read_bytes: u64,
    pub(crate) io_write_bytes: u64,
    pub(crate) net_rx_bytes: u64,
    pub(crate) net_tx_bytes: u64,
    pub(crate) pids: u64,
}

impl From<message::StatsReply> for Usage {
    fn from(stats: message::StatsReply) -> Self {
        // As Docker does: what the kernel can drop at once is not counted.
        let reclaimable = stats.memory_stat.get("inactive_file").copied().unwrap_or_default();
        Self {
            cpu_usage_us: stats.cpu_usage_us,
            memory_bytes: stats.memory_current.saturating_sub(reclaimable),
            memory_limit_bytes: stats.memory_max,
            io_read_bytes: stats.io_read_bytes,
            io_write_bytes: stats.io_write_bytes,
            net_rx_bytes: 0,
            net_tx_bytes: 0,
            pids: stats.pids_current,
        }
    }
}

/// Pause after a connection could not be taken: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Makes the socket, reachable for root only.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers for as long as the task lives.
pub(crate) async fn serve(listener: UnixListener, container: Rc<Container>) {
    for number in 1_u64.. {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection to the control socket");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let container = container.clone();
        tokio::task::spawn_local(async move {
            let exec_id = format!("exec{number}");
            if let Err(error) = converse(stream, &container, &exec_id).await {
                tracing::debug!(error = format!("{error:#}"), "a control connection ended");
            }
        });
    }
}

async fn converse(stream: UnixStream, container: &Rc<Container>, exec_id: &str) -> Result<()> {
    let (read_half, socket) = stream.into_split();
    let mut lines = tokio::io::BufReader::new(read_half).lines();
    let Some(request) = next(&mut lines).await? else { return Ok(()) };
    // Held until we have answered: the owner stays for as long.
    let mut exited = container.exit_watch();
    let is_end = matches!(request, Request::Signal(SIGKILL) | Request::Stop { .. });
    let outcome = match request {
        Request::Exec(request) => return exec(&mut lines, &socket, container, exec_id, &request).await,
        Request::Wait => {
            let exit_code = exited.wait_for(Option::is_some).await?.unwrap_or_default();
            return answer(&socket, &Answer::Exited(exit_code), &[]).await;
        }
        Request::Signal(signal) => container.signal(signal).await,
        Request::Stop { signal, patience_ms } => container.stop(signal, Duration::from_millis(patience_ms)).await,
        Request::Pause => container.pause().await,
        Request::Unpause => container.unpause().await,
        Request::Stats => match usage(container).await {
            Ok(usage) => return answer(&socket, &Answer::Stats(usage), &[]).await,
            Err(error) => Err(error),
        },
        Request::StatPath(path) => match container.sandbox.stat_path(container.name(), &path).await {
            Ok(kind) => return answer(&socket, &Answer::Path(kind.into()), &[]).await,
            Err(error) => Err(error.into()),
        },
        Request::CopyOut { path, name } => {
            return hand_over(&socket, container.sandbox.copy_out(container.name(), &path, &name).await).await;
        }
        Request::CopyIn { path } => {
            return hand_over(&socket, container.sandbox.copy_in(container.name(), &path).await).await;
        }
        Request::Forward { port } => {
            return hand_over(&socket, container.sandbox.forward(container.name(), port).await).await;
        }
        Request::Resize(..) => Ok(()),
    };
    if is_end && outcome.is_ok() {
        // Whoever ends a container may remove it next.
        exited.wait_for(Option::is_some).await?;
    }
    answer(&socket, &outcome.map_or_else(|error| Answer::Failed(format!("{error:#}")), |()| Answer::Done), &[]).await
}

async fn exec(
    lines: &mut Lines<tokio::io::BufReader<OwnedReadHalf>>,
    socket: &OwnedWriteHalf,
    container: &Rc<Container>,
    exec_id: &str,
    request: &ExecRequest,
) -> Result<()> {
    let Exec { id, streams, exit } = match container.exec(exec_id, request).await {
        Ok(started) => started,
        Err(error) => return answer(socket, &Answer::Failed(format!("{error:#}")), &[]).await,
    };
    let streams = descriptors(streams)?;
    let borrowed: Vec<BorrowedFd<'_>> = streams.iter().map(|fd| fd.as_fd()).collect();
    answer(socket, &Answer::Started, &borrowed).await?;
    drop(borrowed);
    drop(streams);
    let outcome = attend(lines, container, &id, exit).await;
    answer(socket, &outcome, &[]).await
}

async fn usage(container: &Container) -> Result<Usage> {
    let mut usage = Usage::from(container.stats().await?);
    for interface in container.sandbox.network_stats().await? {
        usage.net_rx_bytes = usage.net_rx_bytes.saturating_add(interface.rx_bytes);
        usage.net_tx_bytes = usage.net_tx_bytes.saturating_add(interface.tx_bytes);
    }
    Ok(usage)
}

/// Hands over the stream of a call, then tells its outcome.
async fn hand_over(socket: &OwnedWriteHalf, begun: Result<StreamCall, CallError>) -> Result<()> {
    let outcome = match begun {
        Ok(call) => {
            answer(socket, &Answer::Started, &[call.stream.as_fd()]).await?;
            call.done().await
        }
        Err(error) => Err(error),
    };
    answer(socket, &outcome.map_or_else(|error| Answer::Failed(error.to_string()), |()| Answer::Done), &[]).await
}

fn descriptors(streams: ProcessStreams) -> io::Result<Vec<OwnedFd>> {
    let streams = [streams.stdin, streams.stdout, streams.stderr];
    streams.into_iter().flatten().map(|stream| stream.into_std().map(OwnedFd::from)).collect()
}

/// Stays with an exec until it exits; the client may resize and signal it meanwhile.
async fn attend(
    lines: &mut Lines<tokio::io::BufReader<OwnedReadHalf>>,
    container: &Container,
    id: &ProcessId,
    mut exit: ExecExit<'_>,
) -> Answer {
    let mut client_is_there = true;
    let exit = loop {
        tokio::select! {
            exit = &mut exit => break exit,
            request = next(lines), if client_is_there => match request {
                Ok(Some(Request::Resize(rows, columns))) => drop(container.sandbox.resize(id, rows, columns).await),
                Ok(Some(Request::Signal(signal))) => drop(container.sandbox.signal(id, signal, false).await),
                _ => client_is_there = false,
            },
        }
    };
    match exit {
        Ok(exit) => Answer::Exited(u8::try_from(exit.exit_code).unwrap_or(u8::MAX)),
        Err(refusal @ CallError::Refused { .. }) => Answer::Failed(format!("{CANNOT_START}: {refusal}")),
        Err(error) => Answer::Failed(error.to_string()),
    }
}

async fn next(lines: &mut Lines<tokio::io::BufReader<OwnedReadHalf>>) -> Result<Option<Request>> {
    match lines.next_line().await? {
        Some(line) => Ok(Some(serde_json::from_str(&line)?)),
        None => Ok(None),
    }
}

async fn answer(socket: &OwnedWriteHalf, answer: &Answer, passed: &[BorrowedFd<'_>]) -> Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let socket: &UnixStream = socket.as_ref();
    socket.async_io(Interest::WRITABLE, || fds::send(socket.as_fd(), &line, passed)).await?;
    Ok(())
}
