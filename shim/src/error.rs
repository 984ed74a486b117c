//! Why a request of containerd fails, and the gRPC status that says so.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use sandbox::cgroup::CgroupError;
use sandbox::io_limit::DiskError;
use sandbox::network::NetworkError;
use sandbox::plan::PlanError;
use sandbox::{BootError, CallError, ControlError, RescanError};
use thiserror::Error;
use ttrpc::Code;

use crate::hooks::HookError;

/// Why a request fails.
#[derive(Debug, Error)]
pub(crate) enum TaskError {
    /// No such container, process or sandbox.
    #[error("{what} {id:?}: not found")]
    NotFound { what: &'static str, id: String },
    /// The process has exited, so there is nothing to signal.
    #[error("process already finished")]
    Finished,
    /// The name is taken.
    #[error("{what} {id:?}: already exists")]
    Exists { what: &'static str, id: String },
    /// The wrong state for it.
    #[error("cannot {action} {id:?}: it is {state}")]
    State { action: &'static str, id: String, state: &'static str },
    /// A malformed request.
    #[error("{0}")]
    Invalid(String),
    /// What we do not do.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// Programs of the host that nobody allowed.
    #[error(
        "the spec has hooks, which run on the host: to allow them, set `allowed = true` below `[hooks]` in the configuration of vmrun"
    )]
    HooksForbidden,
    /// A hook failed.
    #[error("the hook {} failed", path.display())]
    Hook { path: PathBuf, source: HookError },
    /// The VM is not there, or no longer.
    #[error("the VM of {id:?} {state}")]
    NoVm { id: String, state: String },
    /// The host refused something.
    #[error("cannot {action}")]
    Host { action: String, source: io::Error },
    /// A size or a mount that cannot be.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The VM cannot be joined to its network.
    #[error("cannot use the network namespace")]
    Network(#[from] NetworkError),
    /// What is to be limited is no disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The host cannot limit the VM's I/O.
    #[error("cannot limit the I/O of the VM")]
    Cgroup(#[from] CgroupError),
    /// The VM did not come up.
    #[error("cannot start the VM")]
    Boot(#[from] BootError),
    /// The agent refused or did not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The VMM refused or did not answer.
    #[error("cannot change the VM")]
    Control(#[from] ControlError),
}

impl TaskError {
    /// For errors of the host.
    pub(crate) fn host(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Host { action, source }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } | Self::Finished => Code::NOT_FOUND,
            Self::Exists { .. } => Code::ALREADY_EXISTS,
            Self::State { .. } => Code::FAILED_PRECONDITION,
            Self::Invalid(_) | Self::Plan(_) | Self::Disk(_) => Code::INVALID_ARGUMENT,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::HooksForbidden => Code::PERMISSION_DENIED,
            Self::NoVm { .. } => Code::UNAVAILABLE,
            Self::Call(CallError::Refused { code, .. }) => agent_code(*code),
            Self::Call(CallError::Deadline { .. }) | Self::Control(ControlError::Deadline { .. }) => {
                Code::DEADLINE_EXCEEDED
            }
            Self::Call(_) | Self::Control(_) => Code::UNAVAILABLE,
            Self::Network(NetworkError::Busy { .. }) => Code::FAILED_PRECONDITION,
            Self::Network(
                NetworkError::OpenNamespace { .. }
                | NetworkError::NotANamespace { .. }
                | NetworkError::HostNetwork { .. },
            ) => Code::INVALID_ARGUMENT,
            Self::Host { .. } | Self::Hook { .. } | Self::Boot(_) | Self::Network(_) | Self::Cgroup(_) => {
                Code::INTERNAL
            }
        }
    }
}

impl From<RescanError> for TaskError {
    fn from(error: RescanError) -> Self {
        match error {
            RescanError::Network(error) => Self::Network(error),
            RescanError::Control(error) => Self::Control(error),
        }
    }
}

/// The agent's codes are gRPC's; only those of its protocol are passed on.
fn agent_code(code: i32) -> Code {
    let known =
        [Code::NOT_FOUND, Code::ALREADY_EXISTS, Code::FAILED_PRECONDITION, Code::INVALID_ARGUMENT, Code::UNIMPLEMENTED];
    known.into_iter().find(|known| *known as i32 == code).unwrap_or(Code::INTERNAL)
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            // A transparent variant has said its cause already.
            let cause_text = cause.to_string();
            if !text.ends_with(&cause_text) {
                // Writing to a string cannot fail.
                let _ = write!(text, ": {cause_text}");
            }
            source = cause.source();
        }
        Self::RpcStatus(ttrpc::get_status(error.code(), text))
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use sandbox::CallError;
    use ttrpc::Code;

    use super::TaskError;

    fn status(error: TaskError) -> (Code, String) {
        match error.into() {
            ttrpc::Error::RpcStatus(status) => (status.code.enum_value_or_default(), status.message),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn each_failure_has_the_status_that_containerd_looks_for() {
        let unknown = TaskError::NotFound { what: "container", id: "a".to_owned() };
        assert_eq!(status(unknown), (Code::NOT_FOUND, "container \"a\": not found".to_owned()));
        assert_eq!(status(TaskError::Finished), (Code::NOT_FOUND, "process already finished".to_owned()));
        assert_eq!(status(TaskError::Unsupported("checkpoint")).0, Code::UNIMPLEMENTED);
    }

    #[test]
    fn the_whole_chain_is_told_once() {
        let error = TaskError::Host { action: "open the fifo".to_owned(), source: io::ErrorKind::NotFound.into() };
        assert_eq!(status(error), (Code::INTERNAL, "cannot open the fifo: entity not found".to_owned()));
    }

    #[test]
    fn a_guest_cannot_invent_a_status() {
        let refused = |code| TaskError::Call(CallError::Refused { code, message: "no".to_owned() });
        assert_eq!(status(refused(9)), (Code::FAILED_PRECONDITION, "no".to_owned()));
        assert_eq!(status(refused(0)).0, Code::INTERNAL);
        assert_eq!(status(refused(14)).0, Code::INTERNAL);
    }
}
