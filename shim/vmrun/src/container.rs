//! A container that this process owns: its command in its own sandbox, and what others may ask about it.
//!
//! `run` makes it and waits for its end; `control` asks on behalf of other processes. Ending it never depends on the guest:
//! when the agent does not do it in time, the VMM is killed.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::Process;
use sandbox::state::Status;
use sandbox::{CallError, ProcessId, ProcessStreams, Sandbox, WantedStreams, message};
use tokio::sync::watch;

use crate::control::ExecRequest;
use crate::exec_process;
use crate::record::Record;
use crate::signals::SIGKILL;

/// Time that the agent has to kill a container, before the VMM is killed.
const KILL_DEADLINE: Duration = Duration::from_secs(1);
/// Exit status of a command that SIGKILL ended.
const EXIT_KILLED: u8 = 128 + 9;
/// Exit status of a command that was lost with its VM.
const EXIT_LOST: u8 = 125;

/// What the cause of a failed start follows.
pub(crate) const CANNOT_START: &str = "cannot start the command";

/// How a container ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Ending {
    pub(crate) exit_code: u8,
    pub(crate) oom_killed: bool,
    /// Why, when it was not the command's doing.
    pub(crate) error: Option<String>,
}

/// A container whose command runs.
pub(crate) struct Container {
    pub(crate) sandbox: Sandbox,
    pub(crate) record: Record,
    init: ProcessId,
    /// What an exec inherits.
    process: Process,
    /// The root file system as the container sees it.
    tree: OwnedFd,
    stop_signal: u32,
    paused: Cell<bool>,
    kill_asked: watch::Sender<bool>,
    exited: watch::Sender<Option<u8>>,
}

impl Container {
    pub(crate) fn new(
        sandbox: Sandbox,
        record: Record,
        init: ProcessId,
        process: Process,
        tree: OwnedFd,
        stop_signal: u32,
    ) -> Self {
        let (kill_asked, exited) = (watch::Sender::new(false), watch::Sender::new(None));
        Self { sandbox, record, init, process, tree, stop_signal, paused: Cell::new(false), kill_asked, exited }
    }

    /// Waits for the end of the command, or of the VM.
    pub(crate) async fn ended(&self) -> Ending {
        let reason = tokio::select! {
            biased;
            exit = self.sandbox.wait(&self.init) => match exit {
                Ok(exit) => return ending(&exit),
                Err(CallError::VmEnded { exit, .. }) => exit.reason.to_string(),
                Err(error) => error.to_string(),
            },
            exit = self.sandbox.ended() => exit.reason.to_string(),
        };
        if *self.kill_asked.borrow() {
            return Ending { exit_code: EXIT_KILLED, oom_killed: false, error: None };
        }
        let error = Some(format!("the VM ended while the command ran: {reason}"));
        Ending { exit_code: EXIT_LOST, oom_killed: false, error }
    }

    /// Waits until somebody wants the container dead.
    pub(crate) async fn kill_asked(&self) {
        // The sender is ours, so it cannot be gone.
        let _ = self.kill_asked.subscribe().wait_for(|asked| *asked).await;
    }

    /// Tells everybody who waits, once the container is stopped and its record is kept or removed.
    pub(crate) fn announce(&self, exit_code: u8) {
        self.exited.send_replace(Some(exit_code));
    }

    /// Waits until everybody who waited was answered.
    pub(crate) async fn all_answered(&self) {
        self.exited.closed().await;
    }

    /// Registers who wants to know the exit status, before anything else can happen.
    pub(crate) fn exit_watch(&self) -> watch::Receiver<Option<u8>> {
        self.exited.subscribe()
    }

    /// Sends a signal to the command. SIGKILL ends the container in [`KILL_DEADLINE`], whatever the guest does.
    pub(crate) async fn signal(&self, signal: u32) -> Result<()> {
        if signal == SIGKILL {
            self.kill().await;
            return Ok(());
        }
        self.sandbox.signal(&self.init, signal, false).await?;
        // A frozen process would not see it.
        if signal == self.stop_signal { self.thaw().await } else { Ok(()) }
    }

    /// Ends the container.
    pub(crate) async fn kill(&self) {
        self.kill_asked.send_replace(true);
        let by_agent = async {
            self.sandbox.signal(&self.init, SIGKILL, false).await?;
            self.sandbox.wait(&self.init).await
        };
        if !matches!(tokio::time::timeout(KILL_DEADLINE, by_agent).await, Ok(Ok(_))) && !self.init_has_exited().await {
            self.sandbox.kill().await;
        }
    }

    /// A signal is refused when the command has just exited by itself.
    async fn init_has_exited(&self) -> bool {
        matches!(tokio::time::timeout(KILL_DEADLINE / 4, self.sandbox.wait(&self.init)).await, Ok(Ok(_)))
    }

    /// Asks the command to end, and kills it when it does not.
    pub(crate) async fn stop(&self, signal: Option<u32>, patience: Duration) -> Result<()> {
        let ended = async {
            self.signal(signal.unwrap_or(self.stop_signal)).await?;
            self.thaw().await?;
            self.sandbox.wait(&self.init).await?;
            Ok::<_, anyhow::Error>(())
        };
        if !matches!(tokio::time::timeout(patience, ended).await, Ok(Ok(()))) {
            self.kill().await;
        }
        Ok(())
    }

    /// Freezes every process of the container.
    pub(crate) async fn pause(&self) -> Result<()> {
        if self.paused.get() {
            bail!("the container is paused already");
        }
        self.sandbox.pause(&self.init.container_id).await?;
        self.paused.set(true);
        self.record.update(|state| state.status = Status::Paused)
    }

    /// Undoes [`Self::pause`].
    pub(crate) async fn unpause(&self) -> Result<()> {
        if !self.paused.get() {
            bail!("the container is not paused");
        }
        self.thaw().await
    }

    async fn thaw(&self) -> Result<()> {
        if !self.paused.get() {
            return Ok(());
        }
        self.sandbox.resume(&self.init.container_id).await?;
        self.paused.set(false);
        self.record.update(|state| state.status = Status::Running)
    }

    /// Its name, which is its id in the guest too.
    pub(crate) fn name(&self) -> &str {
        &self.init.container_id
    }

    /// What the container uses.
    pub(crate) async fn stats(&self) -> Result<message::StatsReply, CallError> {
        self.sandbox.stats(&self.init.container_id).await
    }

    /// Starts another process, which inherits what the request leaves open. When it is one that somebody stays with, a refusal to
    /// start it may also come in place of its exit.
    pub(crate) async fn exec(&self, exec_id: &str, request: &ExecRequest) -> Result<Exec<'_>> {
        if self.paused.get() {
            bail!("the container is paused: unpause it first");
        }
        let process = exec_process::exec_process(&self.process, &self.tree, request)?;
        let id = ProcessId { container_id: self.init.container_id.clone(), exec_id: exec_id.to_owned() };
        let wanted = WantedStreams { stdin: request.stdin, output: !request.detach, terminal: request.terminal };
        if request.detach {
            // Without a stream, the answer alone says that it runs.
            let streams = self.sandbox.exec(&id, &process, wanted).await.context(CANNOT_START)?;
            let exit = Box::pin(self.wait_and_forget(id.clone()));
            return Ok(Exec { id, streams, exit });
        }
        let running = self.sandbox.run_exec(&id, &process, wanted).await.context(CANNOT_START)?;
        let (streams, exit) = running.into_parts();
        Ok(Exec { id, streams, exit: Box::pin(exit) })
    }

    async fn wait_and_forget(&self, id: ProcessId) -> Result<message::WaitReply, CallError> {
        let exit = self.sandbox.wait(&id).await;
        // Nothing is left to forget when the VM is gone.
        let _ = self.sandbox.delete(&id, true).await;
        exit
    }

    /// Sets the size of the command's terminal.
    pub(crate) async fn resize(&self, rows: u16, columns: u16) {
        // The command may have ended, and then has no terminal.
        let _ = self.sandbox.resize(&self.init, rows, columns).await;
    }
}

pub(crate) type ExecExit<'a> = Pin<Box<dyn Future<Output = Result<message::WaitReply, CallError>> + 'a>>;

/// A process that was started in a container.
pub(crate) struct Exec<'a> {
    pub(crate) id: ProcessId,
    pub(crate) streams: ProcessStreams,
    /// Waits for its exit, with which the agent forgets it.
    pub(crate) exit: ExecExit<'a>,
}

fn ending(exit: &message::WaitReply) -> Ending {
    let exit_code = u8::try_from(exit.exit_code).unwrap_or(u8::MAX);
    Ending { exit_code, oom_killed: exit.oom_killed, error: None }
}
