//! Copies between our standard streams and the guest's, each direction on a thread of its own so that one blocked reader
//! blocks nothing else. Output is complete when its thread has ended.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::io::retry_on_intr;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::oneshot;

use crate::log::LogStream;

/// Size of one read, in bytes.
const CHUNK: usize = 64 << 10;
/// A guest that has told an exit and then does nothing for this long, twice, has no more output.
const SILENCE_DEADLINE: Duration = Duration::from_secs(5);

/// Copies our standard input to the guest until it ends; then the guest reads end of file.
pub(crate) fn copy_stdin(stream: UnixStream) -> io::Result<()> {
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    spawn("stdin", move || {
        copy(&input, &stream);
        // The guest's process may be gone already.
        let _ = stream.shutdown(Shutdown::Write);
    })?;
    Ok(())
}

/// Where the output of a container goes: to its log, and to a stream of ours if we run in the foreground.
pub(crate) struct Sink {
    pub(crate) output: Option<OwnedFd>,
    pub(crate) log: Option<LogStream>,
}

/// The copying of a stream of the guest.
pub(crate) struct Output {
    ended: oneshot::Receiver<()>,
    guest: UnixStream,
    /// Grows with each read and each write: odd while a write is under way.
    moves: Arc<AtomicU64>,
}

impl Output {
    /// Waits until every byte is written, after the process has exited: the guest then has nothing to wait for, so one that
    /// neither sends nor ends the stream is cut off.
    pub(crate) async fn finish(mut self) {
        let mut before = None;
        // The sender is dropped when its thread ends.
        while tokio::time::timeout(SILENCE_DEADLINE, &mut self.ended).await.is_err() {
            let moves = self.moves.load(Ordering::Relaxed);
            if before == Some(moves) && moves.is_multiple_of(2) {
                let _ = self.guest.shutdown(Shutdown::Both);
            }
            before = Some(moves);
        }
    }

    /// Waits for the end of the stream. What an exec has left running may go on with it.
    pub(crate) fn wait(self) {
        // The sender is dropped when its thread ends.
        let _ = self.ended.blocking_recv();
    }
}

/// Copies a stream of the guest to its end.
pub(crate) fn copy_output(stream: UnixStream, sink: Sink) -> io::Result<Output> {
    let (ended_tx, ended) = oneshot::channel::<()>();
    let (output, mut log) = (sink.output.map(File::from), sink.log);
    let (guest, moves) = (stream.try_clone()?, Arc::<AtomicU64>::default());
    let moved = moves.clone();
    spawn("output", move || {
        let mut chunk = Vec::with_capacity(CHUNK);
        while let Some(1..) = read(&stream, &mut chunk) {
            moved.fetch_add(1, Ordering::Relaxed);
            if let Some(log) = &mut log {
                log.write(&chunk);
            }
            if output.as_ref().is_some_and(|mut output| output.write_all(&chunk).is_err()) {
                break;
            }
            moved.fetch_add(1, Ordering::Relaxed);
        }
        drop(log);
        // Whoever read our output may be gone: the guest's writer learns it as a broken pipe.
        let _ = stream.shutdown(Shutdown::Both);
        drop(ended_tx);
    })?;
    Ok(Output { ended, guest, moves })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(work)
}

fn copy(from: impl AsFd, mut to: impl Write) {
    let mut chunk = Vec::with_capacity(CHUNK);
    while let Some(1..) = read(&from, &mut chunk) {
        if to.write_all(&chunk).is_err() {
            return;
        }
    }
}

/// Reads once in place of what `chunk` holds; its memory is not touched where nothing is read.
fn read(from: impl AsFd, chunk: &mut Vec<u8>) -> Option<usize> {
    chunk.clear();
    retry_on_intr(|| rustix::io::read(&from, spare_capacity(chunk))).ok()
}

/// Our terminal in raw mode, put back when dropped.
pub(crate) struct RawTerminal(Termios);

impl RawTerminal {
    /// Switches the terminal to raw mode; nothing to do when standard input is none.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Rows and columns of our terminal, or those of a classic one.
pub(crate) fn window_size() -> (u16, u16) {
    tcgetwinsize(io::stdin()).map_or((24, 80), |size| (size.ws_row, size.ws_col))
}

/// Refuses what Docker refuses: a terminal whose input would not be one.
pub(crate) fn check_terminal(interactive: bool, tty: bool) -> anyhow::Result<()> {
    anyhow::ensure!(
        !(interactive && tty) || io::stdin().is_terminal(),
        "the input device is not a TTY: leave -t out, or run vmrun in a terminal"
    );
    Ok(())
}
