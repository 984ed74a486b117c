//! Why the VM ends: the first reason that any thread gives wins and wakes the main thread.

use std::sync::{Arc, Mutex};

use vmm_api::control::ExitReason;
use vmm_sys_util::eventfd::EventFd;

use crate::event_loop::lock;

/// Shared by every thread that can end the VM.
#[derive(Clone)]
pub struct ExitSignal(Arc<(Mutex<Option<ExitReason>>, EventFd)>);

impl ExitSignal {
    /// `wake` is watched by the main thread.
    #[must_use]
    pub fn new(wake: EventFd) -> Self {
        Self(Arc::new((Mutex::new(None), wake)))
    }

    /// Ends the VM for `reason`, unless it is ending already.
    pub fn end(&self, reason: ExitReason) {
        lock(&self.0.0).get_or_insert(reason);
        // The counter can only overflow after 2^64 writes.
        let _ = self.0.1.write(1);
    }

    /// Whether the VM is ending.
    #[must_use]
    pub fn is_given(&self) -> bool {
        lock(&self.0.0).is_some()
    }

    /// The reason, once there is one.
    #[must_use]
    pub fn reason(&self) -> Option<ExitReason> {
        lock(&self.0.0).clone()
    }
}
