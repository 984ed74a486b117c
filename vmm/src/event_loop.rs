//! The loop of the main thread: epoll over queue kicks, sockets and the control socket.
//!
//! Sources are added and removed from any thread, as epoll_ctl(2) allows. Each registration has a key of its own, so an
//! event that was already fetched when its source went away reaches nobody.
//!
//! Lock order: a source's own lock may be held while the registry's is taken, never the other way round.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

pub use vmm_sys_util::epoll::EventSet;

/// Something that reacts to readiness.
pub trait EventSource: Send {
    /// The descriptor registered with `token` is ready.
    fn on_event(&mut self, token: u64, ready: EventSet);
}

/// A source as the loop holds it.
pub type SharedSource = Arc<Mutex<dyn EventSource>>;

/// Adds, changes and removes sources.
#[derive(Clone)]
pub struct Registry(Arc<Shared>);

struct Shared {
    epoll: Epoll,
    next_key: AtomicU64,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    by_key: BTreeMap<u64, (u64, SharedSource)>,
    key_of_fd: BTreeMap<RawFd, u64>,
}

/// Most events fetched at once.
const BATCH: usize = 32;

impl Registry {
    /// Makes an empty registry.
    ///
    /// # Errors
    /// What epoll_create1(2) says.
    pub fn create() -> io::Result<Self> {
        let epoll = Epoll::new()?;
        Ok(Self(Arc::new(Shared { epoll, next_key: AtomicU64::new(1), entries: Mutex::default() })))
    }

    /// Watches `fd`; `source` is told with `token`. The caller removes it before it closes `fd`.
    ///
    /// # Errors
    /// What epoll_ctl(2) says.
    pub fn add(&self, fd: RawFd, interest: EventSet, token: u64, source: SharedSource) -> io::Result<()> {
        let key = self.0.next_key.fetch_add(1, Ordering::Relaxed);
        let mut entries = self.entries();
        entries.by_key.insert(key, (token, source));
        entries.key_of_fd.insert(fd, key);
        let added = self.0.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(interest, key));
        if added.is_err() {
            entries.by_key.remove(&key);
            entries.key_of_fd.remove(&fd);
        }
        added
    }

    /// Changes what `fd` is watched for.
    ///
    /// # Errors
    /// `NotFound` when it is not watched; what epoll_ctl(2) says.
    pub fn modify(&self, fd: RawFd, interest: EventSet) -> io::Result<()> {
        let entries = self.entries();
        let key = *entries.key_of_fd.get(&fd).ok_or(io::ErrorKind::NotFound)?;
        self.0.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(interest, key))
    }

    /// Stops watching `fd`; its source hears nothing more of it.
    pub fn remove(&self, fd: RawFd) {
        let mut entries = self.entries();
        if let Some(key) = entries.key_of_fd.remove(&fd) {
            entries.by_key.remove(&key);
            // The descriptor may be closed already, which removed it as well.
            let _ = self.0.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    /// Serves events until `stopped` is true after a batch.
    ///
    /// # Errors
    /// What epoll_wait(2) says.
    pub fn run(&self, mut stopped: impl FnMut() -> bool) -> io::Result<()> {
        let mut events = [EpollEvent::default(); BATCH];
        while !stopped() {
            let count = match self.0.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            for event in &events[..count] {
                let found = self.entries().by_key.get(&event.data()).cloned();
                if let Some((token, source)) = found {
                    lock(&source).on_event(token, event.event_set());
                }
            }
        }
        Ok(())
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        lock(&self.0.entries)
    }
}

/// Takes a lock. A panic ends the process (`panic = "abort"`), so a poisoned lock is met in tests only.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;
    use std::sync::{Arc, Mutex};

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::{EventSet, EventSource, Registry, lock};

    #[derive(Default)]
    struct Counter(Vec<u64>);

    impl EventSource for Counter {
        fn on_event(&mut self, token: u64, _ready: EventSet) {
            self.0.push(token);
        }
    }

    #[test]
    fn a_source_hears_its_token_and_nothing_after_removal() {
        let registry = Registry::create().expect("epoll");
        let (heard, silent) = (Arc::new(Mutex::new(Counter::default())), Arc::new(Mutex::new(Counter::default())));
        let first = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        let second = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        registry.add(first.as_raw_fd(), EventSet::IN, 7, heard.clone()).expect("add");
        registry.add(second.as_raw_fd(), EventSet::IN, 8, silent.clone()).expect("add");
        registry.remove(second.as_raw_fd());
        first.write(1).expect("signal");
        second.write(1).expect("signal");
        registry.run(|| !lock(&heard).0.is_empty()).expect("run");
        assert_eq!(lock(&heard).0, [7]);
        assert!(lock(&silent).0.is_empty());
    }
}
