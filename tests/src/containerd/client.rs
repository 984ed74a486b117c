//! containerd's own API over gRPC, for what `ctr` does not reach, and because a start of `ctr` takes seconds on an emulated host.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots::{PrepareSnapshotRequest, RemoveSnapshotRequest};
use containerd_client::services::v1::{
    CloseIoRequest, Container, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest, DeleteProcessRequest,
    DeleteTaskRequest, ExecProcessRequest, GetRequest, KillRequest, ListPidsRequest, ListTasksRequest,
    PauseTaskRequest, ResizePtyRequest, ResumeTaskRequest, StartRequest, UpdateTaskRequest, WaitRequest,
};
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, IntoRequest, Request, Response, Status};
use prost_types::Any;
use serde_json::Value;

use super::fifo::Streams;
use super::{BUSYBOX, Containerd, spec};

/// How containerd names a JSON runtime spec, and its process.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Longest wait for an answer: VMs start on an emulated host.
const DEADLINE: Duration = Duration::from_secs(180);

/// A connection to containerd; clones share it.
#[derive(Clone)]
pub struct Client {
    inner: std::sync::Arc<containerd_client::Client>,
    pub(super) namespace: String,
    /// Chain id of the layers of [`BUSYBOX`].
    pub(super) chain: String,
    pub(super) dir: PathBuf,
    /// Runtime of the containers that it makes.
    pub runtime: String,
}

impl Client {
    pub(super) async fn connect(containerd: &Containerd) -> Self {
        let inner = containerd_client::Client::from_path(containerd.socket()).await.expect("containerd listens");
        Self {
            inner: inner.into(),
            namespace: containerd.namespace(),
            chain: containerd.chain.clone(),
            dir: containerd.room.dir().to_owned(),
            runtime: Containerd::runtime(),
        }
    }

    /// Makes a container of [`BUSYBOX`] and its task, which does not run yet; `change` edits its spec.
    ///
    /// # Errors
    /// What containerd says. Nothing is left then.
    pub async fn create(&self, id: &str, args: &[&str], change: impl FnOnce(&mut Value)) -> Result<Process, Status> {
        self.create_with(id, args, Streams::make(&self.dir, id), change).await
    }

    /// As [`Self::create`] with streams of the caller's.
    ///
    /// # Errors
    /// What containerd says. Nothing is left then.
    pub async fn create_with(
        &self,
        id: &str,
        args: &[&str],
        streams: Streams,
        change: impl FnOnce(&mut Value),
    ) -> Result<Process, Status> {
        let mut spec = spec::container(&self.namespace, id, args);
        change(&mut spec);
        let mounts = self.prepare(id, spec).await?;
        let request = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: mounts,
            stdin: streams.stdin(),
            stdout: streams.stdout(),
            stderr: streams.stderr(),
            terminal: streams.is_terminal,
            ..Default::default()
        };
        let created =
            call(&self.namespace, request, |request| async { self.inner.tasks().create(request).await }).await;
        match created {
            Ok(task) => Ok(Process::new(self, id, "", streams, task.pid)),
            Err(status) => {
                self.forget(id).await?;
                Err(status)
            }
        }
    }

    /// The container's record and the snapshot that it names; in this order, for a snapshot that nothing names may be collected.
    async fn prepare(&self, id: &str, spec: Value) -> Result<Vec<containerd_client::types::Mount>, Status> {
        let container = Container {
            id: id.to_owned(),
            image: BUSYBOX.to_owned(),
            runtime: Some(Runtime { name: self.runtime.clone(), options: None }),
            spec: Some(json_any(SPEC_TYPE, &spec)),
            snapshotter: "overlayfs".to_owned(),
            snapshot_key: id.to_owned(),
            ..Default::default()
        };
        let request = CreateContainerRequest { container: Some(container) };
        call(&self.namespace, request, |request| async { self.inner.containers().create(request).await }).await?;
        let snapshot = PrepareSnapshotRequest {
            snapshotter: "overlayfs".to_owned(),
            key: id.to_owned(),
            parent: self.chain.clone(),
            ..Default::default()
        };
        let prepared =
            call(&self.namespace, snapshot, |request| async { self.inner.snapshots().prepare(request).await })
                .await?
                .mounts;
        Ok(prepared)
    }

    /// Removes the container's record and its snapshot, which has no task.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn forget(&self, id: &str) -> Result<(), Status> {
        let request = DeleteContainerRequest { id: id.to_owned() };
        call(&self.namespace, request, |request| async { self.inner.containers().delete(request).await }).await?;
        let request = RemoveSnapshotRequest { snapshotter: "overlayfs".to_owned(), key: id.to_owned() };
        match call(&self.namespace, request, |request| async { self.inner.snapshots().remove(request).await }).await {
            // What no container names may be collected at any time.
            Err(status) if status.code() == Code::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// The tasks that containerd knows.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn tasks(&self) -> Result<Vec<String>, Status> {
        let request = ListTasksRequest::default();
        let listed = call(&self.namespace, request, |request| async { self.inner.tasks().list(request).await }).await?;
        Ok(listed.tasks.into_iter().map(|task| task.id).collect())
    }

    /// The containers that it knows.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn containers(&self) -> Result<Vec<String>, Status> {
        let request = containerd_client::services::v1::ListContainersRequest::default();
        let listed =
            call(&self.namespace, request, |request| async { self.inner.containers().list(request).await }).await?;
        Ok(listed.containers.into_iter().map(|container| container.id).collect())
    }

    /// Runs a container to its end and removes it; returns its exit status and what it wrote.
    ///
    /// # Panics
    /// When a step fails.
    pub async fn run(&self, id: &str, args: &[&str], change: impl FnOnce(&mut Value)) -> (u32, String) {
        let mut task = self.create(id, args, change).await.expect("created");
        task.start().await.expect("started");
        let exit_status = task.wait().await.expect("waited");
        let output = task.output();
        task.remove().await.expect("removed");
        (exit_status, output)
    }

    pub(super) fn events(&self) -> EventsClient<Channel> {
        self.inner.events()
    }

    pub(super) fn namespaces(&self) -> NamespacesClient<Channel> {
        self.inner.namespaces()
    }
}

/// A container's first process, or one that was executed in it.
pub struct Process {
    client: Client,
    id: String,
    exec_id: String,
    streams: Streams,
    /// What containerd calls its process id.
    pub pid: u32,
}

impl Process {
    fn new(client: &Client, id: &str, exec_id: &str, streams: Streams, pid: u32) -> Self {
        Self { client: client.clone(), id: id.to_owned(), exec_id: exec_id.to_owned(), streams, pid }
    }

    /// A process of a container that another connection made.
    #[must_use]
    pub fn of(client: &Client, id: &str) -> Self {
        Self::new(client, id, "", Streams::none(), 0)
    }

    /// Starts it.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn start(&mut self) -> Result<(), Status> {
        let request = StartRequest { container_id: self.id.clone(), exec_id: self.exec_id.clone() };
        let started =
            call(&self.client.namespace, request, |request| async { self.client.inner.tasks().start(request).await })
                .await?;
        self.pid = started.pid;
        Ok(())
    }

    /// Waits for its end; returns its exit status.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn wait(&self) -> Result<u32, Status> {
        let request = WaitRequest { container_id: self.id.clone(), exec_id: self.exec_id.clone() };
        Ok(call(&self.client.namespace, request, |request| async { self.client.inner.tasks().wait(request).await })
            .await?
            .exit_status)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn kill(&self, signal: u32) -> Result<(), Status> {
        let (container_id, exec_id) = (self.id.clone(), self.exec_id.clone());
        let request = KillRequest { container_id, exec_id, signal, all: false };
        call(&self.client.namespace, request, |request| async { self.client.inner.tasks().kill(request).await }).await
    }

    /// Deletes it once it has ended; returns its exit status.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn delete(&self) -> Result<u32, Status> {
        let (container_id, exec_id) = (self.id.clone(), self.exec_id.clone());
        let deleted = if exec_id.is_empty() {
            let request = DeleteTaskRequest { container_id };
            call(&self.client.namespace, request, |request| async { self.client.inner.tasks().delete(request).await })
                .await?
        } else {
            let request = DeleteProcessRequest { container_id, exec_id };
            call(&self.client.namespace, request, |request| async {
                self.client.inner.tasks().delete_process(request).await
            })
            .await?
        };
        Ok(deleted.exit_status)
    }

    /// Deletes the ended task and its container; returns the exit status.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn remove(self) -> Result<u32, Status> {
        let exit_status = self.delete().await?;
        self.client.forget(&self.id).await?;
        self.streams.remove();
        Ok(exit_status)
    }

    /// Kills the container with SIGKILL and removes it; returns its exit status.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn kill_and_remove(self) -> Result<u32, Status> {
        self.kill(9).await?;
        self.wait().await?;
        self.remove().await
    }

    /// Adds a process to the container, not yet started.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn exec(&self, exec_id: &str, args: &[&str]) -> Result<Self, Status> {
        self.exec_with(exec_id, spec::process(args), Streams::make(&self.client.dir, exec_id)).await
    }

    /// As [`Self::exec`] with a process and streams of the caller's.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn exec_with(&self, exec_id: &str, process: Value, streams: Streams) -> Result<Self, Status> {
        let request = ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            stdin: streams.stdin(),
            stdout: streams.stdout(),
            stderr: streams.stderr(),
            terminal: streams.is_terminal,
            spec: Some(json_any(PROCESS_TYPE, &process)),
        };
        call(&self.client.namespace, request, |request| async { self.client.inner.tasks().exec(request).await })
            .await?;
        Ok(Self::new(&self.client, &self.id, exec_id, streams, 0))
    }

    /// Runs a command in the container; returns its exit status and what it wrote.
    ///
    /// # Panics
    /// When a step fails.
    pub async fn run(&self, exec_id: &str, args: &[&str]) -> (u32, String) {
        let mut process = self.exec(exec_id, args).await.expect("added");
        process.start().await.expect("started");
        let exit_status = process.wait().await.expect("waited");
        let output = process.output();
        assert_eq!(process.delete().await.expect("deleted"), exit_status);
        process.streams.remove();
        (exit_status, output)
    }

    /// What it wrote, to the end of both streams: first the standard output, then the standard error.
    ///
    /// # Panics
    /// When the streams do not end in time.
    #[must_use]
    pub fn output(&mut self) -> String {
        self.streams.output()
    }

    /// Its status, as `RUNNING`.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn status(&self) -> Result<String, Status> {
        let request = GetRequest { container_id: self.id.clone(), exec_id: self.exec_id.clone() };
        let got =
            call(&self.client.namespace, request, |request| async { self.client.inner.tasks().get(request).await })
                .await?;
        let status = got.process.map(|process| process.status()).unwrap_or_default();
        Ok(status.as_str_name().to_owned())
    }

    /// Stops all processes of the container.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn pause(&self) -> Result<(), Status> {
        let request = PauseTaskRequest { container_id: self.id.clone() };
        call(&self.client.namespace, request, |request| async { self.client.inner.tasks().pause(request).await }).await
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn resume(&self) -> Result<(), Status> {
        let request = ResumeTaskRequest { container_id: self.id.clone() };
        call(&self.client.namespace, request, |request| async { self.client.inner.tasks().resume(request).await }).await
    }

    /// Changes the size of its terminal.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn resize(&self, width: u32, height: u32) -> Result<(), Status> {
        let (container_id, exec_id) = (self.id.clone(), self.exec_id.clone());
        let request = ResizePtyRequest { container_id, exec_id, width, height };
        call(&self.client.namespace, request, |request| async { self.client.inner.tasks().resize_pty(request).await })
            .await
    }

    /// Says that nothing more will come on its standard input.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn close_stdin(&self) -> Result<(), Status> {
        let (container_id, exec_id) = (self.id.clone(), self.exec_id.clone());
        let request = CloseIoRequest { container_id, exec_id, stdin: true };
        call(&self.client.namespace, request, |request| async { self.client.inner.tasks().close_io(request).await })
            .await
    }

    /// Changes its limits, a `LinuxResources`.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn update(&self, resources: &Value) -> Result<(), Status> {
        let request = UpdateTaskRequest {
            container_id: self.id.clone(),
            resources: Some(json_any(RESOURCES_TYPE, resources)),
            ..Default::default()
        };
        call(&self.client.namespace, request, |request| async { self.client.inner.tasks().update(request).await }).await
    }

    /// The process ids of the container.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn pids(&self) -> Result<Vec<u32>, Status> {
        let request = ListPidsRequest { container_id: self.id.clone() };
        let listed = call(&self.client.namespace, request, |request| async {
            self.client.inner.tasks().list_pids(request).await
        })
        .await?;
        Ok(listed.processes.into_iter().map(|process| process.pid).collect())
    }
}

/// Adds the namespace and a deadline to a request.
async fn call<T, R, F>(namespace: &str, message: T, send: impl FnOnce(Request<T>) -> F) -> Result<R, Status>
where
    F: Future<Output = Result<Response<R>, Status>>,
{
    let mut request = message.into_request();
    request.metadata_mut().insert("containerd-namespace", namespace.parse().expect("ASCII"));
    request.set_timeout(DEADLINE);
    send(request).await.map(Response::into_inner)
}

fn json_any(type_url: &str, value: &Value) -> Any {
    Any { type_url: type_url.to_owned(), value: value.to_string().into_bytes() }
}
