//! What the threads of one interface share: the link, the number of pairs in use, counters, limits.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::time::Instant;

use vmm_api::net::{NetDevice, NetStats};
use vmm_sys_util::eventfd::EventFd;

use super::limit::Limiter;
use super::vhost::Follower;
use crate::event_loop::lock;
use crate::virtio::Interrupt;

/// All of the device's state beside its queues and what the driver negotiated, shared by the device, its workers and who
/// controls it. A reset by the driver changes `active_pairs` and `wiring` alone.
#[derive(Default)]
pub(super) struct Shared {
    link_down: AtomicBool,
    /// The other side is gone, for good.
    lost: AtomicBool,
    active_pairs: AtomicU16,
    pub(super) counters: Counters,
    /// Of all pairs together.
    pub(super) rx_limit: Limiter,
    pub(super) tx_limit: Limiter,
    wiring: Mutex<Wiring>,
}

/// What exists only while the driver works.
#[derive(Default)]
struct Wiring {
    config_changed: Option<Interrupt>,
    wakes: Vec<EventFd>,
    follower: Option<Follower>,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) rx_frames: AtomicU64,
    pub(super) rx_bytes: AtomicU64,
    pub(super) rx_dropped: AtomicU64,
    pub(super) tx_frames: AtomicU64,
    pub(super) tx_bytes: AtomicU64,
    pub(super) tx_dropped: AtomicU64,
    pub(super) tx_malformed: AtomicU64,
    pub(super) tx_spoofed: AtomicU64,
    pub(super) throttled: AtomicU64,
}

/// Adds to a counter.
pub(super) fn count(counter: &AtomicU64, amount: usize) {
    counter.fetch_add(amount as u64, Ordering::Relaxed);
}

impl Shared {
    /// With the limits of an interface, and the link up.
    pub(super) fn new(device: &NetDevice, now: Instant) -> Self {
        let [rx_limit, tx_limit] = [device.rx_limit, device.tx_limit].map(|limit| Limiter::new(limit, now));
        Self { rx_limit, tx_limit, ..Self::default() }
    }

    /// Whether frames pass.
    pub(super) fn link_up(&self) -> bool {
        !self.link_down.load(Ordering::Acquire) && !self.lost.load(Ordering::Acquire)
    }

    pub(super) fn active_pairs(&self) -> u16 {
        self.active_pairs.load(Ordering::Acquire)
    }

    /// The driver uses this many pairs from now on.
    pub(super) fn set_active_pairs(&self, count: u16) {
        self.active_pairs.store(count, Ordering::Release);
        self.wake_all();
    }

    /// Gives the guest a carrier or takes it away.
    pub(super) fn set_link(&self, up: bool) {
        self.link_down.store(!up, Ordering::Release);
        self.announce();
    }

    /// Nothing will come from the other side any more.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
        self.announce();
    }

    fn announce(&self) {
        if let Some(config_changed) = &lock(&self.wiring).config_changed {
            // A driver without that vector looks at the status by itself.
            let _ = config_changed.trigger();
        }
        self.wake_all();
    }

    /// The driver works: whom to tell of changes.
    pub(super) fn connect(&self, config_changed: Interrupt) {
        lock(&self.wiring).config_changed = Some(config_changed);
    }

    /// A worker that looks at this whenever it is woken.
    pub(super) fn add_worker(&self, wake: &EventFd) -> io::Result<()> {
        lock(&self.wiring).wakes.push(wake.try_clone()?);
        Ok(())
    }

    /// Queue pairs that the host's kernel works on.
    pub(super) fn set_follower(&self, follower: Follower) {
        lock(&self.wiring).follower = Some(follower);
    }

    /// The driver has reset the device.
    pub(super) fn disconnect(&self) {
        *lock(&self.wiring) = Wiring::default();
        self.active_pairs.store(1, Ordering::Release);
    }

    fn wake_all(&self) {
        let wiring = lock(&self.wiring);
        for wake in &wiring.wakes {
            // A counter that is full wakes as well.
            let _ = wake.write(1);
        }
        if let Some(follower) = &wiring.follower {
            follower.follow(self.link_up(), self.active_pairs());
        }
    }

    pub(super) fn stats(&self, name: &str) -> NetStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        NetStats {
            name: name.to_owned(),
            link_up: self.link_up(),
            rx_frames: read(&counters.rx_frames),
            rx_bytes: read(&counters.rx_bytes),
            rx_dropped: read(&counters.rx_dropped),
            tx_frames: read(&counters.tx_frames),
            tx_bytes: read(&counters.tx_bytes),
            tx_dropped: read(&counters.tx_dropped),
            tx_malformed: read(&counters.tx_malformed),
            tx_spoofed: read(&counters.tx_spoofed),
            throttled: read(&counters.throttled),
        }
    }
}
