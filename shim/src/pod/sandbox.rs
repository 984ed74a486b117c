//! The pod through containerd's Sandbox API: made from the CRI's configuration, without a container that stands for it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::{Mount, MountBuilder, Spec};
use sandbox::plan::GUEST_SHM;

use super::Pod;
use crate::cri::{self, Limits, Role};
use crate::error::TaskError;
use crate::vm::Vm;

/// Its name server is that of pods that say nothing about theirs, as with the CRI plugin's own sandboxer.
const HOST_RESOLV_CONF: &str = "/etc/resolv.conf";

/// What the CRI asks of a pod.
#[derive(Clone, Debug, Default)]
pub(crate) struct SandboxConfig {
    pub(crate) hostname: String,
    /// resolv.conf(5); nothing when the pod has the host's.
    pub(crate) resolv_conf: Option<String>,
    pub(crate) sysctls: HashMap<String, String>,
    pub(crate) annotations: HashMap<String, String>,
    pub(crate) limits: Limits,
    /// The network namespace that CNI has set up.
    pub(crate) netns: Option<PathBuf>,
    /// Its cgroup, as specs name it.
    pub(crate) cgroups_path: Option<PathBuf>,
}

impl Pod {
    /// Takes the configuration in.
    pub(crate) fn create_sandbox(&self, id: &str, config: SandboxConfig) -> Result<(), TaskError> {
        if id != self.id {
            return Err(TaskError::NotFound { what: "sandbox", id: id.to_owned() });
        }
        // A size that cannot be is refused before anything is started.
        cri::size(&self.config, config.limits, &config.annotations)?;
        let mut settings = self.settings();
        if settings.sandbox.is_some() {
            return Err(TaskError::Exists { what: "sandbox", id: id.to_owned() });
        }
        settings.sysctls = config.sysctls.clone();
        settings.sandbox = Some(config);
        Ok(())
    }

    /// The configuration of a sandbox that was created.
    pub(crate) fn sandbox(&self, id: &str) -> Result<SandboxConfig, TaskError> {
        let found = self.settings().sandbox.clone().filter(|_| id == self.id);
        found.ok_or_else(|| TaskError::NotFound { what: "sandbox", id: id.to_owned() })
    }

    /// Whether it was made through the Sandbox API.
    pub(crate) fn is_sandbox(&self) -> bool {
        self.settings().sandbox.is_some()
    }

    /// Boots its VM.
    pub(crate) async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<Arc<Vm>, TaskError> {
        let config = self.sandbox(id)?;
        if self.any_vm().is_some() {
            return Err(TaskError::State { action: "start", id: id.to_owned(), state: "started" });
        }
        let size = cri::size(&self.config, config.limits, &config.annotations)?;
        let hostname = if config.hostname.is_empty() { &self.id } else { &config.hostname };
        let place = self.place(config.cgroups_path.as_deref(), config.netns.as_deref());
        self.boot(hostname, size, Vec::new(), place).await
    }

    /// Ends everything in it.
    pub(crate) async fn stop_sandbox(&self, id: &str) -> Result<(), TaskError> {
        self.sandbox(id)?;
        self.stop_vm().await;
        Ok(())
    }

    /// The server is not needed any more.
    pub(crate) async fn shutdown_sandbox(&self) {
        self.stop_vm().await;
        self.shutdown.notify_one();
    }

    /// Gives a container what its pod has: kernel parameters, shared memory, and the files of its name and resolver where the spec has no
    /// file.
    pub(super) fn apply_sandbox(&self, spec: &mut Spec, role: Role) -> Result<(), TaskError> {
        if role != Role::Member {
            return Ok(());
        }
        let settings = self.settings().clone();
        if let Some(linux) = spec.linux_mut() {
            let mut sysctls = settings.sysctls;
            sysctls.extend(linux.sysctl().clone().unwrap_or_default());
            linux.set_sysctl(Some(sysctls));
        }
        let Some(sandbox) = settings.sandbox else { return Ok(()) };
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        let hostname = if sandbox.hostname.is_empty() { &self.id } else { &sandbox.hostname };
        for (name, text) in [
            ("hostname", format!("{hostname}\n")),
            ("hosts", hosts(hostname)),
            (
                "resolv.conf",
                sandbox.resolv_conf.unwrap_or_else(|| fs::read_to_string(HOST_RESOLV_CONF).unwrap_or_default()),
            ),
        ] {
            let destination = Path::new("/etc").join(name);
            let present = mounts.iter_mut().find(|mount| *mount.destination() == destination);
            if present.as_ref().is_some_and(|mount| !is_folder(mount)) {
                continue;
            }
            let source = self.write_once(name, &text)?;
            match present {
                Some(mount) => _ = mount.set_source(Some(source)),
                None => mounts.push(bind(source, &destination)?),
            }
        }
        // The CRI plugin of containerd 2 leaves it to the sandboxer that a pod's containers have it in common.
        let own_shm =
            |mount: &&mut Mount| mount.destination() == Path::new(GUEST_SHM) && mount.typ().as_deref() == Some("tmpfs");
        if let Some(shm) = mounts.iter_mut().find(own_shm) {
            *shm = bind(self.bundle.join("shm"), Path::new(GUEST_SHM))?;
        }
        spec.set_mounts(Some(mounts));
        Ok(())
    }

    /// A file in the pod's folder; what a container has changed in it stays for the next one.
    fn write_once(&self, name: &str, text: &str) -> Result<PathBuf, TaskError> {
        let path = self.bundle.join(name);
        if !path.exists() {
            fs::write(&path, text).map_err(TaskError::host(format!("write {}", path.display())))?;
        }
        Ok(path)
    }
}

/// hosts(5) of a pod for which nobody wrote one.
fn hosts(hostname: &str) -> String {
    format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n")
}

/// The CRI plugin mounts files that only its own sandboxer writes; it makes a folder of each that is not there.
fn is_folder(mount: &Mount) -> bool {
    mount.source().as_ref().is_some_and(|source| source.is_dir())
}

fn bind(source: PathBuf, destination: &Path) -> Result<Mount, TaskError> {
    let options = ["bind", "nosuid", "nodev", "noexec"].map(str::to_owned).to_vec();
    let mount = MountBuilder::default().destination(destination).typ("bind").source(source).options(options);
    mount.build().map_err(|error| TaskError::Invalid(error.to_string()))
}
