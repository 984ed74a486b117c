//! Requests that change nothing about who lives: pause, resize, update, statistics.

use std::sync::Arc;

use containerd_shim_protos::api::ProcessInfo;
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use containerd_shim_protos::shim::oci::ProcessDetails;
use oci_spec::runtime::LinuxResources;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;

use super::Pod;
use crate::container::Container;
use crate::cri::Role;
use crate::error::TaskError;
use crate::metrics;
use crate::process::Phase;
use crate::translate;

impl Pod {
    /// Freezes every process of a container.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), TaskError> {
        let container = self.guest_container(id, "pausing the container that stands for the pod")?;
        self.vm()?.sandbox.pause(id).await?;
        container.set_paused(true);
        self.events.push(&TaskPaused { container_id: id.to_owned(), ..Default::default() });
        Ok(())
    }

    /// Thaws them.
    pub(crate) async fn resume(&self, id: &str) -> Result<(), TaskError> {
        let container = self.guest_container(id, "resuming the container that stands for the pod")?;
        self.vm()?.sandbox.resume(id).await?;
        container.set_paused(false);
        self.events.push(&TaskResumed { container_id: id.to_owned(), ..Default::default() });
        Ok(())
    }

    /// A container that is in the guest.
    fn guest_container(&self, id: &str, refused: &'static str) -> Result<Arc<Container>, TaskError> {
        let container = self.container(id)?;
        if container.role == Role::Pause { Err(TaskError::Unsupported(refused)) } else { Ok(container) }
    }

    /// Sets the size of a terminal, now or when there is one.
    pub(crate) async fn resize(&self, id: &str, exec_id: &str, rows: u16, columns: u16) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        if process.phase() == Phase::Exited {
            return Err(TaskError::Finished);
        }
        if process.set_size(rows, columns) && container.role != Role::Pause {
            self.vm()?.sandbox.resize(&process.id, rows, columns).await?;
        }
        Ok(())
    }

    /// Changes a container's limits.
    pub(crate) async fn update(&self, id: &str, mut resources: LinuxResources) -> Result<(), TaskError> {
        let container = self.guest_container(id, "changing the size of a VM that runs")?;
        let io_limits = translate::take_io_limits(&mut resources, container.role)?;
        let vm = self.vm()?;
        vm.limit_io(&io_limits)?;
        Ok(vm.sandbox.update(id, &resources).await?)
    }

    /// What a container uses; of the one that stands for the pod, what the VM uses of the host and has sent.
    pub(crate) async fn stats(&self, id: &str) -> Result<Any, TaskError> {
        if self.container(id)?.role == Role::Pause {
            return metrics::any(&self.vm()?.metrics().await);
        }
        metrics::any(&metrics::metrics(&self.vm()?.sandbox.stats(id).await?))
    }

    /// Processes of a container: those that were started from here under the ids that their starts returned, others under
    /// the guest's.
    pub(crate) async fn pids(&self, id: &str) -> Result<Vec<ProcessInfo>, TaskError> {
        let container = self.container(id)?;
        if container.role == Role::Pause || container.init.phase() == Phase::Exited {
            // Of a task that has ended too: a containerd that was restarted takes a task without processes for one that
            // was never made, and removes it before anybody has asked how it ended.
            return Ok(vec![ProcessInfo { pid: container.init.pid(), ..Default::default() }]);
        }
        let vm = self.vm()?;
        let init_guest_pid = vm.sandbox.state(&container.init.id).await?.pid;
        let mut found = Vec::new();
        for guest in vm.sandbox.list_processes(id).await? {
            let mut info = ProcessInfo { pid: guest.pid, ..Default::default() };
            if guest.pid == init_guest_pid {
                info.pid = container.init.pid();
            } else if let Ok(exec) = container.process(&guest.exec_id)
                && !guest.exec_id.is_empty()
            {
                info.pid = exec.pid();
                info.info = Some(exec_details(&guest.exec_id)?).into();
            }
            found.push(info);
        }
        Ok(found)
    }
}

/// Tells containerd which exec a process is, in the way of runc's shim.
fn exec_details(exec_id: &str) -> Result<Any, TaskError> {
    let details = ProcessDetails { exec_id: exec_id.to_owned(), ..Default::default() };
    let value = details.write_to_bytes().map_err(|error| TaskError::Invalid(error.to_string()))?;
    Ok(Any { type_url: "containerd.runc.v1.ProcessDetails".to_owned(), value, ..Default::default() })
}
