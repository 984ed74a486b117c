//! The thread on which devices are started and reset, so that vCPUs and the event loop need not be allowed what that takes:
//! to make threads and descriptors, and to open shares. Owns no device.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::event_loop::lock;
use crate::jail::{Jail, ThreadKind};

type Job = Box<dyn FnOnce() + Send>;

/// Values from one thread to another. Not a channel of the standard library: its receiver yields while a sender is between two
/// steps, and no filter has sched_yield(2).
struct Queue<T> {
    values: Mutex<VecDeque<T>>,
    added: Condvar,
}

impl<T> Queue<T> {
    fn new() -> Arc<Self> {
        Arc::new(Self { values: Mutex::new(VecDeque::new()), added: Condvar::new() })
    }

    fn put(&self, value: T) {
        lock(&self.values).push_back(value);
        self.added.notify_one();
    }

    /// Waits for the next.
    fn take(&self) -> T {
        let mut values = lock(&self.values);
        loop {
            if let Some(value) = values.pop_front() {
                return value;
            }
            values = self.added.wait(values).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Hands work to the thread, which lives as long as the process.
#[derive(Clone)]
pub struct DeviceThread {
    jobs: Arc<Queue<Job>>,
    jail: Jail,
}

impl DeviceThread {
    /// Starts the thread. Signals that are blocked here are blocked in it and in all that it starts.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn start(jail: Jail) -> io::Result<Self> {
        let jobs = Queue::<Job>::new();
        let (own_jail, queued) = (jail.clone(), jobs.clone());
        thread::Builder::new().name("devices".to_owned()).spawn(move || {
            own_jail.confine(ThreadKind::Devices);
            loop {
                queued.take()();
            }
        })?;
        Ok(Self { jobs, jail })
    }

    /// Does `work` there, and waits for it; a panic there ends the process. What is done there must not wait for the caller.
    pub fn call<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let done = Queue::new();
        let result = done.clone();
        self.post(move || done.put(work()));
        result.take()
    }

    /// Does `work` there, some time.
    pub fn post(&self, work: impl FnOnce() + Send + 'static) {
        self.jobs.put(Box::new(work));
    }

    /// Starts a thread that is confined from its beginning; called on this thread only.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn spawn<T: Send + 'static>(
        &self,
        builder: thread::Builder,
        kind: ThreadKind,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let jail = self.jail.clone();
        builder.spawn(move || {
            jail.confine(kind);
            work()
        })
    }
}
