//! containerd's Task service, one method for each request: translate, ask the pod, translate back. Versions 2 and 3 differ in
//! nothing but the name, so one server has it under both.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
    StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use sandbox::ProcessId;
use ttrpc::Result;
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::error::TaskError;
use crate::pod::Pod;
use crate::translate;

const V2: &str = "containerd.task.v2.Task";
const V3: &str = "containerd.task.v3.Task";

/// The service of a pod.
pub(crate) struct TaskService(pub(crate) Arc<Pod>);

/// The service under both of its names.
pub(crate) fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let service = || create_task(Arc::new(TaskService(pod.clone())));
    let mut both = service();
    both.extend(service().remove(V3).map(|service| (V2.to_owned(), service)));
    both
}

/// Runs work to its end, also when whoever asked for it gives up: half-made containers do not exist.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = std::result::Result<T, TaskError>> + Send + 'static,
) -> Result<T> {
    let lost = |error: tokio::task::JoinError| TaskError::Invalid(error.to_string());
    Ok(tokio::spawn(work).await.map_err(lost)??)
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let (pod, begin) = (self.0.clone(), Instant::now());
        let spec = translate::read_spec(request.bundle.as_ref())?;
        let container = translate::create_container(&request, spec)?;
        let pid = to_its_end(async move { pod.create(container, request.rootfs).await }).await?;
        tracing::debug!(elapsed = ?begin.elapsed(), "create");
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let pod = self.0.clone();
        let pid = to_its_end(async move { pod.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let container = self.0.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        Ok(translate::state(&container, &process))
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let pod = self.0.clone();
        let (pid, exit) = to_its_end(async move { pod.delete(&request.id, &request.exec_id).await }).await?;
        let exited_at = translate::timestamp(exit.at);
        Ok(DeleteResponse { pid, exit_status: exit.code, exited_at, ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        Ok(PidsResponse { processes: self.0.pids(&request.id).await?, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        self.0.pause(&request.id).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        self.0.resume(&request.id).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> Result<Empty> {
        self.0.container(&request.id)?;
        Err(TaskError::Unsupported("checkpoint").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        let pod = self.0.clone();
        to_its_end(async move { pod.kill(&request.id, &request.exec_id, request.signal, request.all).await }).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let (stdio, spec) = translate::exec_process(&request)?;
        self.0.add_exec(ProcessId { container_id: request.id, exec_id: request.exec_id }, stdio, spec)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let side = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        self.0.resize(&request.id, &request.exec_id, side(request.height), side(request.width)).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        let process = self.0.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let resources = translate::resources(&request.resources)?;
        self.0.update(&request.id, resources).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let process = self.0.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.exited().await;
        let exited_at = translate::timestamp(exit.at);
        Ok(WaitResponse { exit_status: exit.code, exited_at, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        Ok(StatsResponse { stats: Some(self.0.stats(&request.id).await?).into(), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        let task_pid = self.0.container(&request.id).map_or(0, |container| container.init.pid());
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, version, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        self.0.shut_down_if_unused();
        Ok(Empty::new())
    }
}
