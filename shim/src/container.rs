//! One container of the pod: its processes, and what it was made from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sandbox::ProcessId;
use sandbox::plan::{ShareTags, Volume, VolumeShare};
use tokio::sync::watch;

use crate::cri::Role;
use crate::error::TaskError;
use crate::hooks::Hooks;
use crate::process::Process;
use crate::translate::CreateContainer;

/// A container.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) role: Role,
    pub(crate) init: Arc<Process>,
    pub(crate) tags: ShareTags,
    pub(crate) hooks: Hooks,
    /// Whoever asked for it does not want it any more, while it is being created; then whether it is gone.
    abandoned: watch::Sender<bool>,
    gone: watch::Sender<bool>,
    execs: Mutex<BTreeMap<String, Arc<Process>>>,
    paused: AtomicBool,
    /// Volumes that it uses, of its own share or of another container's.
    volumes: Mutex<Vec<Volume>>,
}

impl Container {
    /// One that is being created.
    pub(crate) fn new(request: &CreateContainer, tags: ShareTags) -> Self {
        Self {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            role: request.role,
            init: Arc::new(Process::new(ProcessId::init(&request.id), request.stdio.clone(), None)),
            tags,
            hooks: request.hooks.clone(),
            abandoned: watch::Sender::new(false),
            gone: watch::Sender::new(false),
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            volumes: Mutex::default(),
        }
    }

    /// A process by its exec id; the init has the empty one.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let found = self.execs().get(exec_id).cloned();
        found.ok_or_else(|| TaskError::NotFound { what: "exec", id: exec_id.to_owned() })
    }

    /// Gives up its creation and waits until nothing of it is left.
    pub(crate) async fn abandon(&self) {
        let mut gone = self.gone.subscribe();
        self.abandoned.send_replace(true);
        // The sender is ours.
        let _ = gone.wait_for(|gone| *gone).await;
    }

    /// Waits until its creation is given up.
    pub(crate) async fn abandoned(&self) {
        let _ = self.abandoned.subscribe().wait_for(|abandoned| *abandoned).await;
    }

    /// Nothing of it is left.
    pub(crate) fn set_gone(&self) {
        self.gone.send_replace(true);
    }

    /// Every exec that is not deleted.
    pub(crate) fn all_execs(&self) -> Vec<Arc<Process>> {
        self.execs().values().cloned().collect()
    }

    /// Adds an exec whose id is free.
    pub(crate) fn add_exec(&self, process: Process) -> Result<Arc<Process>, TaskError> {
        let mut execs = self.execs();
        let exec_id = process.id.exec_id.clone();
        if execs.contains_key(&exec_id) {
            return Err(TaskError::Exists { what: "exec", id: exec_id });
        }
        let process = Arc::new(process);
        execs.insert(exec_id, process.clone());
        Ok(process)
    }

    /// Forgets an exec; whether it was there.
    pub(crate) fn remove_exec(&self, exec_id: &str) -> bool {
        self.execs().remove(exec_id).is_some()
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// What it uses, so that nobody takes it away.
    pub(crate) fn set_volumes(&self, volumes: Vec<Volume>) {
        *self.volumes() = volumes;
    }

    /// Whether it uses a volume.
    pub(crate) fn uses(&self, volume: &Volume) -> bool {
        self.volumes().contains(volume)
    }

    /// Tags of the shares that it has brought, or would have: a volume may have been there already.
    pub(crate) fn share_tags(&self) -> Vec<String> {
        let shares: BTreeSet<VolumeShare> = self.volumes().iter().map(Volume::share).collect();
        let of_volumes = shares.into_iter().map(|share| self.tags.of_volumes(share));
        [self.tags.rootfs.clone()].into_iter().chain(of_volumes).collect()
    }

    fn volumes(&self) -> MutexGuard<'_, Vec<Volume>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
