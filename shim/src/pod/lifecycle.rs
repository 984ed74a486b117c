//! Starting, killing and deleting. What ends something never waits for the guest beyond a deadline.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::{TaskDelete, TaskExecAdded};
use oci_spec::runtime::Process as ProcessSpec;
use sandbox::plan::Volume;
use sandbox::{CallError, ProcessId};

use super::{DELETE_DEADLINE, EXIT_KILLED, Pod};
use crate::container::Container;
use crate::cri::Role;
use crate::error::TaskError;
use crate::hooks::Moment;
use crate::process::{Exit, Phase, Process};
use crate::stdio::Stdio;
use crate::vm::Vm;

const SIGKILL: u32 = 9;
/// Signals that end the container that stands for a pod. With the first two it exits as asked.
const SIGINT: u32 = 2;
const SIGTERM: u32 = 15;
/// Time that the agent has to kill, before the VMM is killed.
const KILL_DEADLINE: Duration = Duration::from_millis(1500);

impl Pod {
    /// Starts a container's init or an exec; returns its process id.
    pub(crate) async fn start(&self, id: &str, exec_id: &str) -> Result<u32, TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let vm = self.vm()?;
        process.begin_start()?;
        let started =
            if exec_id.is_empty() { start_init(&vm, &container).await } else { self.start_exec(&process).await };
        if let Err(error) = started {
            process.start_failed(&self.events);
            return Err(error);
        }
        let pid = if exec_id.is_empty() { vm.pid() } else { self.new_exec_pid() };
        if exec_id.is_empty() {
            container.hooks.run_all_the_same(Moment::Started, Some(pid)).await;
        }
        process.started(pid, &self.events);
        Ok(pid)
    }

    async fn start_exec(&self, process: &Process) -> Result<(), TaskError> {
        let vm = self.vm()?;
        let spec = process.spec.as_ref().ok_or_else(|| TaskError::Invalid("the exec has no process".to_owned()))?;
        let ends = process.stdio.open(&self.namespace, &process.id).await?;
        let asked = spec.console_size().map(|size| {
            let side = |value: u64| u16::try_from(value).unwrap_or_default();
            (side(size.height()), side(size.width()))
        });
        let wanted = process.stdio.wanted(process.size().or(asked));
        let streams = vm.sandbox.exec(&process.id, spec, wanted).await?;
        process.set_copying(ends.copy(streams));
        Ok(())
    }

    /// Takes an exec in, which its start will run.
    pub(crate) fn add_exec(&self, id: ProcessId, stdio: Stdio, spec: ProcessSpec) -> Result<(), TaskError> {
        let container = self.container(&id.container_id)?;
        if container.role == Role::Pause {
            return Err(TaskError::Unsupported("an exec in the container that stands for the pod"));
        }
        let phase = container.init.phase();
        if phase != Phase::Running {
            return Err(container.init.wrong_state("exec in", phase));
        }
        if container.is_paused() {
            let state = "paused";
            return Err(TaskError::State { action: "exec in", id: id.container_id, state });
        }
        let process = container.add_exec(Process::new(id, stdio, Some(spec)))?;
        let (container_id, exec_id) = (process.id.container_id.clone(), process.id.exec_id.clone());
        self.events.push(&TaskExecAdded { container_id, exec_id, ..Default::default() });
        process.created(0, &self.events);
        Ok(())
    }

    /// Sends a signal. After SIGKILL the process is gone in two seconds, with the whole VM when the guest does not do it.
    pub(crate) async fn kill(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        match process.phase() {
            Phase::Exited => return Err(TaskError::Finished),
            Phase::Creating if signal == SIGKILL => {
                // Nobody waits for the boot of a VM to see the end of it.
                let _ = tokio::time::timeout(KILL_DEADLINE, container.abandon()).await;
                return Ok(());
            }
            Phase::Created if !exec_id.is_empty() => {
                process.settle(Exit::now(128 + signal), &self.events);
                return Ok(());
            }
            _ => {}
        }
        if container.role == Role::Pause {
            return self.kill_pause(&process, signal).await;
        }
        let vm = self.vm()?;
        if signal != SIGKILL {
            return Ok(vm.sandbox.signal(&process.id, signal, all).await?);
        }
        let killed = async {
            let told = vm.sandbox.signal(&process.id, SIGKILL, all).await;
            // An exec may have ended by itself.
            let told = told.or_else(|error| if is_not_found(&error) { Ok(()) } else { Err(error) });
            told?;
            process.exited().await;
            Ok::<_, CallError>(())
        };
        if !matches!(tokio::time::timeout(KILL_DEADLINE, killed).await, Ok(Ok(()))) && process.exit().is_none() {
            tracing::warn!(container = id, "the guest does not kill: the VM is killed");
            vm.kill();
        }
        Ok(())
    }

    /// The VM is what ends. That is not waited for: containerd deletes what has exited, and a request that it still waits for then fails.
    async fn kill_pause(self: &Arc<Self>, process: &Process, signal: u32) -> Result<(), TaskError> {
        let code = match signal {
            SIGINT | SIGTERM => 0,
            SIGKILL => EXIT_KILLED,
            _ => return Ok(()),
        };
        self.stop_members().await;
        process.settle(Exit::now(code), &self.events);
        let pod = self.clone();
        tokio::spawn(async move { pod.stop_vm().await });
        Ok(())
    }

    /// Ends what still runs beside the container that stands for the pod.
    pub(super) async fn stop_members(self: &Arc<Self>) {
        for container in self.all_containers() {
            if container.role != Role::Pause && container.init.exit().is_none() {
                // What it leaves ends with the VM.
                let _ = Box::pin(self.kill(&container.id, "", SIGKILL, true)).await;
            }
        }
    }

    /// Deletes what has ended, or never began; returns its process id and how it ended.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<(u32, Exit), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        match process.phase() {
            Phase::Exited => {}
            Phase::Creating if exec_id.is_empty() => {
                // Whoever asked for it gave up.
                let _ = tokio::time::timeout(KILL_DEADLINE, container.abandon()).await;
                return Ok((0, Exit::now(EXIT_KILLED)));
            }
            Phase::Created if exec_id.is_empty() => {
                self.kill(id, "", SIGKILL, true).await?;
                process.settle(Exit::now(EXIT_KILLED), &self.events);
            }
            Phase::Created => {}
            phase => return Err(process.wrong_state("delete", phase)),
        }
        process.drain().await;
        let exit = process.exit().unwrap_or(Exit { code: 0, at: SystemTime::now() });
        let pid = process.pid();
        if exec_id.is_empty() {
            self.delete_container(&container).await?;
        } else {
            self.delete_exec(&container, &process).await?;
        }
        self.events.push(&TaskDelete {
            container_id: id.to_owned(),
            id: exec_id.to_owned(),
            pid,
            exit_status: exit.code,
            exited_at: Some(exit.at.into()).into(),
            ..Default::default()
        });
        Ok((pid, exit))
    }

    async fn delete_exec(&self, container: &Container, process: &Process) -> Result<(), TaskError> {
        let exec_id = &process.id.exec_id;
        if !container.remove_exec(exec_id) {
            return Err(TaskError::NotFound { what: "exec", id: exec_id.clone() });
        }
        if let Ok(vm) = self.vm() {
            // One that never started is not known there; and what the guest remembers of it ends with the container.
            let _ = tokio::time::timeout(DELETE_DEADLINE, vm.sandbox.delete(&process.id, true)).await;
        }
        Ok(())
    }

    async fn delete_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), TaskError> {
        if self.containers().remove(&container.id).is_none() {
            return Err(TaskError::NotFound { what: "container", id: container.id.clone() });
        }
        match container.role {
            // Nothing is left in the VM that anybody could ask for.
            Role::Alone | Role::Pause => self.stop_vm().await,
            Role::Member => self.forget_member(container).await,
        }
        container.hooks.run_all_the_same(Moment::Deleted, None).await;
        tracing::info!(container = container.id, "deleted");
        Ok(())
    }

    /// Takes a container out of the guest. What the guest does not do in time goes on, so that in the end nothing stays.
    pub(super) async fn forget_member(self: &Arc<Self>, container: &Arc<Container>) {
        let Ok(vm) = self.vm() else { return };
        let (pod, container) = (self.clone(), container.clone());
        let forgetting = tokio::spawn(async move {
            match vm.sandbox.delete(&container.init.id, true).await {
                Err(error) if !is_not_found(&error) => {
                    tracing::warn!(container = container.id, %error, "the guest did not delete a container");
                }
                _ => {}
            }
            pod.release_shares(&vm, &container).await;
        });
        let _ = tokio::time::timeout(DELETE_DEADLINE, forgetting).await;
    }

    /// Takes a container's shares out of the VM, but for a volume that another one uses.
    async fn release_shares(&self, vm: &Vm, container: &Container) {
        let brought = container.share_tags();
        let in_use = |volume: &Volume| self.all_containers().iter().any(|other| other.uses(volume));
        let idle: Vec<String> = {
            let mut table = self.volumes();
            let used: Vec<String> =
                table.iter().filter(|(volume, _)| in_use(volume)).map(|(_, at)| at.tag.clone()).collect();
            let mut idle: Vec<String> = table.values().map(|at| at.tag.clone()).filter(|t| !used.contains(t)).collect();
            table.retain(|_, at| used.contains(&at.tag));
            idle.extend(brought.into_iter().filter(|tag| !used.contains(tag)));
            idle.sort();
            idle.dedup();
            idle
        };
        for tag in idle {
            // A share that was never added is not there.
            if let Err(error) = vm.sandbox.remove_share(&tag).await {
                tracing::debug!(tag, %error, "a share stays in the VM");
            }
        }
    }
}

async fn start_init(vm: &Vm, container: &Container) -> Result<(), TaskError> {
    // Some engines wire the network between a container's creation and its start.
    vm.sandbox.rescan_network().await?;
    match container.role {
        Role::Pause => Ok(()),
        Role::Alone | Role::Member => Ok(vm.sandbox.start(&container.id).await?),
    }
}

fn is_not_found(error: &CallError) -> bool {
    matches!(error, CallError::Refused { code: 5, .. })
}
