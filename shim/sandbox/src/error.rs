//! What can go wrong between the host and a sandbox, sorted by who has to act.

use std::io;
use std::path::PathBuf;

use thiserror::Error;
use vmm_api::control::Exit;

use crate::network::NetworkError;

/// Why a sandbox did not come up. Nothing of it is left.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file that a sandbox is made from is missing.
    #[error("{what} was not found at {}: build it with `make`, or point {variable} at it", path.display())]
    MissingArtifact {
        /// What the file is.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// Environment variable that names another place.
        variable: &'static str,
    },
    /// A file could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// KVM is not usable.
    #[error("cannot open /dev/kvm: {remedy}")]
    Kvm {
        /// What to do.
        remedy: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A shared directory could not be prepared.
    #[error("cannot share {}", path.display())]
    Share {
        /// The host path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM process could not be started.
    #[error("cannot start {}", path.display())]
    Spawn {
        /// The VMM binary.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The host refused something that the start needs.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The VM ended before its agent was ready.
    #[error("the VM ended {elapsed_ms} ms after its start, before the agent was ready: {}{}", exit.reason, console(exit))]
    Ended {
        /// How.
        exit: Box<Exit>,
        /// Time since the spawn.
        elapsed_ms: u128,
    },
    /// The agent did not dial in.
    #[error(
        "the agent was not ready {deadline_ms} ms after the start of the VM; see the guest's console with --console"
    )]
    AgentSilent {
        /// The deadline that passed.
        deadline_ms: u128,
    },
    /// The agent refused its configuration.
    #[error("the agent could not set up the guest")]
    Configure(#[source] CallError),
}

fn console(exit: &Exit) -> String {
    if exit.console_tail.is_empty() {
        return String::new();
    }
    format!("\nlast lines of the guest's console:\n{}", exit.console_tail)
}

/// Why a call to the agent failed.
#[derive(Debug, Error)]
pub enum CallError {
    /// The agent answered with an error.
    #[error("{message}")]
    Refused {
        /// gRPC status code.
        code: i32,
        /// The agent's words, with control characters replaced.
        message: String,
    },
    /// The agent did not answer in time.
    #[error("the agent did not answer `{call}` within {deadline_ms} ms")]
    Deadline {
        /// The call.
        call: &'static str,
        /// The deadline that passed.
        deadline_ms: u128,
    },
    /// The connection to the agent is gone.
    #[error("the connection to the agent broke during `{call}`: {detail}")]
    Broken {
        /// The call.
        call: &'static str,
        /// What the transport said.
        detail: String,
    },
    /// The VM ended before the answer.
    #[error("the VM ended during `{call}`: {}{}", exit.reason, console(exit))]
    VmEnded {
        /// The call.
        call: &'static str,
        /// How.
        exit: Box<Exit>,
    },
    /// A request could not be encoded.
    #[error("cannot encode the request")]
    Encode(#[source] serde_json::Error),
    /// The agent did not open a stream that it was asked for.
    #[error("the agent did not connect {stream} within {deadline_ms} ms")]
    StreamMissing {
        /// Which.
        stream: &'static str,
        /// The deadline that passed.
        deadline_ms: u64,
    },
}

/// Why a request to the VM itself failed.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The VMM answered with an error.
    #[error("{message}")]
    Refused {
        /// The VMM's words.
        message: String,
    },
    /// The VMM did not answer in time.
    #[error("the VMM did not answer within {deadline_ms} ms")]
    Deadline {
        /// The deadline that passed.
        deadline_ms: u128,
    },
    /// The VMM is gone.
    #[error("the VMM is gone")]
    Gone(#[source] io::Error),
    /// The guest did not take its part.
    #[error("the guest did not follow")]
    Agent(#[source] CallError),
}

/// Why the guest does not have the network that its namespace has.
#[derive(Debug, Error)]
pub enum RescanError {
    /// The namespace cannot be read, or an interface of it cannot be joined.
    #[error("cannot use the network namespace")]
    Network(#[from] NetworkError),
    /// The VM or its guest does not take a part of it.
    #[error("the VM does not take its network")]
    Control(#[from] ControlError),
}
