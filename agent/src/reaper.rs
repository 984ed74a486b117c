//! Reaps every process of the guest: the agent is PID 1, so each orphan becomes its child. Nobody else calls wait.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// Most exits kept for somebody who asks later.
const MAX_KEPT: usize = 4096;

/// Exits of processes, kept until they are asked for.
#[derive(Clone, Default)]
pub(crate) struct Reaper(Arc<Shared>);

#[derive(Default)]
struct Shared {
    exits: Mutex<Exits>,
    changed: Notify,
}

#[derive(Default)]
struct Exits {
    code_of: HashMap<i32, u8>,
    order: VecDeque<i32>,
}

impl Reaper {
    /// Reaps for as long as the agent runs.
    pub(crate) fn start() -> std::io::Result<Self> {
        let mut child_exited = signal(SignalKind::child())?;
        let reaper = Self::default();
        let ours = reaper.clone();
        tokio::spawn(async move {
            loop {
                ours.reap_all();
                child_exited.recv().await;
            }
        });
        Ok(reaper)
    }

    /// Waits for a child to exit; returns 0 to 255, or 128 + signal.
    pub(crate) async fn wait(&self, pid: i32) -> u8 {
        loop {
            let changed = self.0.changed.notified();
            if let Some(code) = self.take(pid) {
                return code;
            }
            changed.await;
        }
    }

    fn take(&self, pid: i32) -> Option<u8> {
        self.0.exits.lock().unwrap_or_else(PoisonError::into_inner).code_of.remove(&pid)
    }

    fn reap_all(&self) {
        // ECHILD: there is no child left.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            self.keep(pid, status);
        }
        self.0.changed.notify_waiters();
    }

    fn keep(&self, pid: Pid, status: WaitStatus) {
        let Some(code) = exit_code(status) else { return };
        let pid = pid.as_raw_nonzero().get();
        let mut exits = self.0.exits.lock().unwrap_or_else(PoisonError::into_inner);
        exits.code_of.insert(pid, code);
        exits.order.push_back(pid);
        if exits.order.len() > MAX_KEPT
            && let Some(oldest) = exits.order.pop_front()
            && !exits.order.contains(&oldest)
        {
            exits.code_of.remove(&oldest);
        }
    }
}

fn exit_code(status: WaitStatus) -> Option<u8> {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))?;
    u8::try_from(code).ok()
}
