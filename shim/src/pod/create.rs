//! Making a container: its trees, the VM if it is the first, its place in the guest.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use containerd_shim_protos::api::Mount;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use oci_spec::runtime::Spec;
use sandbox::plan::{self, ShareTags, Volume};
use sandbox::share::{self, Rootfs, Share};
use sandbox::{BootError, CachePolicy};

use super::{GuestVolume, Pod};
use crate::container::Container;
use crate::cri::{self, Limits, Role};
use crate::error::TaskError;
use crate::hooks::Moment;
use crate::translate::CreateContainer;
use crate::vm::{Place, Vm};

/// A container's spec with guest paths, and the trees that it needs.
struct Trees {
    spec: Spec,
    shares: Vec<Share>,
}

impl Pod {
    /// Makes a container whose init waits for its start; returns its process id.
    pub(crate) async fn create(
        self: &Arc<Self>,
        request: CreateContainer,
        rootfs: Vec<Mount>,
    ) -> Result<u32, TaskError> {
        if !request.hooks.is_empty() && !self.config.hooks.allowed {
            return Err(TaskError::HooksForbidden);
        }
        let container = self.reserve(&request)?;
        let making = async {
            let pid = match request.role {
                Role::Pause => self.make_pause(&request).await?,
                Role::Alone | Role::Member => self.make(&container, &request).await?,
            };
            let run = request.hooks.run(Moment::Created, Some(pid)).await;
            run.map_err(|(hook, source)| TaskError::Hook { path: hook.path().clone(), source })?;
            Ok(pid)
        };
        let made = tokio::select! {
            made = making => made,
            // A VM that boots ends with the boot.
            () = container.abandoned() => Err(TaskError::Finished),
        };
        let pid = match made {
            Ok(pid) => pid,
            Err(error) => {
                self.undo(&container).await;
                return Err(error);
            }
        };
        let io = TaskIO {
            stdin: request.stdio.stdin,
            stdout: request.stdio.stdout,
            stderr: request.stdio.stderr,
            terminal: request.stdio.terminal,
            ..Default::default()
        };
        self.events.push(&TaskCreate {
            container_id: container.id.clone(),
            bundle: container.bundle.display().to_string(),
            rootfs,
            io: Some(io).into(),
            pid,
            ..Default::default()
        });
        container.init.created(pid, &self.events);
        tracing::info!(container = container.id, "created");
        Ok(pid)
    }

    /// Takes the id.
    pub(super) fn reserve(&self, request: &CreateContainer) -> Result<Arc<Container>, TaskError> {
        let number = self.next_share.fetch_add(1, Ordering::Relaxed);
        let tags = ShareTags { rootfs: format!("r{number}"), volumes: format!("v{number}") };
        let container = Arc::new(Container::new(request, tags));
        let mut containers = self.containers();
        if containers.contains_key(&request.id) {
            return Err(TaskError::Exists { what: "container", id: request.id.clone() });
        }
        if request.role == Role::Alone && !containers.is_empty() {
            return Err(TaskError::Invalid(format!("{:?} is in no pod, and this VM has a container", request.id)));
        }
        containers.insert(request.id.clone(), container.clone());
        Ok(container)
    }

    /// What is left of a container that was not made.
    async fn undo(self: &Arc<Self>, container: &Arc<Container>) {
        self.containers().remove(&container.id);
        match container.role {
            Role::Alone | Role::Pause => self.stop_vm().await,
            // What was not made is not there.
            Role::Member => self.forget_member(container).await,
        }
        container.hooks.run_all_the_same(Moment::Deleted, None).await;
        container.set_gone();
    }

    /// The container that stands for the pod is the VM itself.
    async fn make_pause(self: &Arc<Self>, request: &CreateContainer) -> Result<u32, TaskError> {
        let annotations = request.annotations();
        let linux = request.spec.linux().clone().unwrap_or_default();
        self.settings().sysctls = linux.sysctl().clone().unwrap_or_default();
        let hostname = request.spec.hostname().clone().unwrap_or_else(|| request.id.clone());
        let size = cri::size(&self.config, Limits::of_pod(&annotations), &annotations)?;
        let place = self.place(linux.cgroups_path().as_deref(), request.netns.as_deref());
        Ok(self.boot(&hostname, size, Vec::new(), place).await?.pid())
    }

    pub(super) fn place<'a>(&'a self, cgroups_path: Option<&'a Path>, netns: Option<&'a Path>) -> Place<'a> {
        Place { bundle: &self.bundle, cgroups_path, io_limits: &[], netns }
    }

    /// Boots the pod's VM and listens to it.
    pub(super) async fn boot(
        self: &Arc<Self>,
        hostname: &str,
        size: plan::VmSize,
        shares: Vec<Share>,
        place: Place<'_>,
    ) -> Result<Arc<Vm>, TaskError> {
        let vm = Arc::new(Vm::boot(&self.config, hostname, size, shares, place).await?);
        if self.vm.set(vm.clone()).is_err() {
            vm.stop().await;
            return Err(TaskError::Exists { what: "VM of", id: self.id.clone() });
        }
        self.watch(vm.clone());
        if place.netns.is_some() {
            // Nobody else has one to dial in.
            let forwarded = vm.clone();
            tokio::spawn(async move { forwarded.sandbox.serve_loopback().await });
        }
        Ok(vm)
    }

    async fn make(self: &Arc<Self>, container: &Arc<Container>, request: &CreateContainer) -> Result<u32, TaskError> {
        // Of a member the VM must be there; that is known before anything is made.
        let present = if request.role == Role::Member { Some(self.vm()?) } else { None };
        let ends = request.stdio.open(&self.namespace, &container.init.id).await?;
        let mut spec = request.spec.clone();
        self.apply_sandbox(&mut spec, request.role)?;
        let sockets = self.sockets(&spec);
        let mut in_memory = sockets.clone();
        if let Some(vm) = &present {
            in_memory.extend(self.add_memory_volumes(vm, &spec).await?);
            in_memory.extend(self.add_copied_volumes(vm, &spec).await?);
        }
        let Trees { spec, shares } = self.trees(container, request, spec, in_memory).await?;
        let vm = match present {
            Some(vm) => {
                for share in shares {
                    vm.sandbox.add_share(share).await?;
                }
                vm
            }
            None => {
                let annotations = request.annotations();
                let size = cri::size(&self.config, Limits::of_container(&spec), &annotations)?;
                let cgroups_path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
                let place = self.place(cgroups_path.as_deref(), request.netns.as_deref());
                let place = Place { io_limits: &request.io_limits, ..place };
                self.boot(&request.id, size, shares, place).await?
            }
        };
        self.serve_sockets(&vm, sockets.keys()).await?;
        let wanted = request.stdio.wanted(container.init.size());
        let streams = vm.sandbox.create(&container.id, &spec, wanted).await?;
        container.init.set_copying(ends.copy(streams));
        Ok(vm.pid())
    }

    /// Mounts what the container needs, off the threads that answer requests: a file system may be slow.
    async fn trees(
        &self,
        container: &Arc<Container>,
        request: &CreateContainer,
        spec: Spec,
        in_memory: HashMap<Volume, PathBuf>,
    ) -> Result<Trees, TaskError> {
        let mut known: HashMap<Volume, PathBuf> =
            self.volumes().iter().map(|(volume, at)| (volume.clone(), at.path.clone())).collect();
        known.extend(in_memory);
        let planned = plan::plan(spec, &container.tags, &known)?;
        // Which of the known ones it uses is seen in the spec that came out.
        let sources: Vec<PathBuf> =
            planned.spec.mounts().iter().flatten().filter_map(|mount| mount.source().clone()).collect();
        let mut used: Vec<Volume> = planned.volumes.values().flatten().cloned().collect();
        used.extend(known.iter().filter(|(_, path)| sources.contains(path)).map(|(volume, _)| volume.clone()));
        container.set_volumes(used);
        let rootfs = rootfs(request);
        let (tags, scratch, volumes) = (container.tags.clone(), request.bundle.join("rootfs"), planned.volumes.clone());
        let made = tokio::task::spawn_blocking(move || -> Result<Vec<Share>, BootError> {
            std::fs::create_dir_all(&scratch).map_err(|source| BootError::Share { path: scratch.clone(), source })?;
            let root = share::rootfs_tree(rootfs, &scratch)?;
            let mut shares = vec![Share::of_tree(&tags.rootfs, root, CachePolicy::Always)];
            for (share, volumes) in volumes {
                shares.push(share::volumes_share(&tags, share, volumes, &scratch)?);
            }
            Ok(shares)
        });
        let lost = |error: tokio::task::JoinError| TaskError::Invalid(error.to_string());
        let shares = made.await.map_err(lost)??;
        let (tags, mut table) = (&container.tags, self.volumes());
        for (share, volumes) in planned.volumes {
            for (index, volume) in volumes.into_iter().enumerate() {
                let at = GuestVolume { path: tags.guest_volume(share, index), tag: tags.of_volumes(share) };
                table.entry(volume).or_insert(at);
            }
        }
        Ok(Trees { spec: planned.spec, shares })
    }
}

/// The snapshot's mounts, or the root that the bundle has already.
fn rootfs(request: &CreateContainer) -> Rootfs {
    let root = request.spec.root().clone().unwrap_or_default();
    let read_only = root.readonly().unwrap_or(false);
    if request.rootfs.is_empty() {
        return Rootfs::Directory { path: request.bundle.join(root.path()), read_only };
    }
    Rootfs::Mounts { mounts: request.rootfs.clone(), read_only }
}
