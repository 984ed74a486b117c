//! What outlives the server: which processes are the pod's, so that `delete` can end them. One file in the folder of the pod,
//! written when the server begins and when it has a VM.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

const FILE: &str = "vmrun.json";

/// The processes of a pod.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Record {
    /// The server.
    pub(crate) server: Identity,
    /// The VMM; nothing before the VM has booted. Until then it ends with the server.
    pub(crate) vmm: Option<Identity>,
    /// The pod's cgroup, if it has one.
    pub(crate) cgroup: Option<PathBuf>,
}

/// One process, for ever.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Identity {
    /// Its process id.
    pub(crate) pid: u32,
    /// When it was started, in clock ticks since the host's boot.
    pub(crate) start_ticks: u64,
}

impl Record {
    /// Of this process and, if it has one, its VMM.
    pub(crate) fn of(vmm_pid: Option<u32>) -> io::Result<Self> {
        Ok(Self {
            server: Identity::of(std::process::id())?,
            vmm: vmm_pid.map(Identity::of).transpose()?,
            cgroup: None,
        })
    }

    /// Writes it so that a reader finds all of it or nothing.
    pub(crate) fn write(&self, bundle: &Path) -> io::Result<()> {
        let temporary = bundle.join("vmrun.json.new");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(temporary, bundle.join(FILE))
    }

    /// The record in a folder, if there is one.
    pub(crate) fn read(bundle: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(bundle.join(FILE)).ok()?).ok()
    }

    /// Removes it.
    pub(crate) fn remove(bundle: &Path) {
        // containerd may have removed the folder already.
        let _ = fs::remove_file(bundle.join(FILE));
    }
}

impl Identity {
    /// Of a process that runs.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { pid, start_ticks: start_ticks(pid)? })
    }

    /// Kills that process, and no other that has its number now.
    pub(crate) fn kill(&self) -> io::Result<()> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
        // First the descriptor, then the look at who it is: after that the number cannot change its meaning.
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
        match start_ticks(self.pid) {
            Ok(ticks) if ticks == self.start_ticks => Ok(pidfd_send_signal(pidfd, Signal::KILL)?),
            _ => Ok(()),
        }
    }
}

/// Field 22 of /proc/PID/stat (proc_pid_stat(5)); the second field may hold anything, so that counting starts behind it.
fn start_ticks(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = after_name.split_whitespace().nth(19).and_then(|field| field.parse().ok());
    ticks.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::{Identity, Record};

    #[test]
    fn kills_the_process_that_it_names_and_no_other() {
        let mut child = Command::new("sleep").arg("1000").spawn().expect("spawned");
        let identity = Identity::of(child.id()).expect("running");
        Identity { start_ticks: identity.start_ticks + 1, ..identity.clone() }.kill().expect("nothing to do");
        assert!(child.try_wait().expect("waited").is_none(), "another process of that number lives on");
        identity.kill().expect("killed");
        assert!(!child.wait().expect("waited").success());
        identity.kill().expect("gone already");
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert_eq!(Record::read(dir.path()), None);
        let record = Record::of(Some(std::process::id())).expect("running");
        record.write(dir.path()).expect("written");
        assert_eq!(Record::read(dir.path()), Some(record));
        Record::remove(dir.path());
        assert_eq!(Record::read(dir.path()), None);
    }
}
