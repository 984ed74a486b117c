//! `vmrun kill`, `stop`, `wait`, `pause` and `unpause`: each asks the owner of the container, for one container after another.

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use sandbox::state::{self, Status};

use crate::client::{Client, ConnectError};
use crate::control::{Answer, Request};
use crate::{for_each, signals};

/// Time that an owner has to answer a SIGKILL, which it carries out in two seconds, before it is killed itself.
const OWNER_DEADLINE: Duration = Duration::from_secs(5);

pub(crate) fn kill(root: &Path, signal: &str, names: &[String]) -> Result<u8> {
    let signal = signals::parse(signal)?;
    for_each(names, |name| {
        if signal == signals::SIGKILL {
            kill_container(root, name)?;
        } else {
            Client::connect(root, name)?.ask(&Request::Signal(signal)).with_context(|| name.to_owned())?;
        }
        Ok(writeln!(io::stdout(), "{name}")?)
    })
}

/// Ends a container for sure: when its owner does not answer, by killing that.
pub(crate) fn kill_container(root: &Path, name: &str) -> Result<()> {
    let mut client = Client::connect(root, name)?;
    client.set_deadline(OWNER_DEADLINE)?;
    match client.ask(&Request::Signal(signals::SIGKILL)) {
        Ok(()) => {
            client.see_owner_end();
            Ok(())
        }
        Err(_) => kill_owner(root, name),
    }
}

/// Kills the process that owns a container, if there is one; the VM ends with it.
pub(crate) fn kill_owner(root: &Path, name: &str) -> Result<()> {
    let state = state::read(root, name)?;
    let processes = [i32::try_from(state.owner_pid).ok(), state.vmm_pid.and_then(|pid| i32::try_from(pid).ok())];
    for pid in processes.into_iter().flatten().filter_map(Pid::from_raw) {
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        // Asked after the process was taken hold of: the lock is the owner's, so its number is not another's by now.
        if !state::is_owned(root, name) {
            return Ok(());
        }
        pidfd_send_signal(&process, Signal::KILL).with_context(|| format!("cannot kill the owner of {name}"))?;
        let deadline = Timespec { tv_sec: 5, tv_nsec: 0 };
        poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&deadline))?;
    }
    Ok(())
}

pub(crate) fn stop(root: &Path, signal: Option<&str>, patience_s: u64, names: &[String]) -> Result<u8> {
    let signal = signal.map(signals::parse).transpose()?;
    for_each(names, |name| {
        match Client::connect(root, name) {
            Ok(mut client) => {
                let request = Request::Stop { signal, patience_ms: patience_s.saturating_mul(1000) };
                client.set_deadline(Duration::from_secs(patience_s) + OWNER_DEADLINE)?;
                match client.ask(&request) {
                    Ok(()) => client.see_owner_end(),
                    Err(_) => kill_owner(root, name)?,
                }
            }
            // As with Docker, a container that has exited is stopped.
            Err(ConnectError::NotRunning(state)) if state.status.is_exited() => {}
            Err(error) => return Err(error.into()),
        }
        Ok(writeln!(io::stdout(), "{name}")?)
    })
}

pub(crate) fn wait(root: &Path, names: &[String]) -> Result<u8> {
    for_each(names, |name| Ok(writeln!(io::stdout(), "{}", wait_exit(root, name)?)?))
}

fn wait_exit(root: &Path, name: &str) -> Result<u8> {
    let mut client = match Client::connect(root, name) {
        Ok(client) => client,
        Err(ConnectError::NotRunning(state)) => match state.status {
            Status::Exited { exit_code, .. } => return Ok(exit_code),
            _ => bail!("container {name} has not started yet"),
        },
        Err(error) => return Err(error.into()),
    };
    client.send(&Request::Wait)?;
    match client.receive() {
        Ok((Answer::Exited(exit_code), _)) => {
            client.see_owner_end();
            Ok(exit_code)
        }
        Ok((other, _)) => bail!("unexpected answer of the container's owner: {other:?}"),
        // It may have ended just as we came.
        Err(error) => match state::read(root, name)?.status {
            Status::Exited { exit_code, .. } => Ok(exit_code),
            _ => Err(error.context(format!("container {name} was lost"))),
        },
    }
}

pub(crate) fn pause(root: &Path, names: &[String]) -> Result<u8> {
    ask_each(root, names, &Request::Pause)
}

pub(crate) fn unpause(root: &Path, names: &[String]) -> Result<u8> {
    ask_each(root, names, &Request::Unpause)
}

fn ask_each(root: &Path, names: &[String], request: &Request) -> Result<u8> {
    for_each(names, |name| {
        Client::connect(root, name)?.ask(request).with_context(|| name.to_owned())?;
        Ok(writeln!(io::stdout(), "{name}")?)
    })
}
