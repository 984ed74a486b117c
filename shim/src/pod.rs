//! The pod that a server is for: its VM and its containers. Every request ends up here; no lock is held across an await.
//!
//! ```text
//!   Create (alone or pause), or StartSandbox ─► VM boots ─► containers come and go ─► pause deleted, or StopSandbox ─► VM ends
//! ```
//! When the VM ends by itself, every process of the pod has ended with it.

mod copied;
mod create;
mod lifecycle;
mod memory;
mod requests;
mod sandbox;
mod sockets;
mod watch;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ::sandbox::plan::Volume;
use memory::VolumeNames;
use tokio::sync::{Notify, watch as channel};

use crate::config::Config;
use crate::container::Container;
use crate::error::TaskError;
use crate::events::EventQueue;
use crate::process::Exit;
use crate::vm::Vm;
pub(crate) use sandbox::SandboxConfig;

/// Exit status of a process that was lost with its VM.
const EXIT_LOST: u32 = 255;
/// Exit status of a process that SIGKILL ended.
const EXIT_KILLED: u32 = 128 + 9;
/// Time that the agent has for its part of a deletion.
const DELETE_DEADLINE: Duration = Duration::from_secs(1);
/// Process ids of execs begin above every one that Linux gives (`PID_MAX_LIMIT`), so that they are no process of the host.
const FIRST_EXEC_PID: u32 = 1 << 22;

/// A pod.
pub(crate) struct Pod {
    /// Id of the sandbox, or of the container that is alone.
    pub(crate) id: String,
    pub(crate) namespace: String,
    pub(crate) bundle: PathBuf,
    pub(crate) config: Config,
    pub(crate) events: EventQueue,
    pub(crate) shutdown: Notify,
    vm: OnceLock<Arc<Vm>>,
    /// How and when the VM ended.
    ended: channel::Sender<Option<(Exit, String)>>,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// Volumes in the guest: where, and in whose share.
    volumes: Mutex<HashMap<Volume, GuestVolume>>,
    /// Of volumes in the guest's memory.
    memory_volumes: VolumeNames,
    /// Of volumes that are copied into the guest.
    copied_volumes: VolumeNames,
    /// Of sockets of the host.
    socket_volumes: VolumeNames,
    /// Names of those that are connected.
    served_sockets: Mutex<HashSet<String>>,
    settings: Mutex<Settings>,
    next_share: AtomicU32,
    next_exec_pid: AtomicU32,
}

/// A volume that the guest has.
#[derive(Clone, Debug)]
struct GuestVolume {
    path: PathBuf,
    tag: String,
}

/// What the pod's sandbox sets for its containers.
#[derive(Clone, Debug, Default)]
struct Settings {
    sysctls: HashMap<String, String>,
    /// Through the Sandbox API, when there is one.
    sandbox: Option<SandboxConfig>,
}

impl Pod {
    /// A pod without a VM.
    pub(crate) fn new(id: String, namespace: String, bundle: PathBuf, config: Config) -> Self {
        let events = EventQueue::new(&namespace);
        Self {
            id,
            namespace,
            bundle,
            config,
            events,
            shutdown: Notify::new(),
            vm: OnceLock::new(),
            ended: channel::Sender::new(None),
            containers: Mutex::default(),
            volumes: Mutex::default(),
            memory_volumes: VolumeNames::new('m'),
            copied_volumes: VolumeNames::new('c'),
            socket_volumes: VolumeNames::new('s'),
            served_sockets: Mutex::default(),
            settings: Mutex::default(),
            next_share: AtomicU32::new(0),
            next_exec_pid: AtomicU32::new(FIRST_EXEC_PID),
        }
    }

    /// A container by its id.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| TaskError::NotFound { what: "container", id: id.to_owned() })
    }

    /// The VM, while it lives.
    pub(crate) fn vm(&self) -> Result<Arc<Vm>, TaskError> {
        let gone = |state: String| TaskError::NoVm { id: self.id.clone(), state };
        if let Some((_, reason)) = &*self.ended.borrow() {
            return Err(gone(format!("has ended: {reason}")));
        }
        self.vm.get().cloned().ok_or_else(|| gone("is not there yet".to_owned()))
    }

    /// The VM, also after its end.
    pub(crate) fn any_vm(&self) -> Option<Arc<Vm>> {
        self.vm.get().cloned()
    }

    /// Stops the VM and waits until everybody knows.
    pub(crate) async fn stop_vm(&self) {
        let Some(vm) = self.vm.get() else { return };
        vm.stop().await;
        self.vm_ended().await;
    }

    /// Waits for the end of the VM; when there was none, for ever.
    pub(crate) async fn vm_ended(&self) -> Exit {
        let mut ended = self.ended.subscribe();
        let found = ended.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone());
        // The sender is ours, so the wait cannot fail.
        found.map_or_else(|| Exit::now(EXIT_LOST), |(exit, _)| exit)
    }

    /// How the VM ended, if it has.
    pub(crate) fn vm_end(&self) -> Option<(Exit, String)> {
        self.ended.borrow().clone()
    }

    /// Ends the server, unless it is still needed.
    pub(crate) fn shut_down_if_unused(&self) {
        if self.containers().is_empty() && !self.is_sandbox() {
            self.shutdown.notify_one();
        }
    }

    fn new_exec_pid(&self) -> u32 {
        self.next_exec_pid.fetch_add(1, Ordering::Relaxed)
    }

    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_containers(&self) -> Vec<Arc<Container>> {
        self.containers().values().cloned().collect()
    }

    fn volumes(&self) -> MutexGuard<'_, HashMap<Volume, GuestVolume>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn served_sockets(&self) -> MutexGuard<'_, HashSet<String>> {
        self.served_sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
