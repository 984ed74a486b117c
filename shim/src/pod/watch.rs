//! What the guest tells: exits and kills by the OOM killer, in their order; and the end of the VM.

use std::sync::Arc;

use containerd_shim_protos::events::task::TaskOOM;
use sandbox::message::{self, EventsReply, event::What};
use sandbox::{CallError, Exit as VmExit, ExitReason};

use super::{EXIT_KILLED, EXIT_LOST, Pod};
use crate::process::{Exit, Process};
use crate::vm::Vm;

impl Pod {
    /// Begins to listen to a VM that has booted.
    pub(super) fn watch(self: &Arc<Self>, vm: Arc<Vm>) {
        let (pod, followed, reporting) = (self.clone(), vm.clone(), vm.clone());
        tokio::spawn(async move {
            let exit = pod.listen(&vm).await;
            pod.settle_all(&vm, &exit).await;
        });
        tokio::spawn(async move { followed.sandbox.follow_network().await });
        tokio::spawn(async move { reporting.sandbox.report_free_pages().await });
    }

    /// Passes events on until the VM ends.
    async fn listen(&self, vm: &Vm) -> VmExit {
        let agent_gone = async {
            loop {
                match vm.sandbox.next_events().await {
                    Ok(reply) => self.deliver(vm, &reply).await,
                    Err(error) => return error,
                }
            }
        };
        let error = tokio::select! {
            biased;
            exit = vm.sandbox.ended() => return exit,
            error = agent_gone => error,
        };
        if let CallError::VmEnded { exit, .. } = error {
            return *exit;
        }
        // A guest without its agent is of no use.
        tracing::warn!(%error, "the agent is gone and the VM is not: it is killed");
        vm.kill();
        vm.sandbox.ended().await
    }

    async fn deliver(&self, vm: &Vm, reply: &EventsReply) {
        for event in &reply.events {
            let Ok(container) = self.container(&event.container_id) else { continue };
            match &event.what {
                Some(What::Oom(_)) => {
                    self.events.push(&TaskOOM { container_id: event.container_id.clone(), ..Default::default() });
                }
                Some(What::Exit(exit)) => {
                    if let Ok(process) = container.process(&event.exec_id) {
                        process.settle(Exit::now(exit.exit_code), &self.events);
                    }
                }
                _ => tracing::warn!("the guest told an event that nobody knows"),
            }
        }
        if reply.lost > 0 {
            tracing::warn!(lost = reply.lost, "the guest has dropped events: its processes are asked one by one");
            for process in self.processes() {
                if process.exit().is_none() {
                    self.ask(vm, &process).await;
                }
            }
        }
    }

    /// Asks the guest whether a process has ended.
    async fn ask(&self, vm: &Vm, process: &Process) {
        let Ok(state) = vm.sandbox.state(&process.id).await else { return };
        if state.status.enum_value_or_default() == message::Status::STATUS_STOPPED {
            process.settle(Exit::now(state.exit.exit_code), &self.events);
        }
    }

    /// Every process of the pod, execs before the init that they end with.
    fn processes(&self) -> Vec<Arc<Process>> {
        let containers = self.all_containers();
        containers
            .iter()
            .flat_map(|container| container.all_execs().into_iter().chain([container.init.clone()]))
            .collect()
    }

    /// Everything has ended with the VM.
    async fn settle_all(&self, vm: &Vm, exit: &VmExit) {
        let asked = vm.end_asked();
        // As the shell has it: a process that somebody killed has 137, be it a VMM.
        let killed = asked || exit.reason == ExitReason::Signal { signal: 9 };
        let code = if killed { EXIT_KILLED } else { EXIT_LOST };
        vm.clean_up().await;
        let reason = match (&exit.reason, asked) {
            (_, true) | (ExitReason::Requested, _) => "it was stopped".to_owned(),
            (reason, false) => {
                let text = reason.to_string();
                tracing::error!(reason = text, console = exit.console_tail, "the VM has ended");
                text
            }
        };
        let end = Exit::now(code);
        // Before the processes: whoever is told of them must not find a VM.
        self.ended.send_replace(Some((end, reason)));
        for process in self.processes() {
            process.settle(end, &self.events);
        }
    }
}
