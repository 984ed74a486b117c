//! Asks the VMM whether this host's KVM can run a guest at speed.

use std::io::{self, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

pub use vmm_api::probe::Probe;

/// The VMM gives up after 2 s by itself.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs `vmm --probe`.
///
/// # Errors
/// When it cannot be run, does not answer in time, or answers nonsense.
pub fn probe(vmm: &Path) -> io::Result<Probe> {
    let mut child = Command::new(vmm)
        .arg("--probe")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let (answered, answer) = mpsc::channel();
    thread::Builder::new().name("probe".to_owned()).spawn(move || {
        let mut text = String::new();
        let read = stdout.read_to_string(&mut text).map(|_| text);
        // Nobody listening means that the deadline has passed.
        let _ = answered.send(read);
    })?;
    let text = answer.recv_timeout(DEADLINE);
    // It has ended, or is of no use any more.
    let _ = child.kill();
    child.wait()?;
    let text = text.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer within 10000 ms"))??;
    Ok(serde_json::from_str(&text)?)
}
