//! The control queue (VIRTIO 1.2, 5.1.6.5): the driver says how many queue pairs it uses. Works on the event loop.

use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::Bytes as _;

use super::MAX_CHAIN_LEN;
use super::shared::Shared;
use crate::event_loop::{EventSet, EventSource};
use crate::virtio::{ActiveQueue, GuestMemory};

const VIRTIO_NET_CTRL_MQ: u8 = 4;
const VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET: u8 = 0;
const VIRTIO_NET_OK: u8 = 0;
const VIRTIO_NET_ERR: u8 = 1;
/// Class, command and a number of pairs.
const COMMAND_LEN: usize = 4;

/// The queue.
pub(super) struct ControlQueue {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) queue: ActiveQueue,
    pub(super) shared: Arc<Shared>,
    pub(super) max_pairs: u16,
}

impl ControlQueue {
    /// The descriptor to watch.
    pub(super) fn as_raw_fd(&self) -> i32 {
        self.queue.kick.as_raw_fd()
    }
}

impl EventSource for ControlQueue {
    fn on_event(&mut self, _token: u64, _ready: EventSet) {
        let Self { memory, queue, shared, max_pairs } = self;
        queue.serve(memory, |chain| answer(memory, chain, |command| obey(command, *max_pairs, shared)));
    }
}

/// Answers one command; returns the length written.
fn answer(memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>, obey: impl Fn(&[u8]) -> bool) -> u32 {
    let mut command = Vec::new();
    for buffer in chain.clone().readable().take(MAX_CHAIN_LEN) {
        let at = command.len();
        command.resize(at + (COMMAND_LEN - at).min(buffer.len() as usize), 0);
        if memory.read_slice(&mut command[at..], buffer.addr()).is_err() {
            return 0;
        }
    }
    let ack = if obey(&command) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    let place = chain.writable().take(MAX_CHAIN_LEN).find(|buffer| buffer.len() > 0);
    let written = place.is_some_and(|buffer| memory.write_obj(ack, buffer.addr()).is_ok());
    u32::from(written)
}

fn obey(command: &[u8], max_pairs: u16, shared: &Shared) -> bool {
    let [VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, low, high] = command else { return false };
    let pairs = u16::from_le_bytes([*low, *high]);
    if !(1..=max_pairs).contains(&pairs) {
        return false;
    }
    shared.set_active_pairs(pairs);
    true
}
