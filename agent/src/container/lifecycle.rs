//! Making containers and processes, and starting them.

use std::os::fd::OwnedFd;
use std::path::Path;

use agent_api::message::{CreateContainerRequest, ExecRequest, Status, Stdio, WaitReply};
use libcontainer::container::Container as Libcontainer;
use oci_spec::runtime::Spec;

use super::{Container, ContainerError, Containers, Phase};
use crate::bundle::{Bundle, STATE_DIR};
use crate::cgroup::Cgroup;
use crate::process::{Made, Making, wait_executed};
use crate::{id, refuse};

impl Containers {
    /// Makes a container whose init waits for [`Self::start`].
    pub(crate) async fn create(&self, request: CreateContainerRequest) -> Result<i32, ContainerError> {
        let container_id = id::check(&request.container_id)?.to_owned();
        let mut spec: Spec = serde_json::from_slice(&request.spec)?;
        refuse::spec(&spec)?;
        self.begin_create(&container_id)?;
        adapt(&mut spec, &container_id);
        let stdio = request.stdio.unwrap_or_default();
        match self.make_init(&container_id, &spec, &stdio).await {
            Ok(pid) => Ok(pid),
            Err(error) => {
                // The first error is the one to report.
                let _ = Cgroup::of(&container_id).remove().await;
                let _ = Bundle::of(&container_id).remove();
                self.table().remove(&container_id);
                Err(error)
            }
        }
    }

    fn begin_create(&self, container_id: &str) -> Result<(), ContainerError> {
        let mut table = self.table();
        if table.contains_key(container_id) {
            return Err(ContainerError::Exists { what: "container", id: container_id.to_owned() });
        }
        table.insert(container_id.to_owned(), Container::creating());
        Ok(())
    }

    async fn make_init(&self, container_id: &str, spec: &Spec, stdio: &Stdio) -> Result<i32, ContainerError> {
        Bundle::of(container_id).create(spec).map_err(ContainerError::io("make the bundle"))?;
        let process = spec.process().clone().unwrap_or_default();
        let terminal = process.terminal().unwrap_or(false);
        let mut stdio = stdio.clone();
        if let Some(size) = process.console_size().filter(|_| stdio.rows == 0) {
            let side = |value: u64| u32::try_from(value).unwrap_or_default();
            (stdio.rows, stdio.columns) = (side(size.height()), side(size.width()));
        }
        let making = Making { container_id, exec_id: "", terminal, stdio: &stdio };
        let mut made = making.make(&self.reaper).await?;
        // The init runs nothing of the container before it is started.
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
        let rules = resources.devices().clone().unwrap_or_default();
        let restricted = Cgroup::of(container_id).restrict_devices(&rules);
        restricted.map_err(ContainerError::io("restrict the devices"))?;
        let oom_watch = self.watch_ooms(container_id).map_err(ContainerError::io("watch for OOM kills"))?;
        let (pid, start) = (made.pid, made.start.take());
        let init = self.adopt(container_id, "", made, 0);
        self.with_container(container_id, |container| {
            container.phase = Phase::Created;
            (container.terminal, container.start, container.oom_watch) = (terminal, start, Some(oom_watch));
            container.processes.insert(String::new(), Some(init));
            Ok(pid)
        })
    }

    /// Lets the init of a created container run; returns when its command is executed.
    pub(crate) async fn start(&self, container_id: &str) -> Result<(), ContainerError> {
        self.require(container_id, "start", &[Status::STATUS_CREATED])?;
        let start = self.with_container(container_id, |container| {
            container.phase = Phase::Running;
            Ok(container.start.take())
        })?;
        let started = run_init(container_id, start).await;
        if started.is_err() {
            // An init that was told to run and did not is of no use; there may be none any more.
            let _ = Cgroup::of(container_id).kill();
        }
        started
    }

    /// Starts another process in a running container.
    pub(crate) async fn exec(&self, request: ExecRequest) -> Result<i32, ContainerError> {
        let container_id = id::check(&request.container_id)?.to_owned();
        let exec_id = id::check(&request.exec_id)?.to_owned();
        let process: oci_spec::runtime::Process = serde_json::from_slice(&request.process)?;
        refuse::process(&process)?;
        self.begin_exec(&container_id, &exec_id)?;
        let terminal = process.terminal().unwrap_or(false);
        let stdio = request.stdio.unwrap_or_default();
        let making = Making { container_id: &container_id, exec_id: &exec_id, terminal, stdio: &stdio };
        let oom_kills_before = Cgroup::of(&container_id).oom_kill_count();
        let bundle = Bundle::of(&container_id);
        let made = match bundle.write_exec(&exec_id, &process) {
            Ok(()) => making.make(&self.reaper).await,
            Err(error) => Err(ContainerError::io("write the process")(error)),
        };
        bundle.remove_exec(&exec_id);
        self.end_exec(&container_id, &exec_id, made, oom_kills_before)
    }

    /// Starts another process, waits for its exit and forgets it.
    pub(crate) async fn run_exec(&self, request: ExecRequest) -> Result<WaitReply, ContainerError> {
        let (container_id, exec_id) = (request.container_id.clone(), request.exec_id.clone());
        self.exec(request).await?;
        let exit = self.exit_of(&container_id, &exec_id).await?;
        // Not found: its container was deleted meanwhile.
        let _ = self.delete(&container_id, &exec_id, false).await;
        Ok(exit)
    }

    fn begin_exec(&self, container_id: &str, exec_id: &str) -> Result<(), ContainerError> {
        self.require(container_id, "exec in", &[Status::STATUS_RUNNING])?;
        let spec = Bundle::of(container_id).spec().map_err(ContainerError::io("read the spec"))?;
        refuse::exec_in(&spec)?;
        self.with_container(container_id, |container| {
            if container.processes.contains_key(exec_id) {
                return Err(ContainerError::Exists { what: "exec", id: exec_id.to_owned() });
            }
            container.processes.insert(exec_id.to_owned(), None);
            Ok(())
        })
    }

    fn end_exec(
        &self,
        container_id: &str,
        exec_id: &str,
        made: Result<Made, ContainerError>,
        oom_kills_before: u64,
    ) -> Result<i32, ContainerError> {
        match made {
            Ok(made) => {
                let pid = made.pid;
                let process = self.adopt(container_id, exec_id, made, oom_kills_before);
                self.with_container(container_id, |container| {
                    container.processes.insert(exec_id.to_owned(), Some(process));
                    Ok(pid)
                })
            }
            Err(error) => {
                self.with_container(container_id, |container| {
                    container.processes.remove(exec_id);
                    Ok(())
                })?;
                // The container may have stopped meanwhile, which is then the cause.
                self.require(container_id, "exec in", &[Status::STATUS_RUNNING]).and(Err(error))
            }
        }
    }
}

async fn run_init(container_id: &str, start: Option<OwnedFd>) -> Result<(), ContainerError> {
    let state = Path::new(STATE_DIR).join(container_id);
    // No child for this: it connects to the init's socket and writes a file.
    let started = Libcontainer::load(state).and_then(|mut container| container.start());
    started.map_err(|error| ContainerError::Child(format!("cannot start: {error}")))?;
    match start {
        Some(start) => wait_executed(start).await,
        None => Ok(()),
    }
}

/// What the spec says for the host is replaced by what holds in the guest.
fn adapt(spec: &mut Spec, container_id: &str) {
    spec.set_hooks(None);
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(Some(Cgroup::oci_path(container_id).into()));
        // `libcontainer` changes every mount, and does not know the names that say so: `rslave` and the like.
        let propagation = linux.rootfs_propagation().as_deref().map(|name| name.strip_prefix('r').unwrap_or(name));
        let propagation = propagation.map(str::to_owned);
        linux.set_rootfs_propagation(propagation);
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Linux, Spec};

    use super::adapt;

    #[test]
    fn the_propagation_of_the_root_has_a_name_that_libcontainer_knows() {
        let adapted = |name: Option<&str>| {
            let (mut spec, mut linux) = (Spec::default(), Linux::default());
            linux.set_rootfs_propagation(name.map(str::to_owned));
            spec.set_linux(Some(linux));
            adapt(&mut spec, "box");
            spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().clone())
        };
        let names = [Some("rslave"), Some("slave"), Some("rprivate"), Some("rshared"), None].map(adapted);
        assert_eq!(
            names.each_ref().map(Option::as_deref),
            [Some("slave"), Some("slave"), Some("private"), Some("shared"), None]
        );
    }
}
