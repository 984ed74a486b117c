//! `vmrun run --detach`: a supervisor, which is `vmrun` once more in a session of its own, owns the container.
//!
//! ```text
//!   vmrun run -d ... ──spawns──► vmrun --supervise run -d ...    same code as in the foreground, no terminal
//!        ▲                             │
//!        └──── one Report as JSON ◄────┘ on its standard output, when the command runs or cannot run
//! ```
//! Nobody forks: a process with threads must not, and a new one inherits no descriptors but its standard streams.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::{Deserialize, Serialize};

use crate::complain;

/// Most of the supervisor's log that is passed on, in bytes.
const MAX_LOGGED: usize = 4096;

/// What the supervisor says, once.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Report {
    /// The command runs.
    Started { name: String, timing: Option<String> },
    /// Nothing of the container is left.
    Failed { exit_code: u8, cause: String },
}

/// Starts the supervisor with our own arguments, and waits until the command runs.
pub(crate) fn launch() -> Result<u8> {
    keep_descriptors_from_children().context("cannot read /proc/self/fd")?;
    let mut supervisor = Command::new("/proc/self/exe")
        .arg0("vmrun")
        .arg("--supervise")
        .args(std::env::args_os().skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the supervisor")?;
    let mut line = String::new();
    BufReader::new(supervisor.stdout.take().context("the supervisor has no output")?).read_line(&mut line)?;
    if line.is_empty() {
        let status = supervisor.wait()?;
        bail!("the supervisor ended before the command ran ({status}): `vmrun gc` removes what it left");
    }
    match serde_json::from_str(&line).context("bad report of the supervisor")? {
        Report::Started { name, timing } => {
            // The container runs, whether somebody reads this or not.
            let _ = io::stderr().write_all(timing.unwrap_or_default().as_bytes());
            let _ = writeln!(io::stdout(), "{name}");
            Ok(0)
        }
        Report::Failed { exit_code, cause } => {
            complain(&cause);
            Ok(exit_code)
        }
    }
}

/// Whoever called us may have left descriptors open, and may wait for them to be closed.
fn keep_descriptors_from_children() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let number: Option<RawFd> = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(fd) = number.filter(|fd| *fd > 2) {
            // The one that lists the folder is closed by the time.
            let _ = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
        }
    }
    Ok(())
}

/// The supervisor's first step: no signal of the caller's terminal reaches it.
pub(crate) fn enter_session() -> Result<()> {
    rustix::process::setsid().context("cannot make a session")?;
    Ok(())
}

/// From here on the supervisor's own words, and those of its VMM, go to a file of the container.
pub(crate) fn log_to(data_dir: &Path) -> Result<()> {
    let path = data_dir.join("owner.log");
    let file = File::create_new(&path).with_context(|| format!("cannot make {}", path.display()))?;
    rustix::stdio::dup2_stderr(&file)?;
    Ok(())
}

/// Tells the caller that the command runs. Fails when the caller is gone: then nobody wants the container.
pub(crate) fn report_started(name: &str, timing: Option<String>) -> Result<()> {
    report(&Report::Started { name: name.to_owned(), timing }).context("the caller is gone")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    // The caller's folder may be unmounted or removed.
    Ok(std::env::set_current_dir("/")?)
}

/// Tells the caller why the command does not run.
pub(crate) fn report_failed(exit_code: u8, error: &anyhow::Error, said: &str) {
    let cause = if said.is_empty() { format!("{error:#}") } else { format!("{error:#}\n{said}") };
    // A caller that is gone does not want to know.
    let _ = report(&Report::Failed { exit_code, cause });
}

/// What [`log_to`] has kept, which goes with the container: the last of it, fit for a terminal.
pub(crate) fn logged(data_dir: &Path) -> String {
    let bytes = fs::read(data_dir.join("owner.log")).unwrap_or_default();
    let tail = &bytes[bytes.len().saturating_sub(MAX_LOGGED)..];
    let shown = |c: char| if c.is_control() && c != '\n' { '.' } else { c };
    String::from_utf8_lossy(tail).trim_end().chars().map(shown).collect()
}

fn report(report: &Report) -> Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    let mut stdout = io::stdout();
    stdout.write_all(&line)?;
    Ok(stdout.flush()?)
}
