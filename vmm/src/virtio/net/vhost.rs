//! vhost-net (linux/vhost.h): the host's kernel takes the rings of a queue pair and moves frames between them and a queue of the TAP
//! interface. Nothing of ours sees a frame, so nothing of ours checks, limits or counts it.
//!
//! ```text
//!   doorbell ─► KVM ── kick ─► vhost ◄─► queue of the TAP interface      no thread of ours
//!   vector   ◄─ KVM ◄─ call ───┘
//! ```
//!
//! All on the thread of devices. What the guest writes is read by the kernel, which reaches guest RAM and nothing else of ours.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use vhost::vhost_kern::VhostKernBackend;
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT as _;
use vm_memory::GuestMemory as _;

use super::backend::Backend as _;
use super::tap::{Tap, set_backend};
use super::{NetError, QUEUE_SIZE, VIRTIO_NET_F_MRG_RXBUF};
use crate::device_thread::DeviceThread;
use crate::event_loop::lock;
use crate::virtio::pci::RING_FEATURES;
use crate::virtio::{ActivateError, Activation, ActiveQueue, GuestMemory, Irqfd};

/// What vhost does itself, and every kernel since 4.0 can. Checksums and segments are the TAP interface's.
const FEATURES: u64 = VIRTIO_NET_F_MRG_RXBUF | RING_FEATURES;

/// All queue pairs of an interface; a thread of the kernel works for each.
pub(super) struct VhostPairs(Vec<VhostPair>);

struct VhostPair {
    tap: Tap,
    vhost: Vhost,
    /// Interrupts of both queues, while the driver works.
    calls: Option<[Irqfd; 2]>,
    /// Whether frames pass.
    carries: bool,
}

/// A descriptor of /dev/vhost-net.
struct Vhost {
    fd: OwnedFd,
    /// None until the driver works.
    memory: Arc<GuestMemory>,
}

impl AsRawFd for Vhost {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for Vhost {
    type AS = Arc<GuestMemory>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

impl VhostPairs {
    /// Takes the queues of an interface with a descriptor of vhost-net for each; the kernel's threads start.
    pub(super) fn open(taps: Vec<Tap>, fds: Vec<OwnedFd>) -> Result<Self, NetError> {
        let pair = |(tap, fd)| {
            let vhost = Vhost { fd, memory: Arc::default() };
            vhost.set_owner().map_err(NetError::Vhost)?;
            let missing = FEATURES & !vhost.get_features().map_err(NetError::Vhost)?;
            if missing != 0 {
                return Err(NetError::VhostFeatures { missing });
            }
            Ok(VhostPair { tap, vhost, calls: None, carries: false })
        };
        taps.into_iter().zip(fds).map(pair).collect::<Result<_, _>>().map(Self)
    }

    /// Hands over the rings of a pair; frames pass when [`Self::follow`] says so.
    pub(super) fn start(
        &mut self,
        index: usize,
        queues: [ActiveQueue; 2],
        with: &Activation,
    ) -> Result<(), ActivateError> {
        let host = |action| move |source| ActivateError::Host { action, source };
        let pair = self.0.get_mut(index).ok_or(ActivateError::QueueMissing { index })?;
        pair.tap.set_features(with.features).map_err(host("set the offloads of a TAP interface"))?;
        let [rx, tx] = &queues;
        let calls = [rx.interrupt.irqfd(), tx.interrupt.irqfd()];
        let [rx_call, tx_call] = calls.map(|call| call.map_err(host("make an eventfd")));
        let calls = [rx_call?, tx_call?];
        pair.vhost.memory = with.memory.clone();
        let handed = pair.vhost.take_rings(&queues, &calls, with.features);
        handed.map_err(io::Error::other).map_err(host("hand the rings to vhost-net"))?;
        pair.calls = Some(calls);
        Ok(())
    }

    /// Follows the link and the number of pairs that the driver uses.
    pub(super) fn follow(&mut self, link_up: bool, active_pairs: u16) -> io::Result<()> {
        for (index, pair) in (0..).zip(&mut self.0) {
            let attached = pair.calls.is_some() && index < active_pairs;
            if !(attached && link_up) {
                pair.set_carries(false)?;
            }
            // Else frames would wait in a queue that nobody looks at.
            pair.tap.set_attached(attached)?;
            pair.set_carries(attached && link_up)?;
        }
        Ok(())
    }

    /// Takes the rings back: the kernel touches guest RAM no more.
    pub(super) fn stop(&mut self) {
        for pair in &mut self.0 {
            if let Err(error) = pair.set_carries(false) {
                // The kernel refuses this of a descriptor that is not its owner's, and ours is.
                tracing::debug!(%error, "vhost-net does not give its rings back");
            }
            pair.calls = None;
        }
    }

    /// Header features that every queue can work with.
    pub(super) fn features(&self) -> u64 {
        self.0.iter().fold(u64::MAX, |common, pair| common & pair.tap.features())
    }
}

impl VhostPair {
    fn set_carries(&mut self, carries: bool) -> io::Result<()> {
        if self.carries == carries {
            return Ok(());
        }
        // What is half done is done when it has to be undone.
        self.carries = true;
        for ring in 0..2 {
            set_backend(self.vhost.fd.as_fd(), ring, carries.then_some(&self.tap))?;
        }
        self.carries = carries;
        Ok(())
    }
}

impl Vhost {
    /// The rings begin anew; they lie in guest RAM, which is checked once more.
    fn take_rings(&self, queues: &[ActiveQueue; 2], calls: &[Irqfd; 2], features: u64) -> vhost::Result<()> {
        self.set_features(features & FEATURES)?;
        let regions = self.memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
        self.set_mem_table(&regions.collect::<vhost::Result<Vec<_>>>()?)?;
        // Both count the ring for frames to the guest first.
        for (ring, (active, call)) in queues.iter().zip(calls).enumerate() {
            let queue = &active.queue;
            self.set_vring_num(ring, queue.size())?;
            self.set_vring_base(ring, 0)?;
            let addresses = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: queue.desc_table(),
                avail_ring_addr: queue.avail_ring(),
                used_ring_addr: queue.used_ring(),
                log_addr: None,
            };
            self.set_vring_addr(ring, &addresses)?;
            self.set_vring_call(ring, call.eventfd())?;
            self.set_vring_kick(ring, &active.kick)?;
        }
        Ok(())
    }
}

/// Has the pairs follow, from any thread.
pub(super) struct Follower {
    pairs: Arc<Mutex<VhostPairs>>,
    device_thread: DeviceThread,
    /// What to follow next.
    order: Arc<Mutex<Option<(bool, u16)>>>,
}

impl Follower {
    pub(super) fn new(pairs: Arc<Mutex<VhostPairs>>, device_thread: DeviceThread) -> Self {
        Self { pairs, device_thread, order: Arc::default() }
    }

    pub(super) fn follow(&self, link_up: bool, active_pairs: u16) {
        // However often a guest changes its mind, one order waits.
        if lock(&self.order).replace((link_up, active_pairs)).is_some() {
            return;
        }
        let (pairs, order) = (self.pairs.clone(), self.order.clone());
        self.device_thread.post(move || {
            let Some((link_up, active_pairs)) = lock(&order).take() else { return };
            if let Err(error) = lock(&pairs).follow(link_up, active_pairs) {
                // The interface is gone, and a guest may ask for this again and again.
                tracing::debug!(%error, "a queue of a TAP interface cannot be used or left");
            }
        });
    }
}
