//! Files that are copied into and out of a container: a step that enters it, and a stream that carries a tar archive.

use std::os::fd::{AsFd as _, OwnedFd};

use agent_api::message::{CopyRequest, PathKind, PathRequest, PathStat, Status};

use crate::container::{ContainerError, Containers};
use crate::{step, streams};

impl Containers {
    pub(crate) async fn stat_path(&self, request: &PathRequest) -> Result<PathStat, ContainerError> {
        let pid = self.init_to_enter(&request.container_id)?;
        let kind = step::run(self.reaper(), &["stat-path", &pid, &request.path], Vec::new()).await?;
        let kind = match kind.as_str() {
            "folder" => PathKind::PATH_KIND_FOLDER,
            "file" => PathKind::PATH_KIND_FILE,
            _ => PathKind::PATH_KIND_NONE,
        };
        Ok(PathStat { kind: kind.into(), ..Default::default() })
    }

    pub(crate) async fn copy_out(&self, request: &CopyRequest) -> Result<(), ContainerError> {
        let pid = self.init_to_enter(&request.container_id)?;
        let stream = dial(request).await?;
        step::run(self.reaper(), &["copy-out", &pid, &request.path, &request.name], vec![stream]).await.map(drop)
    }

    pub(crate) async fn copy_in(&self, request: &CopyRequest) -> Result<(), ContainerError> {
        let pid = self.init_to_enter(&request.container_id)?;
        let stream = dial(request).await?;
        step::run(self.reaper(), &["copy-in", &pid, &request.path], vec![stream]).await.map(drop)
    }

    /// The process whose root the step enters.
    fn init_to_enter(&self, container_id: &str) -> Result<String, ContainerError> {
        self.require(
            container_id,
            "copy files of",
            &[Status::STATUS_CREATED, Status::STATUS_RUNNING, Status::STATUS_PAUSED],
        )?;
        Ok(self.state(container_id, "")?.pid.to_string())
    }
}

/// The stream as a descriptor that blocks, for the step alone.
async fn dial(request: &CopyRequest) -> Result<OwnedFd, ContainerError> {
    let failed = ContainerError::io("dial a stream");
    let Some(stream) = streams::dial(request.stream).await.map_err(&failed)? else {
        return Err(ContainerError::Invalid("a copy needs a stream".to_owned()));
    };
    let stream = stream.as_fd().try_clone_to_owned().map_err(&failed)?;
    rustix::io::ioctl_fionbio(&stream, false).map_err(|error| failed(error.into()))?;
    Ok(stream)
}
