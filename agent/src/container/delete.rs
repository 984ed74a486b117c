//! Removing containers and execs, so that nothing of them is left.

use agent_api::message::Status;

use super::{ContainerError, Containers, Phase};
use crate::bundle::Bundle;
use crate::cgroup::Cgroup;

impl Containers {
    /// Removes a container, or forgets an exec.
    pub(crate) async fn delete(&self, container_id: &str, exec_id: &str, force: bool) -> Result<(), ContainerError> {
        if exec_id.is_empty() {
            self.delete_container(container_id, force).await
        } else {
            self.delete_exec(container_id, exec_id, force).await
        }
    }

    async fn delete_container(&self, container_id: &str, force: bool) -> Result<(), ContainerError> {
        let mut allowed = vec![Status::STATUS_CREATED, Status::STATUS_STOPPED];
        if force {
            allowed.extend([Status::STATUS_RUNNING, Status::STATUS_PAUSED]);
        }
        self.require(container_id, "delete", &allowed)?;
        let before = self
            .with_container(container_id, |container| Ok(std::mem::replace(&mut container.phase, Phase::Deleting)))?;
        let removed = Cgroup::of(container_id).remove().await.map_err(ContainerError::io("remove the cgroup"));
        let removed = removed.and_then(|()| {
            Bundle::of(container_id).remove().map_err(ContainerError::io("remove the state of the container"))
        });
        if removed.is_err() {
            // The caller may try again.
            self.with_container(container_id, |container| {
                container.phase = before;
                Ok(())
            })?;
            return removed;
        }
        // Its exit is an event before the container is gone.
        self.exit_of(container_id, "").await?;
        self.table().remove(container_id);
        Ok(())
    }

    async fn delete_exec(&self, container_id: &str, exec_id: &str, force: bool) -> Result<(), ContainerError> {
        let runs = self.with_process(container_id, exec_id, |process| Ok(!process.has_exited()))?;
        if runs && !force {
            return Err(ContainerError::ExecRuns(exec_id.to_owned()));
        }
        if runs {
            self.with_process(container_id, exec_id, |process| process.signal(libc::SIGKILL))?;
            self.exit_of(container_id, exec_id).await?;
        }
        self.with_container(container_id, |container| {
            container.processes.remove(exec_id);
            Ok(())
        })
    }
}
