//! One process as containerd sees it: a container's init, or an exec.
//!
//! ```text
//!   Creating ─► Created ─► Starting ─► Running ─► Exited
//!                  └──────────────────────────────┘   killed, or its VM ended
//! ```
//! The guest may tell the exit before the answer to the start. It is held then, so that `start` always comes before `exit`.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit, TaskStart};
use oci_spec::runtime::Process as ProcessSpec;
use sandbox::ProcessId;
use tokio::sync::watch;

use crate::error::TaskError;
use crate::events::EventQueue;
use crate::stdio::{Copying, Stdio};

/// How a process ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Exit {
    /// 0 to 255; 128 and the signal for one that a signal ended.
    pub(crate) code: u32,
    /// By the host's clock.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// It ended now.
    pub(crate) fn now(code: u32) -> Self {
        Self { code: code & 0xff, at: SystemTime::now() }
    }
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Phase {
    Creating,
    Created,
    Starting,
    Running,
    Exited,
}

impl Phase {
    /// For messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Exited => "stopped",
        }
    }
}

/// A process.
pub(crate) struct Process {
    pub(crate) id: ProcessId,
    pub(crate) stdio: Stdio,
    /// What an exec runs; an init's is in its container's spec.
    pub(crate) spec: Option<ProcessSpec>,
    life: Mutex<Life>,
    exit: watch::Sender<Option<Exit>>,
    copying: Mutex<Option<Copying>>,
}

struct Life {
    phase: Phase,
    pid: u32,
    /// Told before its start was.
    held: Option<Exit>,
    /// Rows and columns of the terminal, asked for before there is one.
    size: Option<(u16, u16)>,
}

impl Process {
    /// One that is being created.
    pub(crate) fn new(id: ProcessId, stdio: Stdio, spec: Option<ProcessSpec>) -> Self {
        Self {
            id,
            stdio,
            spec,
            life: Mutex::new(Life { phase: Phase::Creating, pid: 0, held: None, size: None }),
            exit: watch::Sender::new(None),
            copying: Mutex::default(),
        }
    }

    /// Where it is.
    pub(crate) fn phase(&self) -> Phase {
        self.life().phase
    }

    /// Its process id for containerd; 0 before it has one.
    pub(crate) fn pid(&self) -> u32 {
        self.life().pid
    }

    /// How it ended, if it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub(crate) async fn exited(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let found = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        // The sender is ours, so the wait cannot fail.
        found.unwrap_or_else(|| Exit::now(255))
    }

    /// It was created.
    pub(crate) fn created(&self, pid: u32, events: &EventQueue) {
        let mut life = self.life();
        (life.phase, life.pid) = (Phase::Created, pid);
        self.settle_held(&mut life, events);
    }

    /// Takes the order to start.
    pub(crate) fn begin_start(&self) -> Result<(), TaskError> {
        let mut life = self.life();
        if life.phase != Phase::Created {
            return Err(self.wrong_state("start", life.phase));
        }
        life.phase = Phase::Starting;
        Ok(())
    }

    /// It runs, or did already.
    pub(crate) fn started(&self, pid: u32, events: &EventQueue) {
        let mut life = self.life();
        (life.phase, life.pid) = (Phase::Running, pid);
        if let Some(copying) = self.copying().as_mut() {
            copying.begin_input();
        }
        let (container_id, exec_id) = (self.id.container_id.clone(), self.id.exec_id.clone());
        if exec_id.is_empty() {
            events.push(&TaskStart { container_id, pid, ..Default::default() });
        } else {
            events.push(&TaskExecStarted { container_id, exec_id, pid, ..Default::default() });
        }
        self.settle_held(&mut life, events);
    }

    /// It could not be started; one that was killed over it has ended.
    pub(crate) fn start_failed(&self, events: &EventQueue) {
        let mut life = self.life();
        life.phase = Phase::Created;
        self.settle_held(&mut life, events);
    }

    fn settle_held(&self, life: &mut Life, events: &EventQueue) {
        if let Some(exit) = life.held.take() {
            self.end(life, exit, events);
        }
    }

    /// It ended. The first to say so is right.
    pub(crate) fn settle(&self, exit: Exit, events: &EventQueue) {
        let mut life = self.life();
        match life.phase {
            Phase::Exited => {}
            Phase::Creating | Phase::Starting => drop(life.held.get_or_insert(exit)),
            Phase::Created | Phase::Running => self.end(&mut life, exit, events),
        }
    }

    fn end(&self, life: &mut Life, exit: Exit, events: &EventQueue) {
        life.phase = Phase::Exited;
        events.push(&TaskExit {
            container_id: self.id.container_id.clone(),
            id: self.name().to_owned(),
            pid: life.pid,
            exit_status: exit.code,
            exited_at: Some(exit.at.into()).into(),
            ..Default::default()
        });
        self.exit.send_replace(Some(exit));
    }

    /// What events call it: the exec's id, or the container's.
    pub(crate) fn name(&self) -> &str {
        if self.id.exec_id.is_empty() { &self.id.container_id } else { &self.id.exec_id }
    }

    /// Keeps the size of the terminal until there is one, and says whether there is.
    pub(crate) fn set_size(&self, rows: u16, columns: u16) -> bool {
        let mut life = self.life();
        life.size = Some((rows, columns));
        !matches!(life.phase, Phase::Creating) && (self.id.exec_id.is_empty() || life.phase == Phase::Running)
    }

    /// The size that was asked for.
    pub(crate) fn size(&self) -> Option<(u16, u16)> {
        self.life().size
    }

    /// The copies of its streams, from now on.
    pub(crate) fn set_copying(&self, copying: Copying) {
        *self.copying() = Some(copying);
    }

    /// Nobody writes to its standard input any more.
    pub(crate) fn close_stdin(&self) {
        if let Some(copying) = self.copying().as_mut() {
            copying.close_stdin();
        }
    }

    /// Waits for the last bytes of its output, as long as somebody reads them, then lets go of its streams.
    pub(crate) async fn drain(&self) {
        let copying = self.copying().take();
        if let Some(copying) = copying {
            copying.finish().await;
        }
    }

    /// An error that says what it is doing.
    pub(crate) fn wrong_state(&self, action: &'static str, phase: Phase) -> TaskError {
        TaskError::State { action, id: self.name().to_owned(), state: phase.name() }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn copying(&self) -> MutexGuard<'_, Option<Copying>> {
        self.copying.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use sandbox::ProcessId;

    use super::{Exit, Phase, Process};
    use crate::events::EventQueue;
    use crate::stdio::Stdio;

    fn process(events: &EventQueue) -> Process {
        let process = Process::new(ProcessId::init("box"), Stdio::default(), None);
        process.created(7, events);
        process
    }

    #[tokio::test]
    async fn exit_that_is_told_before_the_start_comes_after_it() {
        let events = EventQueue::new("default");
        let process = process(&events);
        process.begin_start().expect("created");
        process.settle(Exit::now(3), &events);
        assert_eq!((process.phase(), process.exit()), (Phase::Starting, None));
        process.started(7, &events);
        assert_eq!(events.topics(), ["/tasks/start", "/tasks/exit"]);
        assert_eq!(process.exited().await.code, 3);
    }

    #[test]
    fn the_end_is_told_once() {
        let events = EventQueue::new("default");
        let process = process(&events);
        process.settle(Exit::now(137), &events);
        process.settle(Exit::now(0), &events);
        assert_eq!(events.topics(), ["/tasks/exit"]);
        assert_eq!(process.exit().map(|exit| exit.code), Some(137));
        process.begin_start().expect_err("stopped");
    }

    #[test]
    fn a_failed_start_tells_the_end_that_it_caused() {
        let events = EventQueue::new("default");
        let process = process(&events);
        process.begin_start().expect("created");
        process.settle(Exit::now(137), &events);
        process.start_failed(&events);
        assert_eq!((process.phase(), events.topics()), (Phase::Exited, vec!["/tasks/exit".to_owned()]));
    }

    #[test]
    fn a_process_is_started_once() {
        let events = EventQueue::new("default");
        let process = process(&events);
        process.begin_start().expect("created");
        process.begin_start().expect_err("being started");
    }
}
