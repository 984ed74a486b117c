//! Files that go into and out of a container as a tar archive.

use agent_api::message::{CopyRequest, PathKind};

use crate::stream_call::StreamCall;
use crate::{CallError, Sandbox};

impl Sandbox {
    /// What is at a path of a running container.
    ///
    /// # Errors
    /// What the agent says, or that it no longer answers.
    pub async fn stat_path(&self, container_id: &str, path: &str) -> Result<PathKind, CallError> {
        self.agent.stat_path(container_id, path).await
    }

    /// Begins to read a path as an archive in which it is called `name`; `.` stands for the contents of a folder.
    ///
    /// # Errors
    /// As [`Self::stat_path`].
    pub async fn copy_out(&self, container_id: &str, path: &str, name: &str) -> Result<StreamCall, CallError> {
        self.copy("CopyOut", container_id, path, name).await
    }

    /// Begins to unpack an archive into a folder of the container.
    ///
    /// # Errors
    /// As [`Self::stat_path`].
    pub async fn copy_in(&self, container_id: &str, path: &str) -> Result<StreamCall, CallError> {
        self.copy("CopyIn", container_id, path, "").await
    }

    async fn copy(
        &self,
        call: &'static str,
        container_id: &str,
        path: &str,
        name: &str,
    ) -> Result<StreamCall, CallError> {
        let mut request = CopyRequest {
            container_id: container_id.to_owned(),
            path: path.to_owned(),
            name: name.to_owned(),
            ..Default::default()
        };
        self.stream_call(call, |agent, stream| async move {
            request.stream = stream;
            if call == "CopyIn" { agent.copy_in(&request).await } else { agent.copy_out(&request).await }
        })
        .await
    }
}
