//! The init of a container that was run with `--init`: PID 1 of the container, which starts the command, passes signals on to
//! it, reaps what it leaves, and exits as it does. It is the agent's own file, shown to the container at `/dev/init`.
//!
//! The command leads a process group of its own, in the foreground of the terminal if there is one, so that ^C reaches the
//! command once and not a second time through us.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use agent_api::INIT_PATH;
use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, wait};
use rustix::termios::{isatty, tcsetpgrp};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// The signals that are passed on.
const PASSED: [Signal; 9] = [
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::USR1,
    Signal::USR2,
    Signal::ALARM,
    Signal::TERM,
    Signal::CONT,
    Signal::WINCH,
];

/// Puts the agent's file where a container can mount it from.
pub(crate) fn show() -> io::Result<()> {
    if let Some(parent) = Path::new(INIT_PATH).parent() {
        fs::create_dir_all(parent)?;
    }
    File::create(INIT_PATH)?;
    Ok(rustix::mount::mount_bind("/proc/self/exe", INIT_PATH)?)
}

/// Runs the command that stands in our arguments after `init`.
pub(crate) fn run() -> Result<ExitCode> {
    let mut words = std::env::args_os().skip(2);
    let program = words.next().context("no command")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Before the command is there, so that no signal is missed.
        let (sender, mut signals) = mpsc::unbounded_channel();
        for passed in PASSED {
            let (sender, mut signals) = (sender.clone(), signal(SignalKind::from_raw(passed.as_raw()))?);
            tokio::spawn(async move { while signals.recv().await.is_some() && sender.send(passed).is_ok() {} });
        }
        let mut child_exited = signal(SignalKind::child())?;
        let child = match Command::new(&program).args(words).process_group(0).spawn() {
            Ok(child) => i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("not a process id")?,
            Err(error) => {
                eprintln!("init: cannot start {}: {error}", program.display());
                return Ok(ExitCode::from(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }));
            }
        };
        give_terminal(child);
        loop {
            if let Some(code) = reap(child) {
                return Ok(code.into());
            }
            tokio::select! {
                _ = child_exited.recv() => {}
                Some(signal) = signals.recv() => drop(kill_process(child, signal)),
            }
        }
    })
}

fn give_terminal(child: Pid) {
    if isatty(io::stdin()) && tcsetpgrp(io::stdin(), child).is_ok() {
        // It may have been stopped because it read before it was in the foreground.
        let _ = kill_process_group(child, Signal::CONT);
    }
}

/// Reaps everything that has exited; the exit status of the command if it is among them.
fn reap(child: Pid) -> Option<u8> {
    let mut code = None;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid == child {
            code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
        }
    }
    code.and_then(|code| u8::try_from(code).ok())
}
