//! Copies between our standard streams and the guest's, each direction on a thread of its own so that one blocked reader
//! blocks nothing else. Output is complete when its thread has ended.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

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

/// Copies a stream of the guest to `output` until its end.
pub(crate) fn copy_output(stream: UnixStream, output: BorrowedFd<'_>) -> io::Result<JoinHandle<()>> {
    let output = File::from(output.try_clone_to_owned()?);
    spawn("output", move || {
        copy(&stream, &output);
        // Whoever read our output is gone: the guest's writer learns it as a broken pipe.
        let _ = stream.shutdown(Shutdown::Both);
    })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(work)
}

fn copy(mut from: impl Read, mut to: impl Write) {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return,
            Ok(len) => {
                if to.write_all(&chunk[..len]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
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
