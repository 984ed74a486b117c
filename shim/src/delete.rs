//! `delete`: removes what a server that is gone left behind. Called when its connection broke, and by a containerd that finds
//! a folder without a server; any number of times.
//!
//! The mounts of a pod are detached trees and went with the server. What can be left is the VMM, when it was stopped and did
//! not see its owner go, the socket, and a server that no longer answers.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message as _;
use rustix::mount::{UnmountFlags, unmount};
use sandbox::cgroup::HostCgroup;

use crate::arguments::Arguments;
use crate::config::Config;
use crate::hooks::{Hooks, Moment};
use crate::record::Record;
use crate::translate::read_spec;

/// Exit status of a container whose server was killed, as with runc's shim.
const EXIT_KILLED: u32 = 128 + 9;

/// Removes it all and says how the container ended.
pub(crate) fn delete(arguments: &Arguments) -> Result<()> {
    let bundle = arguments.bundle()?;
    let record = Record::read(&bundle);
    for process in record.iter().flat_map(|record| [Some(&record.server), record.vmm.as_ref()]).flatten() {
        process.kill().with_context(|| format!("cannot kill the process {}", process.pid))?;
    }
    if let Some(cgroup) = record.as_ref().and_then(|record| record.cgroup.clone()) {
        HostCgroup::at(cgroup).remove_when_empty();
    }
    remove_socket(&bundle);
    // Ours are not here; whoever mounted it wants it gone.
    let _ = unmount(bundle.join("rootfs"), UnmountFlags::DETACH);
    run_hooks(&arguments.id, &bundle);
    let response = DeleteResponse {
        pid: record.and_then(|record| record.vmm).map_or(0, |vmm| vmm.pid),
        exit_status: EXIT_KILLED,
        exited_at: Some(SystemTime::now().into()).into(),
        ..Default::default()
    };
    io::stdout().write_all(&response.write_to_bytes()?).context("cannot answer")
}

/// Undoes what the hooks of a container did that its server did not delete.
fn run_hooks(id: &str, bundle: &Path) {
    let allowed = Config::load().is_ok_and(|config| config.hooks.allowed);
    let Ok(mut spec) = read_spec(bundle) else { return };
    let hooks = Hooks::take(&mut spec, id, bundle);
    if !allowed || !hooks.are_owed() {
        return;
    }
    if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() {
        runtime.block_on(hooks.run_all_the_same(Moment::Deleted, None));
    }
}

/// The socket of a server that does not answer. That of a pod whose server lives stays.
fn remove_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else { return };
    let Some(path) = address.strip_prefix("unix://").map(Path::new) else { return };
    if UnixStream::connect(path).is_err() {
        // It may be gone already.
        let _ = fs::remove_file(path);
    }
}
