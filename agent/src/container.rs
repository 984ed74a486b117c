//! The containers of the guest and their processes, remembered until they are deleted.
//!
//! ```text
//!   create ──► Created ──start──► Running ◄──pause/resume──► Paused
//!   (Creating)    │                  │                          │
//!                 └──────────────────┴─── its init exits ───────┴──► Stopped ──delete──► gone
//! ```
//! Each change is made under the lock of the table, none of which is held across an await: `begin_*` takes the request in,
//! `end_*` puts the result in. Requests run as tasks, so a caller that gives up leaves nothing half made.

mod delete;
mod error;
mod lifecycle;
mod requests;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::message::{self, WaitReply};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::cgroup::{self, Cgroup};
use crate::events::Events;
use crate::process::{Made, Process, wait_reply};
use crate::reaper::{self, Reaper};
pub(crate) use error::ContainerError;

/// Every container, by id.
#[derive(Clone)]
pub(crate) struct Containers {
    reaper: Reaper,
    events: Events,
    table: Arc<Mutex<HashMap<String, Container>>>,
}

/// What was asked for last; that its init has exited goes before it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Creating,
    Created,
    Running,
    Paused,
    Deleting,
}

struct Container {
    phase: Phase,
    terminal: bool,
    /// Of an init that was not started.
    start: Option<OwnedFd>,
    /// By exec id; the init has the empty one. An exec that is being made is there without a process.
    processes: HashMap<String, Option<Process>>,
    /// Kills by the OOM killer that were told as events.
    oom_kill_count: u64,
    oom_watch: Option<JoinHandle<()>>,
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(watch) = &self.oom_watch {
            watch.abort();
        }
    }
}

impl Container {
    fn creating() -> Self {
        Self {
            phase: Phase::Creating,
            terminal: false,
            start: None,
            processes: HashMap::new(),
            oom_kill_count: 0,
            oom_watch: None,
        }
    }

    fn status(&self) -> message::Status {
        let init_exited = self.processes.get("").and_then(Option::as_ref).is_some_and(Process::has_exited);
        match self.phase {
            Phase::Creating => message::Status::STATUS_CREATING,
            _ if init_exited => message::Status::STATUS_STOPPED,
            Phase::Created => message::Status::STATUS_CREATED,
            Phase::Running => message::Status::STATUS_RUNNING,
            Phase::Paused => message::Status::STATUS_PAUSED,
            Phase::Deleting => message::Status::STATUS_STOPPED,
        }
    }
}

impl Containers {
    pub(crate) fn new(reaper: Reaper, events: Events) -> Self {
        Self { reaper, events, table: Arc::default() }
    }

    pub(crate) fn reaper(&self) -> &Reaper {
        &self.reaper
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Container>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_container<T>(
        &self,
        container_id: &str,
        work: impl FnOnce(&mut Container) -> Result<T, ContainerError>,
    ) -> Result<T, ContainerError> {
        let mut table = self.table();
        let found = table.get_mut(container_id);
        work(found.ok_or_else(|| ContainerError::NotFound { what: "container", id: container_id.to_owned() })?)
    }

    fn with_process<T>(
        &self,
        container_id: &str,
        exec_id: &str,
        work: impl FnOnce(&mut Process) -> Result<T, ContainerError>,
    ) -> Result<T, ContainerError> {
        self.with_container(container_id, |container| {
            let what = if exec_id.is_empty() { "container" } else { "exec" };
            let id = if exec_id.is_empty() { container_id } else { exec_id };
            let found = container.processes.get_mut(exec_id).and_then(Option::as_mut);
            work(found.ok_or_else(|| ContainerError::NotFound { what, id: id.to_owned() })?)
        })
    }

    /// Refuses an action in any but the given states.
    pub(crate) fn require(
        &self,
        container_id: &str,
        action: &'static str,
        allowed: &[message::Status],
    ) -> Result<(), ContainerError> {
        self.with_container(container_id, |container| {
            let status = container.status();
            if allowed.contains(&status) && container.phase != Phase::Deleting {
                return Ok(());
            }
            Err(ContainerError::State { action, id: container_id.to_owned(), status: status_name(status) })
        })
    }

    /// Watches a process that was made; its exit becomes an event before anybody who waits is told.
    fn adopt(&self, container_id: &str, exec_id: &str, made: Made, oom_kills_before: u64) -> Process {
        let (sender, reply) = watch::channel(None);
        let (this, id, exec) = (self.clone(), container_id.to_owned(), exec_id.to_owned());
        let mut exit = made.exit.clone();
        tokio::spawn(async move {
            let exit = reaper::wait_exit(&mut exit).await;
            let cgroup = Cgroup::of(&id);
            this.tell_ooms(&id);
            let oom_killed = if exec.is_empty() {
                // Whatever else is in its namespaces or cgroup ends with the init, as containerd expects.
                let _ = cgroup.kill();
                cgroup.oom_kill_count() > 0
            } else {
                exit.by_signal && exit.code == 137 && cgroup.oom_kill_count() > oom_kills_before
            };
            let told = wait_reply(exit, oom_killed);
            this.events.exited(&id, &exec, told.clone());
            sender.send_replace(Some(told));
        });
        Process { pid: made.pid, exit: made.exit, reply, terminal: made.terminal, input: made.input }
    }

    /// Queues the kills by the OOM killer that were not told yet.
    fn tell_ooms(&self, container_id: &str) {
        let found = Cgroup::of(container_id).oom_kill_count();
        let mut table = self.table();
        if let Some(container) = table.get_mut(container_id)
            && found > container.oom_kill_count
        {
            container.oom_kill_count = found;
            self.events.oom(container_id);
        }
    }

    /// Tells each OOM kill when the kernel says that `memory.events` has changed.
    fn watch_ooms(&self, container_id: &str) -> std::io::Result<JoinHandle<()>> {
        use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        inotify::add_watch(&inotify, Cgroup::of(container_id).memory_events_path(), WatchFlags::MODIFY)?;
        let changes = crate::sys::watch(inotify)?;
        let (this, id) = (self.clone(), container_id.to_owned());
        Ok(tokio::spawn(async move {
            while cgroup::next_change(&changes).await.is_ok() {
                this.tell_ooms(&id);
            }
        }))
    }

    async fn exit_of(&self, container_id: &str, exec_id: &str) -> Result<WaitReply, ContainerError> {
        let mut reply = self.with_process(container_id, exec_id, |process| Ok(process.reply.clone()))?;
        let told = reply.wait_for(Option::is_some).await.ok().and_then(|reply| reply.clone());
        told.ok_or_else(|| ContainerError::NotFound { what: "process", id: exec_id.to_owned() })
    }
}

fn status_name(status: message::Status) -> &'static str {
    match status {
        message::Status::STATUS_CREATING => "creating",
        message::Status::STATUS_CREATED => "created",
        message::Status::STATUS_RUNNING => "running",
        message::Status::STATUS_PAUSED => "paused",
        message::Status::STATUS_STOPPED => "stopped",
    }
}
