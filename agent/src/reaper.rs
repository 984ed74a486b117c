//! Reaps every process of the guest: the agent is PID 1, so each orphan becomes its child. Nobody else calls wait.
//!
//! A process id stands for its process until it is reaped, and an exit is told in the same breath: whoever sees no exit may
//! signal the id. A step (see `step.rs`) leaves a process behind whose id it reports only afterwards; while one runs, exits
//! that nobody waits for are kept, and forgotten with the last step.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How a process ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Exit {
    /// 0 to 255, or 128 + signal.
    pub(crate) code: u8,
    pub(crate) by_signal: bool,
    pub(crate) at: SystemTime,
}

/// Exits of processes for those who wait for them.
#[derive(Clone, Default)]
pub(crate) struct Reaper(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    waiting: HashMap<i32, watch::Sender<Option<Exit>>>,
    /// Empty when `step_count == 0`.
    unclaimed: HashMap<i32, Exit>,
    step_count: usize,
}

/// A step that runs; exits are kept until it is dropped.
pub(crate) struct Step(Reaper);

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

    /// Keeps exits that nobody waits for until the guard is dropped.
    pub(crate) fn begin_step(&self) -> Step {
        self.table().step_count += 1;
        Step(self.clone())
    }

    /// The exit of a child, now or later. Call it within the step that made the child.
    pub(crate) fn exit_of(&self, pid: i32) -> watch::Receiver<Option<Exit>> {
        let mut table = self.table();
        let known = table.unclaimed.remove(&pid);
        let (sender, receiver) = watch::channel(known);
        if known.is_none() {
            table.waiting.insert(pid, sender);
        }
        receiver
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap_all(&self) {
        // ECHILD: there is no child left.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(exit) = exit(status) {
                self.table().tell(pid.as_raw_nonzero().get(), exit);
            }
        }
    }
}

impl Table {
    fn tell(&mut self, pid: i32, exit: Exit) {
        if let Some(sender) = self.waiting.remove(&pid) {
            sender.send_replace(Some(exit));
        } else if self.step_count > 0 {
            self.unclaimed.insert(pid, exit);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.step_count -= 1;
        if table.step_count == 0 {
            table.unclaimed.clear();
        }
    }
}

/// Waits for the exit itself.
pub(crate) async fn wait_exit(receiver: &mut watch::Receiver<Option<Exit>>) -> Exit {
    let lost = Exit { code: u8::MAX, by_signal: false, at: SystemTime::now() };
    // The sender is dropped only after it has sent.
    receiver.wait_for(Option::is_some).await.ok().and_then(|exit| *exit).unwrap_or(lost)
}

fn exit(status: WaitStatus) -> Option<Exit> {
    let signal = status.terminating_signal();
    let code = status.exit_status().or_else(|| signal.map(|signal| 128 + signal))?;
    Some(Exit { code: u8::try_from(code).unwrap_or(u8::MAX), by_signal: signal.is_some(), at: SystemTime::now() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exited_with(code: u8) -> Exit {
        Exit { code, by_signal: false, at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn exit_of_an_orphan_is_forgotten() {
        let reaper = Reaper::default();
        reaper.table().tell(7, exited_with(1));
        assert_eq!(*reaper.exit_of(7).borrow(), None);
    }

    #[test]
    fn exit_before_the_id_is_known_is_kept_for_the_step_only() {
        let reaper = Reaper::default();
        let step = reaper.begin_step();
        reaper.table().tell(7, exited_with(3));
        reaper.table().tell(8, exited_with(4));
        assert_eq!(reaper.exit_of(7).borrow().map(|exit| exit.code), Some(3));
        drop(step);
        assert_eq!(*reaper.exit_of(8).borrow(), None);
        assert!(reaper.table().unclaimed.is_empty());
    }
}
