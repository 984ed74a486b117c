//! The signals that ask a process to end, as events: the VM ends and says which one it was.

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_api::control::ExitReason;

use crate::event_loop::{EventSet, EventSource, Registry};
use crate::exit::ExitSignal;

const ENDING: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// The signals that came.
struct Signals {
    fd: SignalFd,
    exit: ExitSignal,
}

/// Blocks the signals for this thread and all that it starts from now on, and watches for them.
///
/// # Errors
/// What signalfd(2) and epoll_ctl(2) say.
pub fn watch(registry: &Registry, exit: ExitSignal) -> io::Result<()> {
    let signals: SigSet = ENDING.into_iter().collect();
    signals.thread_block()?;
    // A guest's file that would grow past a limit of ours is an error of its write, not our end.
    SigSet::from(Signal::SIGXFSZ).thread_block()?;
    let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    registry.add(fd.as_raw_fd(), EventSet::IN, 0, Arc::new(Mutex::new(Signals { fd, exit })))
}

impl EventSource for Signals {
    fn on_event(&mut self, _token: u64, _ready: EventSet) {
        while let Ok(Some(info)) = self.fd.read_signal() {
            self.exit.end(ExitReason::Signal { signal: i32::try_from(info.ssi_signo).unwrap_or_default() });
        }
    }
}
