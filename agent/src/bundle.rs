//! The folder of a container: its spec as it came, and the part of it that `libcontainer` reads.
//!
//! ```text
//!   /run/agent/bundles/ID/spec.json     as it came, for our own executor
//!                         config.json   for libcontainer: without what the executor applies
//!                         EXEC.process.json, EXEC.json   the same of an exec, for as long as its step runs
//! ```

use std::path::{Path, PathBuf};
use std::{fs, io};

use oci_spec::runtime::{Process, Spec};

use crate::sysctl;

/// Folder of the bundles.
const BUNDLE_DIR: &str = "/run/agent/bundles";
/// Folder of the containers' states, of `libcontainer`.
pub(crate) const STATE_DIR: &str = "/run/agent/state";

/// The folder of one container.
pub(crate) struct Bundle(PathBuf);

impl Bundle {
    /// The bundle of a container whose id was checked.
    pub(crate) fn of(container_id: &str) -> Self {
        Self(Path::new(BUNDLE_DIR).join(container_id))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the folder.
    pub(crate) fn create(&self, spec: &Spec) -> io::Result<()> {
        fs::create_dir_all(&self.0)?;
        fs::create_dir_all(STATE_DIR)?;
        fs::write(self.0.join("spec.json"), serde_json::to_vec(spec)?)?;
        let mut for_libcontainer = spec.clone();
        if let Some(process) = spec.process() {
            for_libcontainer.set_process(Some(without_privileges(process)));
        }
        if let Some(linux) = for_libcontainer.linux_mut() {
            let listed = linux.namespaces().clone().unwrap_or_default();
            let namespaces: Vec<_> = listed.iter().map(oci_spec::runtime::LinuxNamespace::typ).collect();
            let mut sysctls = linux.sysctl().clone().unwrap_or_default();
            sysctls.retain(|name, _| sysctl::is_namespaced(name, &namespaces));
            linux.set_seccomp(None).set_sysctl(Some(sysctls));
        }
        fs::write(self.0.join("config.json"), serde_json::to_vec(&for_libcontainer)?)
    }

    /// The spec as it came.
    pub(crate) fn spec(&self) -> io::Result<Spec> {
        Ok(serde_json::from_slice(&fs::read(self.0.join("spec.json"))?)?)
    }

    /// Writes the process of an exec.
    pub(crate) fn write_exec(&self, exec_id: &str, process: &Process) -> io::Result<()> {
        fs::write(self.0.join(format!("{exec_id}.process.json")), serde_json::to_vec(process)?)?;
        fs::write(self.exec_path(exec_id), serde_json::to_vec(&without_privileges(process))?)
    }

    /// The process of an exec as it came.
    pub(crate) fn exec(&self, exec_id: &str) -> io::Result<Process> {
        Ok(serde_json::from_slice(&fs::read(self.0.join(format!("{exec_id}.process.json")))?)?)
    }

    /// The part of an exec that `libcontainer` reads.
    pub(crate) fn exec_path(&self, exec_id: &str) -> PathBuf {
        self.0.join(format!("{exec_id}.json"))
    }

    /// Forgets the process of an exec, which its step has read.
    pub(crate) fn remove_exec(&self, exec_id: &str) {
        for path in [self.exec_path(exec_id), self.0.join(format!("{exec_id}.process.json"))] {
            // Not there: the step failed before it was written.
            let _ = fs::remove_file(path);
        }
    }

    /// Removes the folder, and what `libcontainer` keeps of the container.
    pub(crate) fn remove(&self) -> io::Result<()> {
        remove_tree(&self.0)?;
        self.0.file_name().map_or(Ok(()), |id| remove_tree(&Path::new(STATE_DIR).join(id)))
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// `libcontainer` applies seccomp and capabilities for an init only, and not for `noNewPrivileges: false`; the executor does
/// it for every process instead (`child/executor.rs`).
fn without_privileges(process: &Process) -> Process {
    let mut process = process.clone();
    process.set_capabilities(None);
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    process
}
