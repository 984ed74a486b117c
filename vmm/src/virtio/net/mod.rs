//! Network device (VIRTIO 1.2, 5.1): Ethernet frames between the guest and what carries them on the host.
//!
//! ```text
//!   driver ─ tx ring ─► Tx (checks) ─► Backend: Tap | Stream        one Worker thread for each pair of queues
//!          ◄ rx ring ── Rx          ◄─
//!          ─ control ─► ControlQueue ─► Shared ─► workers           event loop
//! ```
//!
//! Segmentation and checksums are left to the host's kernel where the backend can pass the header on.

use std::borrow::Cow;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use thiserror::Error;
use virtio_queue::QueueT as _;
use vmm_api::net::{Backend as BackendKind, MAX_QUEUE_PAIRS, MIN_MTU, NetDevice, NetStats};

use super::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::event_loop::{EventSet, Registry, lock};
use backend::Backend;
use control::ControlQueue;
use limit::Limiter;
use rx::Rx;
pub use shared::NetState;
use shared::Shared;
use spoof::SpoofGuard;
use stream::Stream;
use tap::Tap;
use tx::Tx;
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
    #[error("{count} descriptors for a network interface: a TAP interface has 1 to {MAX_QUEUE_PAIRS}, a stream has 1")]
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
}

/// The device.
pub struct Net {
    device: NetDevice,
    queue_sizes: Vec<u16>,
    backend_features: u64,
    /// Those of the pairs that no worker has.
    backends: Vec<Box<dyn Backend>>,
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

    /// What a restored device begins with.
    #[must_use]
    pub fn state(&self) -> NetState {
        self.shared.state(&self.name)
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
        let most = if device.backend == BackendKind::Tap { usize::from(MAX_QUEUE_PAIRS) } else { 1 };
        if !(1..=most).contains(&fds.len()) {
            return Err(NetError::DescriptorCount { count: fds.len() });
        }
        let pair_count = fds.len();
        let mut backends: Vec<Box<dyn Backend>> = Vec::new();
        for fd in fds {
            backends.push(match device.backend {
                BackendKind::Tap => {
                    let tap = Tap::open(fd).map_err(NetError::Backend)?;
                    if pair_count > 1 && !tap.is_multi_queue() {
                        return Err(NetError::OneQueue);
                    }
                    Box::new(tap)
                }
                BackendKind::Stream => Box::new(Stream::open(fd).map_err(NetError::Backend)?),
            });
        }
        let mut queue_sizes = vec![QUEUE_SIZE; pair_count * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let backend_features = backends.iter().fold(u64::MAX, |common, backend| common & backend.features());
        let shared = Arc::new(Shared::default());
        shared.disconnect();
        Ok(Self {
            device,
            queue_sizes,
            backend_features,
            backends,
            workers: Vec::new(),
            control: None,
            registry,
            shared,
        })
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
        let host = |action| move |source| ActivateError::Host { action, source };
        let backend = self.backends.first().ok_or(ActivateError::QueueMissing { index })?;
        backend.set_features(with.features).map_err(host("set the offloads of a TAP interface"))?;
        let backend = self.backends.remove(0);
        let guard = self.device.only_from.clone().map(|addresses| SpoofGuard::new(self.device.mac, addresses));
        let [rx, tx] = queues;
        let now = Instant::now();
        let pair = Pair {
            index: u16::try_from(index).expect("at most 8"),
            rx: Rx::new(rx, with.features & VIRTIO_NET_F_MRG_RXBUF != 0),
            tx: Tx::new(tx, with.features, self.device.mtu, guard),
            backend,
            memory: with.memory.clone(),
            shared: self.shared.clone(),
            rx_limit: Limiter::new(self.device.rx_limit, now),
            tx_limit: Limiter::new(self.device.tx_limit, now),
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
            .add(fd, EventSet::IN, 0, control.clone())
            .map_err(|source| ActivateError::Host { action: "watch a queue", source })?;
        self.control = Some(control);
        Ok(())
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
        self.shared.disconnect();
    }
}

#[cfg(test)]
mod tests;
