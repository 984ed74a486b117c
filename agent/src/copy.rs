//! Files that are copied into and out of a container: a step that enters it, and a stream that carries a tar archive.

use agent_api::message::{CopyRequest, PathKind, PathRequest, PathStat, Status};

use crate::container::{ContainerError, Containers};
use crate::{step, streams};

impl Containers {
    pub(crate) async fn stat_path(&self, request: &PathRequest) -> Result<PathStat, ContainerError> {
        let pid = self.init_to_enter(&request.container_id, "copy files of")?;
        let kind = step::run(self.reaper(), &["stat-path", &pid, &request.path], Vec::new()).await?;
        let kind = match kind.as_str() {
            "folder" => PathKind::PATH_KIND_FOLDER,
            "file" => PathKind::PATH_KIND_FILE,
            _ => PathKind::PATH_KIND_NONE,
        };
        Ok(PathStat { kind: kind.into(), ..Default::default() })
    }

    pub(crate) async fn copy_out(&self, request: &CopyRequest) -> Result<(), ContainerError> {
        let pid = self.init_to_enter(&request.container_id, "copy files of")?;
        let stream = streams::dial_for_step(request.stream).await.map_err(ContainerError::io("dial a stream"))?;
        step::run(self.reaper(), &["copy-out", &pid, &request.path, &request.name], vec![stream]).await.map(drop)
    }

    pub(crate) async fn copy_in(&self, request: &CopyRequest) -> Result<(), ContainerError> {
        let pid = self.init_to_enter(&request.container_id, "copy files of")?;
        let stream = streams::dial_for_step(request.stream).await.map_err(ContainerError::io("dial a stream"))?;
        step::run(self.reaper(), &["copy-in", &pid, &request.path], vec![stream]).await.map(drop)
    }

    /// The process whose root or network a step enters.
    pub(crate) fn init_to_enter(&self, container_id: &str, action: &'static str) -> Result<String, ContainerError> {
        self.require(container_id, action, &[Status::STATUS_CREATED, Status::STATUS_RUNNING, Status::STATUS_PAUSED])?;
        Ok(self.state(container_id, "")?.pid.to_string())
    }
}
