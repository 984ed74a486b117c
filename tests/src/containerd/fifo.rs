//! The FIFOs of a process, as containerd's clients make them: one each for stdin, stdout and stderr, and readers for the last two.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

use crate::eventually;

/// Longest wait for the end of a stream.
const DEADLINE: Duration = Duration::from_secs(120);

/// The streams of a process.
pub struct Streams {
    /// Without a FIFO for stderr, and the process in a terminal.
    pub is_terminal: bool,
    stdin: Option<PathBuf>,
    stdout: Option<PathBuf>,
    stderr: Option<PathBuf>,
    readers: Vec<Receiver<String>>,
}

impl Streams {
    /// None at all.
    #[must_use]
    pub fn none() -> Self {
        Self { is_terminal: false, stdin: None, stdout: None, stderr: None, readers: Vec::new() }
    }

    /// Standard output and standard error, read from now on.
    #[must_use]
    pub fn make(dir: &Path, name: &str) -> Self {
        let mut streams = Self::unread(dir, name);
        streams.readers = streams.stdout.iter().chain(&streams.stderr).cloned().map(read).collect();
        streams
    }

    /// Standard output and standard error that nobody has opened.
    #[must_use]
    pub fn unread(dir: &Path, name: &str) -> Self {
        let fifo = |stream: &str| Some(make_fifo(&dir.join(format!("{name}-{stream}"))));
        Self { stdout: fifo("stdout"), stderr: fifo("stderr"), ..Self::none() }
    }

    /// The same with a standard input.
    #[must_use]
    pub fn with_stdin(self, dir: &Path, name: &str) -> Self {
        Self { stdin: Some(make_fifo(&dir.join(format!("{name}-stdin")))), ..self }
    }

    /// A terminal, read from now on.
    #[must_use]
    pub fn terminal(dir: &Path, name: &str) -> Self {
        let stdout = make_fifo(&dir.join(format!("{name}-stdout")));
        let readers = vec![read(stdout.clone())];
        Self { is_terminal: true, stdout: Some(stdout), readers, ..Self::none() }
    }

    /// Standard output in a place of containerd's schemes, as `file:///var/log/x`.
    #[must_use]
    pub fn to(uri: &str) -> Self {
        Self { stdout: Some(PathBuf::from(uri)), stderr: Some(PathBuf::from(uri)), ..Self::none() }
    }

    /// Reads standard error from now on, and drops it; ends with the value returned.
    #[must_use]
    pub fn stderr_reader(&self) -> Option<Receiver<String>> {
        self.stderr.clone().map(read)
    }

    /// The writing end of standard input, once the process has its own.
    ///
    /// # Panics
    /// When it does not open it.
    #[must_use]
    pub fn open_stdin(path: &Path) -> File {
        let mut opened = None;
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        eventually(DEADLINE, "standard input is read", || {
            // ENXIO as long as nobody reads: fifo(7).
            opened = rustix::fs::open(path, flags, Mode::empty()).ok();
            opened.is_some()
        });
        opened.expect("opened").into()
    }

    pub(super) fn stdin(&self) -> String {
        text(self.stdin.as_ref())
    }

    /// The path of standard output.
    #[must_use]
    pub fn stdout(&self) -> String {
        text(self.stdout.as_ref())
    }

    pub(super) fn stderr(&self) -> String {
        text(self.stderr.as_ref())
    }

    pub(super) fn output(&mut self) -> String {
        let ended = |reader: Receiver<String>| reader.recv_timeout(DEADLINE).expect("the stream ends");
        self.readers.drain(..).map(ended).collect()
    }

    pub(super) fn remove(&self) {
        for path in [&self.stdin, &self.stdout, &self.stderr].into_iter().flatten() {
            // A story may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}

fn text(path: Option<&PathBuf>) -> String {
    path.map_or_else(String::new, |path| path.display().to_string())
}

fn make_fifo(path: &Path) -> PathBuf {
    // Left by an attempt that failed.
    let _ = fs::remove_file(path);
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
    path.to_owned()
}

/// Reads in a thread: the open waits for a writer.
fn read(path: PathBuf) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let done = File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
        // Nobody may wait for it any more.
        let _ = done.map(|_| sender.send(String::from_utf8_lossy(&bytes).into_owned()));
    });
    receiver
}
