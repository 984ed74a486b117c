//! The thread of one queue pair: waits for doorbells and for the host, moves frames both ways, in turns of bounded length.

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use virtio_queue::{Error, QueueT as _};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::Backend;
use super::header::HEADER_LEN;
use super::rx::{Delivery, Rx};
use super::shared::{Shared, count};
use super::tx::{Sending, Tx, TxError};
use crate::device_thread::DeviceThread;
use crate::jail::ThreadKind;
use crate::virtio::{GuestMemory, RING};

/// Frames for the guest in one turn.
const RX_BATCH: usize = 256;
/// An Ethernet header.
const MIN_FRAME_LEN: usize = HEADER_LEN + 14;
/// A ring that claims frames and gives none this many times in a row is broken.
const MAX_EMPTY_TURNS: u32 = 16;

/// What a pair works with.
pub(super) struct Pair {
    pub(super) index: u16,
    pub(super) rx: Rx,
    pub(super) tx: Tx,
    pub(super) backend: Box<dyn Backend>,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) shared: Arc<Shared>,
}

/// Stops and joins its thread when told or dropped.
pub(super) struct Worker {
    wake: EventFd,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<Box<dyn Backend>>>,
}

impl Worker {
    pub(super) fn spawn(pair: Pair, device_thread: &DeviceThread) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK)?;
        pair.shared.add_worker(&wake)?;
        let watch = Watch::create(&pair, &wake)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let mut serving = Serving { pair, watch, stopping: stopping.clone(), attached: None };
        let builder = thread::Builder::new().name(format!("net{}", serving.pair.index));
        let thread = device_thread.spawn(builder, ThreadKind::Net, move || {
            if let Err(TxError::Ring(error)) = serving.run() {
                // Nothing can be moved until the driver resets the device.
                tracing::debug!(%error, "the driver broke a ring of a network interface");
            }
            serving.pair.backend
        })?;
        Ok(Self { wake, stopping, thread: Some(thread) })
    }

    /// Ends the thread; returns what carried the frames, for the next one.
    pub(super) fn stop(mut self) -> Option<Box<dyn Backend>> {
        self.join()
    }

    fn join(&mut self) -> Option<Box<dyn Backend>> {
        self.stopping.store(true, Ordering::Relaxed);
        let _ = self.wake.write(1);
        self.thread.take().and_then(|thread| thread.join().ok())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.join();
    }
}

/// Why a direction rests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Turn {
    /// There is more to do at once.
    Busy,
    /// Until there is something.
    Idle,
    /// Until the guest offers buffers, or the host takes frames.
    Blocked,
    /// Until the limit allows more.
    After(Duration),
}

struct Serving {
    pair: Pair,
    watch: Watch,
    stopping: Arc<AtomicBool>,
    /// Whether the host uses our queue, once that is known.
    attached: Option<bool>,
}

impl Serving {
    fn run(&mut self) -> Result<(), TxError> {
        self.pair.rx.active.queue.disable_notification(&*self.pair.memory).map_err(TxError::Ring)?;
        let mut timeout = Some(Duration::ZERO);
        loop {
            let lost = self.watch.wait(timeout).map_err(TxError::Backend)?;
            if self.stopping.load(Ordering::Relaxed) {
                return Ok(());
            }
            if lost {
                self.lose();
            }
            self.attach();
            timeout = match self.turn() {
                Ok(timeout) => timeout,
                Err(TxError::Backend(error)) => {
                    tracing::warn!(%error, "a network interface has lost the host's side");
                    self.lose();
                    Some(Duration::ZERO)
                }
                Err(error) => return Err(error),
            };
        }
    }

    /// Moves frames both ways; returns how long to wait for the next event.
    fn turn(&mut self) -> Result<Option<Duration>, TxError> {
        let tx = self.transmit()?;
        let usable = self.pair.shared.link_up() && self.attached == Some(true);
        let rx = if usable { self.receive()? } else { Turn::Blocked };
        let mut interest = EventSet::empty();
        interest.set(EventSet::IN, matches!(rx, Turn::Idle | Turn::Busy));
        let behind = self.pair.shared.link_up() && self.pair.backend.is_behind();
        interest.set(EventSet::OUT, behind || tx == Turn::Blocked);
        self.watch.set_interest(interest).map_err(TxError::Backend)?;
        let timeout = |turn| match turn {
            Turn::Busy => Some(Duration::ZERO),
            Turn::After(wait) => Some(wait),
            Turn::Idle | Turn::Blocked => None,
        };
        Ok([tx, rx].into_iter().filter_map(timeout).min())
    }

    fn transmit(&mut self) -> Result<Turn, TxError> {
        let turn = self.send_batch();
        let Pair { tx, memory, .. } = &mut self.pair;
        tx.notify(memory).map_err(TxError::Ring)?;
        turn
    }

    fn send_batch(&mut self) -> Result<Turn, TxError> {
        let Pair { tx, memory, backend, shared, .. } = &mut self.pair;
        let counters = &shared.counters;
        let link_up = shared.link_up();
        match if link_up { backend.flush() } else { Ok(()) } {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Blocked),
            other => other.map_err(TxError::Backend)?,
        }
        tx.active.queue.disable_notification(&**memory).map_err(TxError::Ring)?;
        let (mut is_moving, mut empty_turns) = (false, 0);
        for _ in 0..tx.active.queue.size() {
            if let Some(wait) = shared.tx_limit.wait(Instant::now) {
                count(&counters.throttled, 1);
                return Ok(Turn::After(wait));
            }
            match tx.send_next(memory, &mut **backend, link_up)? {
                Sending::Sent(len) => {
                    count(&counters.tx_frames, 1);
                    count(&counters.tx_bytes, len);
                    shared.tx_limit.take(len);
                }
                Sending::Blocked => return Ok(Turn::Blocked),
                Sending::Dropped | Sending::NoLink => count(&counters.tx_dropped, 1),
                Sending::Malformed => count(&counters.tx_malformed, 1),
                Sending::Spoofed => count(&counters.tx_spoofed, 1),
                // A guest that sends may be about to offer the next one: only one that offers nothing for a whole turn has to tell again.
                Sending::Empty if is_moving => return Ok(Turn::Busy),
                Sending::Empty => {
                    if !tx.active.queue.enable_notification(&**memory).map_err(TxError::Ring)? {
                        return Ok(Turn::Idle);
                    }
                    // A frame may have come just now; that none is there again and again means a broken ring.
                    empty_turns += 1;
                    if empty_turns > MAX_EMPTY_TURNS {
                        return Err(TxError::Ring(Error::InvalidAvailRingIndex));
                    }
                    continue;
                }
            }
            is_moving = true;
        }
        Ok(Turn::Busy)
    }

    fn receive(&mut self) -> Result<Turn, TxError> {
        let turn = self.receive_batch();
        let Pair { rx, memory, .. } = &mut self.pair;
        rx.notify(memory).map_err(TxError::Ring)?;
        turn
    }

    fn receive_batch(&mut self) -> Result<Turn, TxError> {
        let Pair { rx, memory, backend, shared, .. } = &mut self.pair;
        let counters = &shared.counters;
        for _ in 0..RX_BATCH {
            if !rx.has_frame() {
                if let Some(wait) = shared.rx_limit.wait(Instant::now) {
                    count(&counters.throttled, 1);
                    return Ok(Turn::After(wait));
                }
                match backend.receive(rx.frame_buffer()) {
                    Ok(len) if len < MIN_FRAME_LEN => continue,
                    Ok(len) => rx.set_frame(len),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Idle),
                    Err(error) => return Err(TxError::Backend(error)),
                }
            }
            let len = rx.frame_len() - HEADER_LEN;
            match rx.deliver(memory).map_err(TxError::Ring)? {
                Delivery::Delivered => {
                    count(&counters.rx_frames, 1);
                    count(&counters.rx_bytes, len);
                    shared.rx_limit.take(len);
                }
                Delivery::Dropped => count(&counters.rx_dropped, 1),
                Delivery::NoBuffers => {
                    let more = rx.ask_for_buffers(memory).map_err(TxError::Ring)?;
                    return Ok(if more { Turn::Busy } else { Turn::Blocked });
                }
            }
        }
        Ok(Turn::Busy)
    }

    /// Follows the number of pairs that the driver uses.
    fn attach(&mut self) {
        let wanted = self.pair.index < self.pair.shared.active_pairs();
        if self.attached == Some(wanted) || !self.pair.shared.link_up() {
            return;
        }
        // A queue that is not in use reports an error to whoever watches it.
        if !wanted {
            self.watch.forget_backend();
        }
        match self.pair.backend.set_attached(wanted) {
            Ok(()) => self.attached = Some(wanted),
            Err(error) => {
                tracing::warn!(%error, "a queue of a TAP interface cannot be attached");
                self.lose();
            }
        }
    }

    fn lose(&mut self) {
        self.watch.forget_backend();
        self.pair.shared.lose();
    }
}

const DOORBELL: u64 = 0;
const BACKEND: u64 = 1;

/// What a worker waits for.
struct Watch {
    epoll: Epoll,
    backend: RawFd,
    /// What the backend is watched for; nothing when it is not watched.
    interest: Option<EventSet>,
}

impl Watch {
    fn create(pair: &Pair, wake: &EventFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for doorbell in [&pair.rx.active.kick, &pair.tx.active.kick, wake] {
            epoll.ctl(ControlOperation::Add, doorbell.as_raw_fd(), EpollEvent::new(RING, DOORBELL))?;
        }
        Ok(Self { epoll, backend: pair.backend.fd().as_raw_fd(), interest: None })
    }

    /// Waits for an event; true when the backend's other side is gone.
    fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 4];
        // Rounded up, so that the wait is over when it returns.
        let timeout_ms = timeout.map_or(-1, |wait| i32::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        let is_lost = |event: &EpollEvent| {
            event.data() == BACKEND && event.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP)
        };
        Ok(events[..count].iter().any(is_lost))
    }

    fn set_interest(&mut self, interest: EventSet) -> io::Result<()> {
        let operation = match self.interest {
            Some(before) if before == interest => return Ok(()),
            Some(_) => ControlOperation::Modify,
            None if interest.is_empty() => return Ok(()),
            None => ControlOperation::Add,
        };
        self.epoll.ctl(operation, self.backend, EpollEvent::new(interest, BACKEND))?;
        self.interest = Some(interest);
        Ok(())
    }

    fn forget_backend(&mut self) {
        if self.interest.take().is_some() {
            // It was added with this number.
            let _ = self.epoll.ctl(ControlOperation::Delete, self.backend, EpollEvent::default());
        }
    }
}
