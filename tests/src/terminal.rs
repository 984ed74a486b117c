//! A pseudo-terminal that a story types at and reads from, in the place of a person.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// Longest wait for a text: VMs start on an emulated host.
const DEADLINE: Duration = Duration::from_secs(120);

/// Both ends of a pseudo-terminal.
pub struct Terminal {
    master: File,
    name: String,
    seen: String,
}

impl Terminal {
    /// Opens one with so many rows and columns.
    ///
    /// # Panics
    /// When the host has no more.
    #[must_use]
    pub fn open(rows: u16, columns: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&master).expect("a terminal");
        unlockpt(&master).expect("a terminal");
        let name = ptsname(&master, Vec::new()).expect("a name").into_string().expect("a path");
        let terminal = Self { master: master.into(), name, seen: String::new() };
        terminal.resize(rows, columns);
        terminal
    }

    /// Starts a command whose controlling terminal this is.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn spawn(&self, command: &Command) -> Child {
        let side = File::options().read(true).write(true).open(&self.name).expect("the terminal's other side");
        let mut child = Command::new("setsid");
        child.arg("--ctty").arg(command.get_program()).args(command.get_args());
        let copy = || side.try_clone().expect("a descriptor");
        child.stdin(copy()).stdout(copy()).stderr(copy()).spawn().expect("setsid starts")
    }

    /// Changes the size; whoever runs in the terminal is told by SIGWINCH.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).expect("a new size");
    }

    /// Types.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn send(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("the terminal takes input");
    }

    /// Reads until `text` was shown; returns what came before it. What was read is read once.
    ///
    /// # Panics
    /// When it does not come.
    pub fn expect(&mut self, text: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        let mut chunk = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(text) {
                let before = self.seen[..at].to_owned();
                self.seen.drain(..at + text.len());
                return before;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs().try_into().unwrap_or(0), tv_nsec: 0 };
            let master = self.master.as_fd();
            let ready = poll(&mut [PollFd::new(&master, PollFlags::IN)], Some(&timeout)).expect("poll");
            assert!(ready > 0, "{text:?} was not shown, but {:?}", self.seen);
            let len =
                self.master.read(&mut chunk).unwrap_or_else(|_| panic!("{text:?} was not shown, but {:?}", self.seen));
            self.seen.push_str(&String::from_utf8_lossy(&chunk[..len]));
        }
    }
}
