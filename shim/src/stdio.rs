//! Standard streams: from what containerd names (FIFOs, files, a logger program) to the guest's streams and back.
//!
//! A FIFO is opened for both directions, so that opening waits for nobody and a reader that goes away breaks nothing; one
//! that stalls stalls its process and nothing else. Standard input stays open until containerd closes it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sandbox::{ProcessId, ProcessStreams, WantedStreams};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use crate::error::TaskError;
use crate::logger::Logger;

/// Size of one read, in bytes.
const CHUNK: usize = 32 << 10;
/// Time without a byte after which a reader counts as gone.
const STALL_DEADLINE: Duration = Duration::from_millis(800);
/// Longest wait for a reader that does read.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// For opening; the bit is that of open(2).
pub(crate) const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
/// Between two looks at how full a FIFO is: no event tells that one was emptied.
const DRAIN_INTERVAL: Duration = Duration::from_millis(5);

/// What containerd names; an empty one is not wanted.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Stdio {
    /// The streams to ask the agent for.
    pub(crate) fn wanted(&self, size: Option<(u16, u16)>) -> WantedStreams {
        WantedStreams {
            stdin: !self.stdin.is_empty(),
            output: !self.stdout.is_empty() || !self.stderr.is_empty() || self.terminal,
            terminal: self.terminal.then(|| size.unwrap_or_default()),
        }
    }

    /// Opens everything, before there is a process that could write.
    pub(crate) async fn open(&self, namespace: &str, id: &ProcessId) -> Result<Ends, TaskError> {
        let mut ends = Ends { stdin: self.stdin.clone(), ..Ends::default() };
        let Some(logger) = Logger::parse(&self.stdout)? else {
            ends.stdout = Sink::open(&self.stdout).await?;
            if !self.terminal {
                ends.stderr = Sink::open(&self.stderr).await?;
            }
            return Ok(ends);
        };
        let (stdout, stderr) = logger.start(namespace, &id.container_id).await?;
        ends.stdout = Some(Sink::Pipe(stdout));
        ends.stderr = (!self.terminal).then_some(Sink::Pipe(stderr));
        Ok(ends)
    }
}

fn opening(path: &str) -> impl FnOnce(io::Error) -> TaskError {
    TaskError::host(format!("open {path:?}"))
}

/// Our ends of the streams.
#[derive(Default)]
pub(crate) struct Ends {
    /// Opened when the process starts: a client that sees its input taken before it knows the task would not tell its end.
    stdin: String,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
}

struct Input {
    source: Source,
    /// Keeps the FIFO from ending when its writer goes away, until it is closed on purpose.
    keeper: Option<std::fs::File>,
}

enum Source {
    Fifo(pipe::Receiver),
    File(File),
}

impl Input {
    fn open(path: &str) -> io::Result<Self> {
        if !std::fs::metadata(path)?.file_type().is_fifo() {
            return Ok(Self { source: Source::File(std::fs::File::open(path)?.into()), keeper: None });
        }
        // The reading end first: a writing end that does not wait needs one. And the runtime hears of it last: a FIFO that
        // had no writer for a moment counts as closed with it for ever, and it would ask again and again.
        let open = |options: &mut OpenOptions| options.custom_flags(NONBLOCK).open(path);
        let reader = open(OpenOptions::new().read(true))?;
        let keeper = open(OpenOptions::new().write(true))?;
        let source = pipe::Receiver::from_owned_fd(reader.into())?;
        Ok(Self { source: Source::Fifo(source), keeper: Some(keeper) })
    }
}

/// Where output goes.
enum Sink {
    Fifo(pipe::Sender),
    /// To a program; it breaks when that ends.
    Pipe(pipe::Sender),
    File(File),
}

impl Sink {
    async fn open(name: &str) -> Result<Option<Self>, TaskError> {
        let name = name.strip_prefix("fifo://").unwrap_or(name);
        let path = name.strip_prefix("file://").unwrap_or(name);
        if path.is_empty() {
            return Ok(None);
        }
        if let Some((scheme, _)) = path.split_once("://") {
            return Err(TaskError::Invalid(format!(
                "output to {scheme:?} is not known: use a FIFO, file:// or binary://"
            )));
        }
        if is_fifo(path).await {
            let sender = pipe::OpenOptions::new().read_write(true).open_sender(path);
            return sender.map(|sender| Some(Self::Fifo(sender))).map_err(opening(path));
        }
        if name.starts_with("file://")
            && let Some(parent) = Path::new(path).parent()
        {
            tokio::fs::create_dir_all(parent).await.map_err(opening(path))?;
        }
        let file = File::options().append(true).create(true).open(path).await;
        file.map(|file| Some(Self::File(file))).map_err(opening(path))
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Fifo(pipe) | Self::Pipe(pipe) => pipe.write_all(bytes).await,
            Self::File(file) => {
                file.write_all(bytes).await?;
                file.flush().await
            }
        }
    }

    /// Bytes that wait to be read by somebody who may not have come yet; closing a FIFO now would lose them.
    fn unread(&self) -> u64 {
        match self {
            Self::Fifo(pipe) => rustix::io::ioctl_fionread(pipe.as_fd()).unwrap_or_default(),
            Self::Pipe(_) | Self::File(_) => 0,
        }
    }
}

async fn is_fifo(path: &str) -> bool {
    tokio::fs::metadata(path).await.is_ok_and(|metadata| metadata.file_type().is_fifo())
}

impl Ends {
    /// Begins to copy; a stream without an end is read and dropped.
    pub(crate) fn copy(self, streams: ProcessStreams) -> Copying {
        let mut copying = Copying {
            waiting_input: streams.stdin.map(|stream| (self.stdin, stream)),
            stdin_closed: false,
            stdin: None,
            keeper: None,
            outputs: Vec::new(),
            progress: Arc::default(),
        };
        for (stream, sink) in [(streams.stdout, self.stdout), (streams.stderr, self.stderr)] {
            if let Some(stream) = stream {
                copying.outputs.push(tokio::spawn(copy_output(stream, sink, copying.progress.clone())));
            }
        }
        copying
    }
}

/// The copies of one process's streams. Dropping it ends them.
pub(crate) struct Copying {
    /// The name of the input and the guest's stream, until the process is started.
    waiting_input: Option<(String, UnixStream)>,
    stdin_closed: bool,
    stdin: Option<JoinHandle<()>>,
    keeper: Option<std::fs::File>,
    outputs: Vec<JoinHandle<()>>,
    /// Changes with each byte that somebody took.
    progress: Arc<AtomicU64>,
}

impl Copying {
    /// Begins to pass standard input on.
    pub(crate) fn begin_input(&mut self) {
        let Some((name, stream)) = self.waiting_input.take() else { return };
        match Input::open(&name) {
            Ok(input) => {
                self.keeper = input.keeper.filter(|_| !self.stdin_closed);
                self.stdin = Some(tokio::spawn(copy_input(input.source, stream)));
            }
            // The process finds its input at its end.
            Err(error) => tracing::warn!(%error, name, "standard input cannot be opened"),
        }
    }

    /// Lets standard input end when its last writer has gone.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin_closed = true;
        self.keeper = None;
    }

    /// Waits until the output was read to its end, or its reader has stalled.
    pub(crate) async fn finish(mut self) {
        let outputs = std::mem::take(&mut self.outputs);
        let aborts: Vec<_> = outputs.iter().map(JoinHandle::abort_handle).collect();
        let all = async {
            for output in outputs {
                // A task that panicked has ended as well.
                let _ = output.await;
            }
        };
        tokio::select! {
            () = all => {}
            () = self.stalled() => tracing::warn!("the reader of a process's output has stalled: the rest is dropped"),
            () = tokio::time::sleep(DRAIN_DEADLINE) => tracing::warn!("the output of a process did not end in time"),
        }
        aborts.iter().for_each(tokio::task::AbortHandle::abort);
    }

    async fn stalled(&self) {
        let mut seen = self.progress.load(Ordering::Relaxed);
        loop {
            tokio::time::sleep(STALL_DEADLINE).await;
            let now = self.progress.load(Ordering::Relaxed);
            if now == seen {
                return;
            }
            seen = now;
        }
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.stdin.iter().chain(&self.outputs).for_each(JoinHandle::abort);
    }
}

async fn copy_input(mut source: Source, mut stream: UnixStream) {
    let mut chunk = Vec::with_capacity(CHUNK);
    loop {
        chunk.clear();
        let read = match &mut source {
            Source::Fifo(fifo) => fifo.read_buf(&mut chunk).await,
            Source::File(file) => file.read_buf(&mut chunk).await,
        };
        match read {
            Ok(0) | Err(_) => break,
            // The process may be gone.
            Ok(_) if stream.write_all(&chunk).await.is_err() => break,
            Ok(_) => {}
        }
    }
    let _ = stream.shutdown().await;
}

async fn copy_output(mut stream: UnixStream, mut sink: Option<Sink>, progress: Arc<AtomicU64>) {
    let mut chunk = Vec::with_capacity(CHUNK);
    while let Ok(1..) = stream.read_buf(&mut chunk).await {
        if let Some(sink) = &mut sink
            && let Err(error) = sink.write(&chunk).await
        {
            // The process learns it as a broken pipe.
            tracing::warn!(%error, "the output of a process cannot be written");
            return;
        }
        progress.fetch_add(1, Ordering::Relaxed);
        chunk.clear();
    }
    let Some(sink) = sink else { return };
    let mut unread = sink.unread();
    while unread > 0 {
        tokio::time::sleep(DRAIN_INTERVAL).await;
        let left = sink.unread();
        progress.fetch_add(unread.saturating_sub(left), Ordering::Relaxed);
        unread = left;
    }
}

#[cfg(test)]
mod tests;
