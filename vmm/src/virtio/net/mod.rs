//! Network device (VIRTIO 1.2, 5.1): Ethernet frames between the guest and what carries them on the host.
//!
//! ```text
//!   driver ─ tx ring ─► Tx (checks) ─► Backend: Tap | Stream        one Worker thread for each pair of queues
//!          ◄ rx ring ── Rx          ◄─
//!          ─ control ─► ControlQueue ─► Shared ─► workers           event loop
//! ```
//!
//! With vhost-net (`vhost.rs`) the host's kernel has both rings of a pair, and there are no workers.
//!
//! Segmentation and checksums are left to the host's kernel where the backend can pass the header on.

use std::borrow::Cow;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use thiserror::Error;
use virtio_queue::QueueT as _;
use vmm_api::net::{Backend as BackendKind, MAX_QUEUE_PAIRS, MIN_MTU, NetDevice, NetStats, RateLimit};

use super::{ActivateError, Activation, ActiveQueue, RING, VirtioDevice};
use crate::event_loop::{Registry, lock};
use backend::Backend;
use control::ControlQueue;
use rx::Rx;
use shared::Shared;
use spoof::SpoofGuard;
use stream::Stream;
use tap::Tap;
use tx::Tx;
use vhost::{Follower, VhostPairs};
use worker::{Pair, Worker};

mod backend;
mod control;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod header;
mod limit;
mod rx;
mod shared;
mod spoof;
mod stream;
mod tap;
mod tx;
mod used;
mod vhost;
mod worker;

const VIRTIO_ID_NET: u16 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;
/// Most descriptors of one frame; Linux uses up to 19.
const MAX_CHAIN_LEN: usize = 64;

const VIRTIO_NET_F_MTU: u64 = 1 << 3;
const VIRTIO_NET_F_MAC: u64 = 1 << 5;
const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
const VIRTIO_NET_F_STATUS: u64 = 1 << 16;
const VIRTIO_NET_F_CTRL_VQ: u64 = 1 << 17;
const VIRTIO_NET_F_MQ: u64 = 1 << 22;
const VIRTIO_NET_S_LINK_UP: u16 = 1;

/// Why there is no network device.
#[derive(Debug, Error)]
pub enum NetError {
    /// Too few or too many descriptors.
    #[error(
        "{count} descriptors for a network interface: a TAP interface has 1 to {MAX_QUEUE_PAIRS}, with vhost-net twice as \
         many, a stream has 1"
    )]
    DescriptorCount {
        /// How many came.
        count: usize,
    },
    /// The MTU is too small.
    #[error("an MTU of {mtu} bytes: it is {MIN_MTU} or more")]
    Mtu {
        /// What was asked for.
        mtu: u16,
    },
    /// A TAP interface with one queue was given several times.
    #[error("the TAP interface was made without IFF_MULTI_QUEUE")]
    OneQueue,
    /// A descriptor cannot carry frames.
    #[error("a descriptor cannot carry frames")]
    Backend(#[source] io::Error),
    /// The host's vhost-net does not work.
    #[error("vhost-net of this host cannot be used")]
    Vhost(#[source] ::vhost::Error),
    /// The host's vhost-net is too old.
    #[error("vhost-net of this host lacks the features {missing:#x}")]
    VhostFeatures {
        /// Those.
        missing: u64,
    },
    /// Somebody has to look at the frames.
    #[error("an interface with limits, or with addresses that it can send from, cannot be vhost-net's")]
    Unchecked,
}

/// The device.
pub struct Net {
    device: NetDevice,
    queue_sizes: Vec<u16>,
    backend_features: u64,
    /// Those of the pairs that no worker has.
    backends: Vec<Box<dyn Backend>>,
    /// All pairs, when the host's kernel works on them.
    vhost: Option<Arc<Mutex<VhostPairs>>>,
    workers: Vec<Worker>,
    control: Option<Arc<Mutex<ControlQueue>>>,
    registry: Registry,
    shared: Arc<Shared>,
}

/// Controls a device that is on the bus.
#[derive(Clone)]
pub struct NetHandle {
    name: String,
    shared: Arc<Shared>,
}

impl NetHandle {
    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Gives the guest a carrier or takes it away.
    pub fn set_link(&self, up: bool) {
        self.shared.set_link(up);
    }

    /// What it has carried.
    #[must_use]
    pub fn stats(&self) -> NetStats {
        self.shared.stats(&self.name)
    }
}

impl Net {
    /// Makes the device over its open descriptors.
    ///
    /// # Errors
    /// Each variant of [`NetError`].
    pub fn open(device: NetDevice, fds: Vec<OwnedFd>, registry: Registry) -> Result<Self, NetError> {
        if device.mtu < MIN_MTU {
            return Err(NetError::Mtu { mtu: device.mtu });
        }
        let pair_count = check_count(device.backend, fds.len())?;
        let mut backends: Vec<Box<dyn Backend>> = Vec::new();
        let mut vhost = None;
        match device.backend {
            BackendKind::Tap => {
                for tap in open_taps(fds)? {
                    backends.push(Box::new(tap));
                }
            }
            BackendKind::Vhost => vhost = Some(open_vhost(&device, fds)?),
            BackendKind::Stream => {
                for fd in fds {
                    backends.push(Box::new(Stream::open(fd).map_err(NetError::Backend)?));
                }
            }
        }
        Ok(Self::new(device, pair_count, backends, vhost, registry))
    }

    /// With the queues of `pair_count` pairs, for each of which there is a back end or one of `vhost`.
    fn new(
        device: NetDevice,
        pair_count: usize,
        backends: Vec<Box<dyn Backend>>,
        vhost: Option<VhostPairs>,
        registry: Registry,
    ) -> Self {
        let mut queue_sizes = vec![QUEUE_SIZE; pair_count * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let most = vhost.as_ref().map_or(u64::MAX, VhostPairs::features);
        let backend_features = backends.iter().fold(most, |common, backend| common & backend.features());
        let shared = Arc::new(Shared::new(&device, Instant::now()));
        shared.disconnect();
        Self {
            device,
            queue_sizes,
            backend_features,
            backends,
            vhost: vhost.map(|pairs| Arc::new(Mutex::new(pairs))),
            workers: Vec::new(),
            control: None,
            registry,
            shared,
        }
    }

    /// What controls the device when the bus has it.
    #[must_use]
    pub fn handle(&self) -> NetHandle {
        NetHandle { name: self.device.name.clone(), shared: self.shared.clone() }
    }

    fn pair_count(&self) -> usize {
        self.queue_sizes.len() / 2
    }

    fn start_pair(&mut self, index: usize, queues: [ActiveQueue; 2], with: &Activation) -> Result<(), ActivateError> {
        if let Some(pairs) = &self.vhost {
            return lock(pairs).start(index, queues, with);
        }
        let host = |action| move |source| ActivateError::Host { action, source };
        let backend = self.backends.first().ok_or(ActivateError::QueueMissing { index })?;
        backend.set_features(with.features).map_err(host("set the offloads of a TAP interface"))?;
        let backend = self.backends.remove(0);
        let guard = self.device.only_from.clone().map(|addresses| SpoofGuard::new(self.device.mac, addresses));
        let [rx, tx] = queues;
        let pair = Pair {
            index: u16::try_from(index).expect("at most 8"),
            rx: Rx::new(rx, with.features & VIRTIO_NET_F_MRG_RXBUF != 0),
            tx: Tx::new(tx, with.features, self.device.mtu, guard),
            backend,
            memory: with.memory.clone(),
            shared: self.shared.clone(),
        };
        let worker = Worker::spawn(pair, &with.device_thread);
        self.workers.push(worker.map_err(host("start a worker of a network interface"))?);
        Ok(())
    }

    fn start_control(&mut self, queue: ActiveQueue, with: &Activation) -> Result<(), ActivateError> {
        let control = ControlQueue {
            memory: with.memory.clone(),
            queue,
            shared: self.shared.clone(),
            max_pairs: if with.features & VIRTIO_NET_F_MQ == 0 { 1 } else { self.device_pairs() },
        };
        let fd = control.as_raw_fd();
        let control = Arc::new(Mutex::new(control));
        self.registry
            .add(fd, RING, 0, control.clone())
            .map_err(|source| ActivateError::Host { action: "watch a queue", source })?;
        self.control = Some(control);
        Ok(())
    }

    /// Lets the host's kernel move frames, if that is who does.
    fn start_vhost(&self, with: &Activation) -> Result<(), ActivateError> {
        let host = |action| move |source| ActivateError::Host { action, source };
        let Some(pairs) = &self.vhost else { return Ok(()) };
        self.shared.set_follower(Follower::new(pairs.clone(), with.device_thread.clone()));
        let following = lock(pairs).follow(self.shared.link_up(), self.shared.active_pairs());
        following.map_err(host("hand a TAP interface to vhost-net"))
    }

    fn device_pairs(&self) -> u16 {
        u16::try_from(self.pair_count()).expect("at most 8")
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let always = VIRTIO_NET_F_MTU | VIRTIO_NET_F_MAC | VIRTIO_NET_F_MRG_RXBUF | VIRTIO_NET_F_STATUS;
        let several = if self.pair_count() > 1 { VIRTIO_NET_F_MQ } else { 0 };
        always | VIRTIO_NET_F_CTRL_VQ | several | self.backend_features
    }

    fn config(&self) -> Cow<'_, [u8]> {
        // virtio_net_config (VIRTIO 1.2, 5.1.4).
        let mut config = self.device.mac.0.to_vec();
        let status = if self.shared.link_up() { VIRTIO_NET_S_LINK_UP } else { 0 };
        config.extend(status.to_le_bytes());
        config.extend(self.device_pairs().to_le_bytes());
        config.extend(self.device.mtu.to_le_bytes());
        Cow::Owned(config)
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let several = activation.features & VIRTIO_NET_F_MQ != 0;
        let pair_count = if several { self.pair_count() } else { 1 };
        self.shared.connect(activation.config_changed.clone());
        let mut queues = std::mem::take(&mut activation.queues).into_iter();
        for index in 0..pair_count {
            let (Some(rx), Some(tx)) = (queues.next(), queues.next()) else {
                return Err(ActivateError::QueueMissing { index: index * 2 });
            };
            // A driver with fewer CPUs than pairs may leave some alone.
            if rx.queue.ready() && tx.queue.ready() {
                self.start_pair(index, [rx, tx], &activation)?;
            } else if index == 0 {
                return Err(ActivateError::QueueMissing { index: 0 });
            }
        }
        self.start_vhost(&activation)?;
        // The control queue follows the pairs that are in use (VIRTIO 1.2, 5.1.2).
        match queues.next().filter(|queue| queue.queue.ready()) {
            Some(queue) => self.start_control(queue, &activation),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        if let Some(control) = self.control.take() {
            self.registry.remove(lock(&control).as_raw_fd());
        }
        for worker in self.workers.drain(..).rev() {
            if let Some(backend) = worker.stop() {
                self.backends.insert(0, backend);
            }
        }
        if let Some(pairs) = &self.vhost {
            lock(pairs).stop();
        }
        self.shared.disconnect();
    }
}

/// Returns the number of queue pairs.
fn check_count(backend: BackendKind, count: usize) -> Result<usize, NetError> {
    let (for_each, most) = match backend {
        BackendKind::Tap => (1, MAX_QUEUE_PAIRS.into()),
        BackendKind::Vhost => (2, MAX_QUEUE_PAIRS.into()),
        BackendKind::Stream => (1, 1),
    };
    let pair_count = count / for_each;
    if !count.is_multiple_of(for_each) || !(1..=most).contains(&pair_count) {
        return Err(NetError::DescriptorCount { count });
    }
    Ok(pair_count)
}

fn open_taps(fds: Vec<OwnedFd>) -> Result<Vec<Tap>, NetError> {
    let several = fds.len() > 1;
    let open = |fd| {
        let tap = Tap::open(fd).map_err(NetError::Backend)?;
        if several && !tap.is_multi_queue() { Err(NetError::OneQueue) } else { Ok(tap) }
    };
    fds.into_iter().map(open).collect()
}

fn open_vhost(device: &NetDevice, mut taps: Vec<OwnedFd>) -> Result<VhostPairs, NetError> {
    let none = RateLimit::default();
    if device.rx_limit != none || device.tx_limit != none || device.only_from.is_some() {
        return Err(NetError::Unchecked);
    }
    let fds = taps.split_off(taps.len() / 2);
    VhostPairs::open(open_taps(taps)?, fds)
}

#[cfg(test)]
mod tests;
