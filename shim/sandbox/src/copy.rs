//! Files that go into and out of a container as a tar archive.

use agent_api::message::{CopyRequest, PathKind};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use crate::{CallError, Sandbox};

/// A copy that runs: its stream carries the archive, and the agent answers when it is through.
pub struct Copying {
    /// Read or write the archive here; shutting down the writing side is its end.
    pub stream: UnixStream,
    done: JoinHandle<Result<(), CallError>>,
}

impl Copying {
    /// Waits for the agent's answer.
    ///
    /// # Errors
    /// What the agent says, or that it no longer answers.
    pub async fn done(self) -> Result<(), CallError> {
        drop(self.stream);
        joined(self.done.await)
    }
}

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
    pub async fn copy_out(&self, container_id: &str, path: &str, name: &str) -> Result<Copying, CallError> {
        self.copy(container_id, path, name, false).await
    }

    /// Begins to unpack an archive into a folder of the container.
    ///
    /// # Errors
    /// As [`Self::stat_path`].
    pub async fn copy_in(&self, container_id: &str, path: &str) -> Result<Copying, CallError> {
        self.copy(container_id, path, "", true).await
    }

    async fn copy(&self, container_id: &str, path: &str, name: &str, inwards: bool) -> Result<Copying, CallError> {
        let mut expected = self.streams.expect_one();
        let request = CopyRequest {
            container_id: container_id.to_owned(),
            path: path.to_owned(),
            name: name.to_owned(),
            stream: expected.id(),
            ..Default::default()
        };
        let agent = self.agent.clone();
        let mut done = tokio::spawn(async move { agent.copy(inwards, &request).await });
        tokio::select! {
            biased;
            Some(stream) = expected.connected() => Ok(Copying { stream, done }),
            answer = &mut done => {
                joined(answer)?;
                Err(CallError::StreamMissing { stream: "the archive", deadline_ms: 0 })
            }
        }
    }
}

fn joined(answer: Result<Result<(), CallError>, tokio::task::JoinError>) -> Result<(), CallError> {
    let lost = |error: tokio::task::JoinError| CallError::Broken { call: "Copy", detail: error.to_string() };
    answer.unwrap_or_else(|error| Err(lost(error)))
}
