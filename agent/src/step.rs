//! Steps: what forks, or may block for long, runs in a child of the agent (see `child.rs`). What it prints is its result.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::fs::MemfdFlags;

use crate::child::FIRST_FD;
use crate::container::ContainerError;
use crate::reaper::{self, Reaper};

/// Longest result or cause, in bytes.
const MAX_TEXT: u64 = 64 << 10;

/// Runs a step to its end, with `fds` at the numbers from [`FIRST_FD`] on; returns what it printed.
///
/// The caller holds a [`reaper::Step`] if the step leaves a process behind.
pub(crate) async fn run(reaper: &Reaper, arguments: &[&str], fds: Vec<OwnedFd>) -> Result<String, ContainerError> {
    let failed = ContainerError::io("start a child");
    // Files rather than pipes: a process that inherits one keeps nobody waiting.
    let memory_file = || Ok(File::from(rustix::fs::memfd_create("step", MemfdFlags::CLOEXEC)?));
    let (mut stdout, mut stderr) = (memory_file().map_err(&failed)?, memory_file().map_err(&failed)?);
    let mut command = Command::new("/proc/self/exe");
    command.arg("child").args(arguments).env_clear().stdin(Stdio::null());
    command.stdout(stdout.try_clone().map_err(&failed)?).stderr(stderr.try_clone().map_err(&failed)?);
    let mappings = (FIRST_FD..).zip(fds).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect();
    command.fd_mappings(mappings).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
    let step = reaper.begin_step();
    let child = command.spawn().map_err(&failed)?;
    drop(command);
    let mut exit = reaper.exit_of(i32::try_from(child.id()).unwrap_or_default());
    drop(step);
    let exit = reaper::wait_exit(&mut exit).await;
    if exit.code == 0 {
        return text(&mut stdout).map_err(&failed);
    }
    let cause = text(&mut stderr).map_err(&failed)?;
    if cause.is_empty() {
        return Err(ContainerError::Child(format!("the child exited with {} and said nothing", exit.code)));
    }
    Err(ContainerError::Child(cause))
}

fn text(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(MAX_TEXT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
