//! The control socket of a container: how `vmrun exec`, `kill` and `ps` reach the process that owns its sandbox.
//!
//! One JSON object per line each way. An exec is answered by [`Answer::Started`] together with the connected streams of the
//! process as descriptors, in the order stdin, stdout, stderr: the owner is not in the data path.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::Process;
use sandbox::{ProcessId, Sandbox, WantedStreams, fds};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, Interest, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};

/// What can be asked of the owner.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Start a process; more requests about it may follow on the same connection.
    Exec { process: Box<Process>, stdin: bool, terminal: Option<(u16, u16)> },
    /// Resize the terminal of the exec.
    Resize(u16, u16),
    /// Signal the exec of this connection, or else the container's command.
    Signal(u32),
}

/// What the owner answers.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// The process runs; its streams come with this message.
    Started,
    /// The process has exited.
    Exited(u8),
    /// Done.
    Done,
    /// Refused or failed, with the cause.
    Failed(String),
}

/// Longest message, in bytes.
const MAX_MESSAGE: usize = 64 << 10;

/// Serves the control socket until the task is dropped.
pub(crate) async fn serve(path: &Path, sandbox: Rc<Sandbox>, container: String) -> Result<()> {
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    for number in 1_u64.. {
        let (stream, _) = listener.accept().await?;
        let id = ProcessId { container_id: container.clone(), exec_id: format!("exec{number}") };
        let sandbox = sandbox.clone();
        tokio::task::spawn_local(async move {
            if let Err(error) = converse(stream, &sandbox, id).await {
                tracing::debug!(error = format!("{error:#}"), "a control connection ended");
            }
        });
    }
    Ok(())
}

async fn converse(stream: UnixStream, sandbox: &Rc<Sandbox>, id: ProcessId) -> Result<()> {
    let (read_half, socket) = stream.into_split();
    let mut lines = tokio::io::BufReader::new(read_half).lines();
    match next(&mut lines).await? {
        Some(Request::Exec { process, stdin, terminal }) => {
            let wanted = WantedStreams { stdin, output: true, terminal };
            let streams = match sandbox.exec(&id, &process, wanted).await {
                Ok(streams) => streams,
                Err(error) => return answer(&socket, &Answer::Failed(error.to_string()), &[]).await,
            };
            let streams: Vec<OwnedFd> = [streams.stdin, streams.stdout, streams.stderr]
                .into_iter()
                .flatten()
                .map(|stream| stream.into_std().map(OwnedFd::from))
                .collect::<io::Result<_>>()?;
            let borrowed: Vec<BorrowedFd<'_>> = streams.iter().map(|fd| fd.as_fd()).collect();
            answer(&socket, &Answer::Started, &borrowed).await?;
            drop(borrowed);
            drop(streams);
            attend(&mut lines, &socket, sandbox, &id).await
        }
        Some(Request::Signal(signal)) => {
            let init = ProcessId::init(&id.container_id);
            let outcome = sandbox.signal(&init, signal, false).await;
            answer(&socket, &outcome.map_or_else(|e| Answer::Failed(e.to_string()), |()| Answer::Done), &[]).await
        }
        Some(Request::Resize(..)) | None => Ok(()),
    }
}

/// Stays with an exec until it exits; the client may resize and signal it meanwhile.
async fn attend(
    lines: &mut Lines<tokio::io::BufReader<OwnedReadHalf>>,
    socket: &OwnedWriteHalf,
    sandbox: &Sandbox,
    id: &ProcessId,
) -> Result<()> {
    let exit = sandbox.wait(id);
    tokio::pin!(exit);
    let mut client_is_there = true;
    let exit = loop {
        tokio::select! {
            exit = &mut exit => break exit,
            request = next(lines), if client_is_there => match request {
                Ok(Some(Request::Resize(rows, columns))) => drop(sandbox.resize(id, rows, columns).await),
                Ok(Some(Request::Signal(signal))) => drop(sandbox.signal(id, signal, false).await),
                _ => client_is_there = false,
            },
        }
    };
    let outcome = match exit {
        Ok(exit) => Answer::Exited(u8::try_from(exit.exit_code).unwrap_or(u8::MAX)),
        Err(error) => Answer::Failed(error.to_string()),
    };
    // Nothing is left to forget when the VM is gone.
    let _ = sandbox.delete(id, true).await;
    answer(socket, &outcome, &[]).await
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

/// The client's side of a control connection.
pub(crate) struct Client {
    socket: StdStream,
}

impl Client {
    /// Connects to the owner of a container.
    pub(crate) fn connect(root: &Path, name: &str) -> Result<Self> {
        let state = sandbox::state::read(root, name)?;
        if state.status != sandbox::state::Status::Running {
            bail!("container {name} is not running");
        }
        let socket = StdStream::connect(root.join(name).join("control.sock"))
            .with_context(|| format!("container {name} is not running: its owner does not answer"))?;
        Ok(Self { socket })
    }

    /// Another handle of the same connection, for sending only.
    pub(crate) fn sender(&self) -> Result<Self> {
        Ok(Self { socket: self.socket.try_clone()? })
    }

    pub(crate) fn send(&mut self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        Ok(self.socket.write_all(&line)?)
    }

    /// Reads one answer and the descriptors that come with it.
    pub(crate) fn receive(&mut self) -> Result<(Answer, Vec<OwnedFd>)> {
        let mut message = vec![0; MAX_MESSAGE];
        let (len, passed) = fds::recv(self.socket.as_fd(), &mut message)?;
        let mut line = message[..len].to_vec();
        if len > 0 && !line.ends_with(b"\n") {
            BufReader::new(&self.socket).read_until(b'\n', &mut line)?;
        }
        if line.is_empty() {
            bail!("the container's owner ended before it answered");
        }
        // An exit may follow in the same read; it is kept by reading line by line at the sender's pace.
        Ok((serde_json::from_slice(&line).context("bad answer of the container's owner")?, passed))
    }
}
