//! Why a request about a container failed. `server.rs` gives each variant its gRPC status.

use std::io;

use thiserror::Error;

use crate::id::InvalidId;

/// Why a request about a container failed.
#[derive(Debug, Error)]
pub(crate) enum ContainerError {
    #[error(transparent)]
    Id(#[from] InvalidId),
    #[error("{what} {id} exists already")]
    Exists { what: &'static str, id: String },
    #[error("no such {what}: {id}")]
    NotFound { what: &'static str, id: String },
    #[error("the process has exited")]
    Exited,
    #[error("cannot {action} container {id}: it is {status}")]
    State { action: &'static str, id: String, status: &'static str },
    #[error("exec {0} still runs")]
    ExecRuns(String),
    #[error("{0} is not supported in a guest")]
    Unsupported(String),
    #[error("{0}")]
    Invalid(String),
    #[error("not valid OCI JSON")]
    Json(#[from] serde_json::Error),
    /// The child's own words.
    #[error("{0}")]
    Child(String),
    #[error("cannot {action}")]
    Io { action: &'static str, source: io::Error },
}

impl ContainerError {
    /// Makes the error of an action from that of the kernel.
    pub(crate) fn io(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}
