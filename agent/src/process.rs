//! One process of a container: how it is made by a step, and what is known of it until it is forgotten.

use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime};

use agent_api::message::{Stdio, WaitReply};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio_vsock::VsockStream;

use crate::container::ContainerError;
use crate::reaper::{Exit, Reaper};
use crate::streams::{self, Carrier, InputEnd};
use crate::terminal::{self, ConsoleSocket};
use crate::{step, sys};

/// Time that a started init has to come to its `execve`.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// A process that was made.
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// Told when it is reaped: without it, `pid` is the process's.
    pub(crate) exit: watch::Receiver<Option<Exit>>,
    /// Told once the exit has been queued as an event.
    pub(crate) reply: watch::Receiver<Option<WaitReply>>,
    pub(crate) terminal: Option<OwnedFd>,
    pub(crate) input: Option<InputEnd>,
}

/// What to make.
pub(crate) struct Making<'a> {
    pub(crate) container_id: &'a str,
    /// Empty for an init.
    pub(crate) exec_id: &'a str,
    pub(crate) terminal: bool,
    pub(crate) stdio: &'a Stdio,
}

/// A process whose exit nobody watches yet.
pub(crate) struct Made {
    pub(crate) pid: i32,
    pub(crate) exit: watch::Receiver<Option<Exit>>,
    pub(crate) terminal: Option<OwnedFd>,
    pub(crate) input: Option<InputEnd>,
    /// An init tells on it how its start went.
    pub(crate) start: Option<OwnedFd>,
}

struct Streams {
    stdin: Option<VsockStream>,
    stdout: Option<VsockStream>,
    stderr: Option<VsockStream>,
}

impl Making<'_> {
    /// Makes the process by a step, and connects its streams.
    pub(crate) async fn make(&self, reaper: &Reaper) -> Result<Made, ContainerError> {
        let failed = ContainerError::io("dial a stream");
        let streams = Streams {
            stdin: streams::dial(self.stdio.stdin).await.map_err(&failed)?,
            stdout: streams::dial(self.stdio.stdout).await.map_err(&failed)?,
            stderr: streams::dial(self.stdio.stderr).await.map_err(&failed)?,
        };
        // Until the id that the step reports is watched.
        let _step = reaper.begin_step();
        if self.terminal { self.with_terminal(reaper, streams).await } else { self.with_pipes(reaper, streams).await }
    }

    async fn with_pipes(&self, reaper: &Reaper, streams: Streams) -> Result<Made, ContainerError> {
        let failed = ContainerError::io("make a pipe");
        let (stdin, input) = streams::input(streams.stdin).map_err(&failed)?;
        let (stdout, output) = streams::output(streams.stdout).map_err(&failed)?;
        let (stderr, errors) = streams::output(streams.stderr).map_err(&failed)?;
        let (pid, start) = self.run_step(reaper, "", vec![stdin, stdout, stderr]).await?;
        let exit = reaper.exit_of(pid);
        let input = input.map(|input| input.feed(exit.clone()));
        [output, errors].into_iter().flatten().for_each(|output| output.drain(exit.clone()));
        Ok(Made { pid, exit, terminal: None, input, start })
    }

    async fn with_terminal(&self, reaper: &Reaper, streams: Streams) -> Result<Made, ContainerError> {
        let failed = ContainerError::io("make a terminal");
        let socket = ConsoleSocket::bind().map_err(&failed)?;
        let path = socket.path().display().to_string();
        let null = streams::dev_null;
        let fds = vec![null().map_err(&failed)?, null().map_err(&failed)?, null().map_err(&failed)?];
        let (pid, start) = self.run_step(reaper, &path, fds).await?;
        let exit = reaper.exit_of(pid);
        let master = socket.receive().await.map_err(&failed)?;
        terminal::set_size(&master, self.stdio.rows, self.stdio.columns).map_err(&failed)?;
        let carrier = |stream: Option<VsockStream>| {
            stream.map(|stream| Carrier::new(stream, master.try_clone()?)).transpose().map_err(&failed)
        };
        let input = carrier(streams.stdin)?.map(|input| input.feed(exit.clone()));
        if let Some(output) = carrier(streams.stdout)? {
            output.drain(exit.clone());
        }
        Ok(Made { pid, exit, terminal: Some(master), input, start })
    }

    /// The process id that the step reports, and for an init the pipe of its start.
    async fn run_step(
        &self,
        reaper: &Reaper,
        console: &str,
        mut fds: Vec<OwnedFd>,
    ) -> Result<(i32, Option<OwnedFd>), ContainerError> {
        let mut start = None;
        let reported = if self.exec_id.is_empty() {
            let flags = rustix::pipe::PipeFlags::CLOEXEC;
            let pipe = rustix::pipe::pipe_with(flags).map_err(|e| ContainerError::io("make a pipe")(e.into()))?;
            start = Some(pipe.0);
            fds.push(pipe.1);
            step::run(reaper, &["create", self.container_id, console], fds).await?
        } else {
            step::run(reaper, &["exec", self.container_id, self.exec_id, console], fds).await?
        };
        let pid = reported.trim().parse();
        let pid = pid.map_err(|_| ContainerError::Child(format!("no process id in {reported:?}")))?;
        Ok((pid, start))
    }
}

impl Process {
    pub(crate) fn has_exited(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Sends a signal, unless the process has exited.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), ContainerError> {
        if self.has_exited() {
            return Err(ContainerError::Exited);
        }
        sys::kill(self.pid, signal).map_err(ContainerError::io("send the signal"))
    }
}

/// Waits until a started init is its command; see `child/executor.rs` for what it writes.
pub(crate) async fn wait_executed(start: OwnedFd) -> Result<(), ContainerError> {
    use tokio::io::AsyncReadExt as _;
    let failed = ContainerError::io("learn how the start went");
    rustix::io::ioctl_fionbio(&start, true).map_err(|error| failed(error.into()))?;
    let mut pipe = pipe::Receiver::from_owned_fd(start).map_err(&failed)?;
    let mut told = Vec::new();
    match tokio::time::timeout(START_DEADLINE, pipe.read_to_end(&mut told)).await {
        Ok(read) => drop(read.map_err(&failed)?),
        Err(_) => return Err(ContainerError::Child("the command was not executed within 20000 ms".to_owned())),
    }
    match told.split_first() {
        None => Err(ContainerError::Child("the process ended before its command was executed".to_owned())),
        Some((_, [])) => Ok(()),
        Some((_, cause)) => Err(ContainerError::Child(String::from_utf8_lossy(cause).into_owned())),
    }
}

/// The exit as the host is told.
pub(crate) fn wait_reply(exit: Exit, oom_killed: bool) -> WaitReply {
    let since_epoch = exit.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let exited_at_ns = i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX);
    WaitReply { exit_code: exit.code.into(), exited_at_ns, oom_killed, ..Default::default() }
}
