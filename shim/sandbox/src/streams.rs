//! Byte streams of the guest's processes. The host chooses an id and sends it with the request; the agent dials in and
//! writes that id first. Ids that nobody expects are dropped, and a container that gets at the port knows none.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use tokio::io::AsyncReadExt as _;
use tokio::net::{UnixDatagram, UnixStream};
use tokio::sync::{Semaphore, oneshot};

use crate::vmm_process::accept;
use crate::{CallError, WantedStreams, message};

/// Time that the agent has to connect a stream after it answered, and to write its id.
pub(crate) const STREAM_DEADLINE: Duration = Duration::from_secs(10);

/// Streams at once that have not said their id.
const MAX_UNNAMED: usize = 64;

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<UnixStream>>>>;

/// The streams of one process, as connected sockets.
pub struct ProcessStreams {
    /// Write here; shutting down the writing side is end of file.
    pub stdin: Option<UnixStream>,
    /// Read here; with a terminal this is its output.
    pub stdout: Option<UnixStream>,
    /// Read here.
    pub stderr: Option<UnixStream>,
}

/// Streams that the agent was or will be asked for.
pub(crate) struct StreamTable {
    waiting: Waiting,
    next_id: AtomicU64,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for StreamTable {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Streams that one request asks for.
pub(crate) struct Expected {
    pub(crate) stdio: message::Stdio,
    stdin: Option<Pending>,
    stdout: Option<Pending>,
    stderr: Option<Pending>,
}

impl StreamTable {
    /// Takes connections from the stream port for as long as the table lives.
    pub(crate) fn serve(port: UnixDatagram) -> io::Result<Self> {
        let mut first_id = [0; 8];
        getrandom(&mut first_id, GetRandomFlags::empty())?;
        // 0 is no stream: not the first, and none that follows.
        let next_id = AtomicU64::new(u64::from_le_bytes(first_id) >> 1 | 1);
        let waiting = Waiting::default();
        let server = tokio::spawn(serve(port, waiting.clone()));
        Ok(Self { waiting, next_id, server })
    }

    /// Chooses ids for the streams that are wanted.
    pub(crate) fn expect(&self, wanted: WantedStreams) -> Expected {
        let stdin = wanted.stdin.then(|| self.pending());
        let stdout = wanted.output.then(|| self.pending());
        let stderr = (wanted.output && wanted.terminal.is_none()).then(|| self.pending());
        let id = |pending: &Option<Pending>| pending.as_ref().map_or(0, |p| p.id);
        let (rows, columns) = wanted.terminal.unwrap_or_default();
        let stdio = message::Stdio {
            stdin: id(&stdin),
            stdout: id(&stdout),
            stderr: id(&stderr),
            rows: rows.into(),
            columns: columns.into(),
            ..Default::default()
        };
        Expected { stdio, stdin, stdout, stderr }
    }

    /// Chooses an id for one stream that no process has.
    pub(crate) fn expect_one(&self) -> Pending {
        self.pending()
    }

    fn pending(&self) -> Pending {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(id, sender);
        Pending { id, receiver, waiting: self.waiting.clone() }
    }
}

impl Expected {
    /// Waits for all of them, for each no longer than `deadline`.
    pub(crate) async fn streams(self, deadline: Duration) -> Result<ProcessStreams, CallError> {
        Ok(ProcessStreams {
            stdin: connected("stdin", self.stdin, deadline).await?,
            stdout: connected("stdout", self.stdout, deadline).await?,
            stderr: connected("stderr", self.stderr, deadline).await?,
        })
    }
}

/// An expected stream; forgotten when dropped.
pub(crate) struct Pending {
    id: u64,
    receiver: oneshot::Receiver<UnixStream>,
    waiting: Waiting,
}

impl Pending {
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Waits until the agent has connected it, or the table is gone.
    pub(crate) async fn connected(&mut self) -> Option<UnixStream> {
        (&mut self.receiver).await.ok()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        lock(&self.waiting).remove(&self.id);
    }
}

async fn connected(
    stream: &'static str,
    pending: Option<Pending>,
    deadline: Duration,
) -> Result<Option<UnixStream>, CallError> {
    let Some(mut pending) = pending else { return Ok(None) };
    match tokio::time::timeout(deadline, &mut pending.receiver).await {
        Ok(Ok(socket)) => Ok(Some(socket)),
        _ => Err(CallError::StreamMissing {
            stream,
            deadline_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
        }),
    }
}

async fn serve(port: UnixDatagram, waiting: Waiting) {
    let unnamed = Arc::new(Semaphore::new(MAX_UNNAMED));
    // Without a place the next stream waits in the socket, and the VMM with it.
    while let Ok(place) = unnamed.clone().acquire_owned().await
        && let Ok(stream) = accept(&port).await
    {
        let waiting = waiting.clone();
        tokio::spawn(async move {
            if tokio::time::timeout(STREAM_DEADLINE, deliver(stream, waiting)).await.is_err() {
                tracing::debug!("a stream of the guest did not say its id");
            }
            drop(place);
        });
    }
}

async fn deliver(stream: std::os::unix::net::UnixStream, waiting: Waiting) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    let id = stream.read_u64_le().await?;
    let sender = lock(&waiting).remove(&id);
    match sender {
        // The caller may have given up in the meantime.
        Some(sender) => drop(sender.send(stream)),
        None => tracing::debug!(id, "a stream of the guest has an id that nobody expects"),
    }
    Ok(())
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<UnixStream>>> {
    // The table is consistent after each statement, so a panic elsewhere does not spoil it.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}
