//! Copies between our standard streams and the guest's, each direction on a thread of its own so that one blocked reader
//! blocks nothing else. Output is complete when its thread has ended.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::oneshot;

use crate::log::LogStream;

/// Size of one read, in bytes.
const CHUNK: usize = 64 << 10;

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

/// Copies a stream of the guest to its end, which the receiver tells.
pub(crate) fn copy_output(mut stream: UnixStream, sink: Sink) -> io::Result<oneshot::Receiver<()>> {
    let (ended, receiver) = oneshot::channel();
    let (output, mut log) = (sink.output.map(File::from), sink.log);
    spawn("output", move || {
        let mut chunk = vec![0; CHUNK];
        while let Some(len @ 1..) = read(&mut stream, &mut chunk) {
            if let Some(log) = &mut log {
                log.write(&chunk[..len]);
            }
            if output.as_ref().is_some_and(|mut output| output.write_all(&chunk[..len]).is_err()) {
                break;
            }
        }
        drop(log);
        // Whoever read our output may be gone: the guest's writer learns it as a broken pipe.
        let _ = stream.shutdown(Shutdown::Both);
        drop(ended);
    })?;
    Ok(receiver)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(work)
}

fn copy(mut from: impl Read, mut to: impl Write) {
    let mut chunk = vec![0; CHUNK];
    while let Some(len @ 1..) = read(&mut from, &mut chunk) {
        if to.write_all(&chunk[..len]).is_err() {
            return;
        }
    }
}

fn read(from: &mut impl Read, into: &mut [u8]) -> Option<usize> {
    loop {
        match from.read(into) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other.ok(),
        }
    }
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
