//! The thread on which devices are started and reset, so that vCPUs and the event loop need not be allowed what that takes:
//! to make threads and descriptors, and to open shares. Owns no device.

use std::io;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use crate::jail::{Jail, ThreadKind};

type Job = Box<dyn FnOnce() + Send>;

/// Hands work to the thread, which ends with the last of these.
#[derive(Clone)]
pub struct DeviceThread {
    jobs: Sender<Job>,
    jail: Jail,
}

impl DeviceThread {
    /// Starts the thread. Signals that are blocked here are blocked in it and in all that it starts.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn start(jail: Jail) -> io::Result<Self> {
        let (jobs, queued) = mpsc::channel::<Job>();
        let own_jail = jail.clone();
        thread::Builder::new().name("devices".to_owned()).spawn(move || {
            own_jail.confine(ThreadKind::Devices);
            queued.into_iter().for_each(|job| job());
        })?;
        Ok(Self { jobs, jail })
    }

    /// Does `work` there, and waits for it. What is done there must not wait for the caller.
    pub fn call<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.post(move || {
            // The caller waits.
            let _ = done.send(work());
        });
        result.recv().expect("a panic of the thread ends the process")
    }

    /// Does `work` there, some time.
    pub fn post(&self, work: impl FnOnce() + Send + 'static) {
        // The thread takes jobs as long as there is a sender.
        let _ = self.jobs.send(Box::new(work));
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
