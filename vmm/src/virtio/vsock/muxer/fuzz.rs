//! A guest's driver and a host's port owner, both without rules.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::sync::Once;

use arbitrary::Arbitrary;
use nix::sys::signal::{SigSet, Signal};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::event_loop::lock;
use crate::virtio::driver::DriverQueue;
use crate::virtio::fuzz::{DEVICE_THREAD, Move, memory, steps};
use crate::virtio::{Activation, Interrupt};

const GUEST_CID: u64 = 3;
const PORT: u32 = 1024;
/// Host ends that are kept open; more are closed at once.
const MAX_HOST_ENDS: usize = 8;
const TX_BUFFER: u64 = 0x20_0000;
const RX_BUFFERS: u64 = 0x22_0000;

#[derive(Arbitrary, Debug)]
enum Step {
    Rx(Move),
    Tx(Move),
    /// A packet to the declared port, but for what `wrong` has set.
    Packet {
        op: u8,
        guest_port: u8,
        flags: u8,
        buf_alloc: u32,
        fwd_cnt: u32,
        payload_len: u16,
        wrong: Option<Wrong>,
    },
    /// Buffers for packets to the guest.
    Buffers {
        count: u8,
        len: u16,
    },
    HostWrites(u8, u16),
    HostReads(u8),
    HostEnds(u8, bool),
    HostCloses(u8),
    /// A socket is ready, or is said to be.
    Ready {
        guest_port: u8,
        ready: u32,
    },
    /// An event that nobody registered.
    Event {
        token: u64,
        ready: u32,
    },
}

#[derive(Arbitrary, Debug)]
enum Wrong {
    SrcCid(u64),
    DstCid(u64),
    DstPort(u32),
    Len(u32),
    Typ(u16),
    Op(u16),
}

struct Play {
    memory: Arc<GuestMemory>,
    rx: DriverQueue,
    tx: DriverQueue,
    muxer: Arc<Mutex<Muxer>>,
    owner: OwnedFd,
    host_ends: Vec<UnixStream>,
}

/// Plays the steps that `data` spells.
pub(crate) fn fuzz(data: &[u8]) {
    // A closed host end is an error of a write: Rust's own main ignores the signal, libFuzzer's does not.
    static WITHOUT_SIGPIPE: Once = Once::new();
    WITHOUT_SIGPIPE.call_once(|| SigSet::from(Signal::SIGPIPE).thread_block().expect("blocked"));
    let mut play = Play::start(data.len().is_multiple_of(2));
    for step in steps(data) {
        play.make(step);
        play.take_host_ends();
        let muxer = lock(&play.muxer);
        assert!(muxer.connections.len() <= MAX_CONNECTIONS && muxer.pending.len() <= MAX_PENDING);
    }
    lock(&play.muxer).stop();
}

impl Play {
    fn start(event_idx: bool) -> Self {
        let memory = memory();
        let (rx, tx) = (DriverQueue::fuzzed(&memory, 0), DriverQueue::fuzzed(&memory, 1));
        let (owner, ours) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).expect("a socket pair");
        let activation = Activation {
            memory: memory.clone(),
            features: 0,
            queues: vec![rx.activate_fuzzed(event_idx), tx.activate_fuzzed(event_idx)],
            config_changed: Interrupt::unheard(),
            device_thread: DEVICE_THREAD.clone(),
        };
        let registry = Registry::create().expect("epoll");
        let muxer = Muxer::start(activation, GUEST_CID, Arc::new(vec![(PORT, ours)]), registry).expect("a muxer");
        Self { memory, rx, tx, muxer, owner, host_ends: Vec::new() }
    }

    fn make(&mut self, step: Step) {
        match step {
            Step::Rx(step) => {
                self.rx.make(&step, &self.memory);
                self.event(TOKEN_RX, EventSet::IN);
            }
            Step::Tx(step) => {
                self.tx.make(&step, &self.memory);
                self.event(TOKEN_TX, EventSet::IN);
            }
            Step::Packet { op, guest_port, flags, buf_alloc, fwd_cnt, payload_len, wrong } => {
                let header = Header {
                    src_cid: GUEST_CID,
                    dst_cid: HOST_CID,
                    src_port: (guest_port % 4).into(),
                    dst_port: PORT,
                    len: payload_len.into(),
                    typ: VIRTIO_VSOCK_TYPE_STREAM,
                    op: (op % 9).into(),
                    flags: flags.into(),
                    buf_alloc,
                    fwd_cnt,
                };
                self.send(&wrong.map_or(header, |wrong| wrong.apply(header)), payload_len.into());
            }
            Step::Buffers { count, len } => {
                (0..u64::from(count % 17)).for_each(|index| {
                    self.rx.put(&[(RX_BUFFERS + index * 0x1_0000, len.into(), true)]);
                });
                self.event(TOKEN_RX, EventSet::IN);
            }
            Step::Ready { guest_port, ready } => {
                let ports = Ports { host: PORT, guest: (guest_port % 4).into() };
                self.event(ports.token(), EventSet::from_bits_truncate(ready));
            }
            Step::Event { token, ready } => self.event(token, EventSet::from_bits_truncate(ready)),
            Step::HostWrites(which, len) => {
                // A socket that is full or shut is no affair of the device.
                self.with_host_end(which, |end| drop(end.write(&vec![0x5a; len.into()])));
            }
            Step::HostReads(which) => self.with_host_end(which, |end| drop(end.read(&mut [0; 0x1_0000]))),
            Step::HostEnds(which, reading) => {
                let half = if reading { Shutdown::Read } else { Shutdown::Write };
                self.with_host_end(which, |end| drop(end.shutdown(half)));
            }
            Step::HostCloses(which) => {
                if !self.host_ends.is_empty() {
                    self.host_ends.swap_remove(usize::from(which) % self.host_ends.len());
                }
            }
        }
    }

    fn send(&mut self, header: &Header, payload_len: u32) {
        self.memory.write_slice(&header.encode(), GuestAddress(TX_BUFFER)).expect("in RAM");
        self.tx.put(&[(TX_BUFFER, HEADER_LEN + payload_len, false)]);
        self.event(TOKEN_TX, EventSet::IN);
    }

    fn event(&mut self, token: u64, ready: EventSet) {
        lock(&self.muxer).on_event(token, ready);
    }

    fn with_host_end(&mut self, which: u8, act: impl FnOnce(&mut UnixStream)) {
        let count = self.host_ends.len().max(1);
        if let Some(end) = self.host_ends.get_mut(usize::from(which) % count) {
            act(end);
        }
    }

    fn take_host_ends(&mut self) {
        let mut port = [0; 4];
        while let Ok((_, fds)) = vmm_api::fds::recv(self.owner.as_fd(), &mut port) {
            for end in fds.into_iter().map(UnixStream::from) {
                end.set_nonblocking(true).expect("a socket");
                self.host_ends.push(end);
            }
            self.host_ends.truncate(MAX_HOST_ENDS);
        }
    }
}

impl Wrong {
    fn apply(self, header: Header) -> Header {
        match self {
            Self::SrcCid(src_cid) => Header { src_cid, ..header },
            Self::DstCid(dst_cid) => Header { dst_cid, ..header },
            Self::DstPort(dst_port) => Header { dst_port, ..header },
            Self::Len(len) => Header { len, ..header },
            Self::Typ(typ) => Header { typ, ..header },
            Self::Op(op) => Header { op, ..header },
        }
    }
}
