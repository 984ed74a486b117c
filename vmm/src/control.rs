//! Serves `vmm_api::control` on the event loop: one JSON object per line.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmm_api::control::{Exit, ExitReason, Message, Reply, Request, State};

use crate::event_loop::{EventSet, EventSource};
use crate::exit::ExitSignal;
use crate::vcpu::Vcpus;

/// Longest request, in bytes.
const MAX_REQUEST_LEN: usize = 4096;

/// The control socket.
pub struct Control {
    socket: UnixStream,
    received: Vec<u8>,
    vcpus: Arc<Vcpus>,
    exit: ExitSignal,
}

impl Control {
    /// Serves `socket`, which must not block.
    #[must_use]
    pub fn new(socket: UnixStream, vcpus: Arc<Vcpus>, exit: ExitSignal) -> Self {
        Self { socket, received: Vec::new(), vcpus, exit }
    }

    /// The descriptor to watch for input.
    #[must_use]
    pub fn as_raw_fd(&self) -> i32 {
        self.socket.as_raw_fd()
    }

    fn read(&mut self) -> io::Result<()> {
        let mut chunk = [0; MAX_REQUEST_LEN];
        match self.socket.read(&mut chunk) {
            Ok(0) => self.exit.end(ExitReason::OwnerGone),
            Ok(len) => self.received.extend_from_slice(&chunk[..len]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.received.drain(..=end).collect();
            let reply = match serde_json::from_slice(&line) {
                Ok(request) => self.answer(&request),
                Err(error) => Reply::Refused(format!("not a request: {error}")),
            };
            send(&self.socket, &Message::Reply(reply))?;
        }
        if self.received.len() > MAX_REQUEST_LEN {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a request is too long"));
        }
        Ok(())
    }

    fn answer(&self, request: &Request) -> Reply {
        match request {
            Request::State => Reply::State(if self.vcpus.paused() { State::Paused } else { State::Running }),
            Request::Pause => match self.vcpus.pause() {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Refused(format!("the vCPUs did not stop: {error}")),
            },
            Request::Resume => {
                self.vcpus.resume();
                Reply::Done
            }
            Request::Shutdown => {
                self.exit.end(ExitReason::Requested);
                Reply::Done
            }
            Request::Stats => Reply::Stats(self.vcpus.stats()),
        }
    }
}

impl EventSource for Control {
    fn on_event(&mut self, _token: u64, _ready: EventSet) {
        if let Err(error) = self.read() {
            self.exit.end(ExitReason::VmmError { detail: format!("the control socket failed: {error}") });
        }
    }
}

/// Writes the last message: how the VM ended. A caller that is gone needs none.
pub fn report_exit(socket: &UnixStream, exit: Exit) {
    let _ = send(socket, &Message::Exited(exit));
}

fn send(mut socket: &UnixStream, message: &Message) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    socket.write_all(&line)
}
