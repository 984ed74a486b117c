//! Serves `vmm_api::control` on the event loop: one JSON object per line, descriptors beside it.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmm_api::control::{Exit, ExitReason, MAX_REQUEST_LEN, Message, Reply, Request, State};
use vmm_api::fds;

use crate::event_loop::{EventSet, EventSource, Registry};
use crate::exit::ExitSignal;
use crate::machine::{add_share, share_name};
use crate::networks::Networks;
use crate::vcpu::Vcpus;
use crate::virtio::balloon::Balloon;
use crate::virtio::fs::Rules;
use crate::virtio::pci::PciBus;

/// The control socket.
pub struct Control {
    socket: UnixStream,
    received: Vec<u8>,
    /// Descriptors that came with what was received, for the requests that need one.
    fds: VecDeque<OwnedFd>,
    vcpus: Arc<Vcpus>,
    pci: Arc<PciBus>,
    networks: Networks,
    registry: Registry,
    exit: ExitSignal,
}

impl Control {
    /// Serves `socket`, which must not block.
    #[must_use]
    pub fn new(
        socket: UnixStream,
        vcpus: Arc<Vcpus>,
        pci: Arc<PciBus>,
        networks: Networks,
        registry: Registry,
        exit: ExitSignal,
    ) -> Self {
        Self { socket, received: Vec::new(), fds: VecDeque::new(), vcpus, pci, networks, registry, exit }
    }

    /// The descriptor to watch for input.
    #[must_use]
    pub fn as_raw_fd(&self) -> i32 {
        self.socket.as_raw_fd()
    }

    fn read(&mut self) -> io::Result<()> {
        let mut chunk = [0; MAX_REQUEST_LEN];
        match fds::recv(self.socket.as_fd(), &mut chunk) {
            Ok((0, _)) => self.exit.end(ExitReason::OwnerGone),
            Ok((len, fds)) => {
                self.received.extend_from_slice(&chunk[..len]);
                self.fds.extend(fds);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.received.drain(..=end).collect();
            let reply = match serde_json::from_slice(&line) {
                Ok(request) => self.answer(request),
                Err(error) => Reply::Refused(format!("not a request: {error}")),
            };
            send(&self.socket, &Message::Reply(reply))?;
        }
        if self.received.len() > MAX_REQUEST_LEN || self.fds.len() > fds::MAX_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a request is too long"));
        }
        Ok(())
    }

    fn answer(&mut self, request: Request) -> Reply {
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
            Request::AddShare { tag, cache, read_only } => match self.fds.pop_front() {
                Some(root) => {
                    let rules = Rules { cache, read_only };
                    done(add_share(&self.pci, &tag, root, rules, self.vcpus.count()))
                }
                None => Reply::Refused("no descriptor came with the request".to_owned()),
            },
            Request::RemoveShare { tag } => done(self.pci.remove(&share_name(&tag))),
            // A caller sends one request at a time, so every descriptor that came is this one's.
            Request::AddNetwork { device } => done(self.networks.add(device, self.fds.drain(..).collect())),
            Request::RemoveNetwork { name } => done(self.networks.remove(&name)),
            Request::SetLink { name, up } => done(self.networks.set_link(&name, up)),
            Request::NetStats => Reply::NetStats(self.networks.stats()),
            Request::ReportFreePages => done(self.pci.add("balloon", Box::new(Balloon::new(self.registry.clone())))),
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

fn done<E: std::error::Error + Send + Sync + 'static>(outcome: Result<(), E>) -> Reply {
    match outcome {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Refused(format!("{:#}", anyhow::Error::from(error))),
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
