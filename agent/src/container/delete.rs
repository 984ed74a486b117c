//! Removing containers and execs, so that nothing of them is left.

use std::io;
use std::time::Duration;

use agent_api::message::Status;

use super::{ContainerError, Containers, Phase};
use crate::bundle::Bundle;
use crate::cgroup::Cgroup;

/// Time that killed processes have to exit.
const EXIT_DEADLINE: Duration = Duration::from_secs(10);

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
        let removed = self.end_and_remove(container_id).await;
        if removed.is_err() {
            // The caller may try again.
            self.with_container(container_id, |container| {
                container.phase = before;
                Ok(())
            })?;
            return removed;
        }
        self.table().remove(container_id);
        Ok(())
    }

    async fn end_and_remove(&self, container_id: &str) -> Result<(), ContainerError> {
        let cgroup = Cgroup::of(container_id);
        cgroup.kill().map_err(ContainerError::io("kill the container"))?;
        // Exits are told, with what the cgroup knows of them, before it is gone.
        let exits = self.exits_of_all(container_id);
        tokio::time::timeout(EXIT_DEADLINE, exits).await.map_err(|_| {
            ContainerError::io("kill the container")(io::Error::new(io::ErrorKind::TimedOut, "it runs after 10000 ms"))
        })??;
        cgroup.remove().await.map_err(ContainerError::io("remove the cgroup"))?;
        Bundle::of(container_id).remove().map_err(ContainerError::io("remove the state of the container"))
    }

    async fn exits_of_all(&self, container_id: &str) -> Result<(), ContainerError> {
        let made = self.with_container(container_id, |container| {
            let made = container.processes.iter().filter(|(_, process)| process.is_some());
            Ok(made.map(|(exec_id, _)| exec_id.clone()).collect::<Vec<_>>())
        })?;
        for exec_id in made {
            // Not found: it was deleted meanwhile.
            drop(self.exit_of(container_id, &exec_id).await);
        }
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
