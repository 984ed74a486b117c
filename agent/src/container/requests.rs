//! Requests about containers that exist: waiting, signals, terminals, limits, what they use and run.

use agent_api::message::{
    GuestProcess, ResizeRequest, SignalRequest, StateReply, StatsReply, Status, UpdateRequest, WaitReply,
};

use super::{ContainerError, Containers, Phase, Process};
use crate::bundle::Bundle;
use crate::cgroup::Cgroup;
use crate::{processes, refuse, step, sys, terminal};

/// Largest signal number of Linux.
const MAX_SIGNAL: u32 = 64;

impl Containers {
    /// Waits for a process to exit.
    pub(crate) async fn wait(&self, container_id: &str, exec_id: &str) -> Result<WaitReply, ContainerError> {
        self.exit_of(container_id, exec_id).await
    }

    pub(crate) fn state(&self, container_id: &str, exec_id: &str) -> Result<StateReply, ContainerError> {
        let (status, terminal) =
            self.with_container(container_id, |container| Ok((container.status(), container.terminal)))?;
        if exec_id.is_empty() && status == Status::STATUS_CREATING {
            return Ok(StateReply { status: status.into(), ..Default::default() });
        }
        self.with_process(container_id, exec_id, |process| {
            let exit = process.reply.borrow().clone();
            let (status, terminal) = match (exec_id.is_empty(), process.has_exited()) {
                (true, _) => (status, terminal),
                (false, true) => (Status::STATUS_STOPPED, process.terminal.is_some()),
                (false, false) => (Status::STATUS_RUNNING, process.terminal.is_some()),
            };
            Ok(StateReply {
                status: status.into(),
                pid: u32::try_from(process.pid).unwrap_or_default(),
                terminal,
                exit: exit.into(),
                ..Default::default()
            })
        })
    }

    /// Sends a signal to one process, or to every process of the container.
    pub(crate) fn signal(&self, request: &SignalRequest) -> Result<(), ContainerError> {
        let number = Some(request.signal).filter(|number| (1..=MAX_SIGNAL).contains(number));
        let number = number.and_then(|number| i32::try_from(number).ok());
        let number = number.ok_or_else(|| ContainerError::Invalid(format!("no such signal: {}", request.signal)))?;
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        if !request.all {
            return self.with_process(id, exec_id, |process| process.signal(number));
        }
        self.with_process(id, "", |_| Ok(()))?;
        let cgroup = Cgroup::of(id);
        let failed = ContainerError::io("signal the container");
        let pids = cgroup.processes().map_err(&failed)?;
        if pids.is_empty() {
            return Err(ContainerError::Exited);
        }
        if number == libc::SIGKILL {
            return cgroup.kill().map_err(failed);
        }
        for pid in pids {
            // ESRCH: it ended by itself meanwhile.
            sys::kill(pid, number)
                .or_else(|e| if e.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(e) })
                .map_err(&failed)?;
        }
        Ok(())
    }

    pub(crate) fn resize(&self, request: &ResizeRequest) -> Result<(), ContainerError> {
        self.with_process(&request.container_id, &request.exec_id, |process| {
            let Some(master) = &process.terminal else {
                return Err(ContainerError::Invalid("the process has no terminal".to_owned()));
            };
            terminal::set_size(master, request.rows, request.columns).map_err(ContainerError::io("resize the terminal"))
        })
    }

    pub(crate) fn close_stdin(&self, container_id: &str, exec_id: &str, sent_bytes: u64) -> Result<(), ContainerError> {
        self.with_process(container_id, exec_id, |process| {
            if let Some(input) = &process.input {
                input.end_after(sent_bytes);
            }
            Ok(())
        })
    }

    pub(crate) fn stats(&self, container_id: &str) -> Result<StatsReply, ContainerError> {
        self.with_process(container_id, "", |_| Ok(()))?;
        Cgroup::of(container_id).stats().map_err(ContainerError::io("read the cgroup"))
    }

    /// Freezes or thaws the container.
    pub(crate) async fn freeze(&self, container_id: &str, frozen: bool) -> Result<(), ContainerError> {
        let (action, from, to) = if frozen {
            ("pause", Status::STATUS_RUNNING, Phase::Paused)
        } else {
            ("resume", Status::STATUS_PAUSED, Phase::Running)
        };
        self.require(container_id, action, &[from])?;
        let done = Cgroup::of(container_id).freeze(frozen).await;
        if frozen && done.is_err() {
            // Half frozen is worse than not at all.
            let _ = Cgroup::of(container_id).freeze(false).await;
        }
        done.map_err(ContainerError::io(if frozen { "freeze the cgroup" } else { "thaw the cgroup" }))?;
        self.with_container(container_id, |container| {
            if matches!(container.phase, Phase::Running | Phase::Paused) {
                container.phase = to;
            }
            Ok(())
        })
    }

    /// Changes limits; a resource that is not named stays as it is.
    pub(crate) async fn update(&self, request: &UpdateRequest) -> Result<(), ContainerError> {
        let id = &request.container_id;
        self.require(id, "update", &[Status::STATUS_CREATED, Status::STATUS_RUNNING, Status::STATUS_PAUSED])?;
        let resources = serde_json::from_slice(&request.resources)?;
        refuse::resources(&resources)?;
        refuse::update(&resources)?;
        let path = Bundle::of(id).path().join("update.json");
        std::fs::write(&path, &request.resources).map_err(ContainerError::io("write the resources"))?;
        let (cgroup, file) = (Cgroup::oci_path(id), path.display().to_string());
        let updated = step::run(&self.reaper, &["update", &cgroup, &file], vec![]).await;
        let _ = std::fs::remove_file(&path);
        updated.map(drop)
    }

    pub(crate) fn list_processes(&self, container_id: &str) -> Result<Vec<GuestProcess>, ContainerError> {
        let exec_ids = self.with_container(container_id, |container| {
            let running = |(exec_id, process): (&String, &Option<Process>)| {
                let process = process.as_ref().filter(|process| !process.has_exited())?;
                Some((process.pid, exec_id.clone()))
            };
            Ok(container.processes.iter().filter_map(running).collect())
        })?;
        let pids = Cgroup::of(container_id).processes().map_err(ContainerError::io("list processes"))?;
        Ok(processes::list(&pids, &exec_ids))
    }
}
