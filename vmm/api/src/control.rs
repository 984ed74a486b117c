//! Control of a running VM: one JSON object per line, each way, over the connected stream socket of `VmConfig::control`.
//! A request that needs a descriptor carries it by `SCM_RIGHTS` with its first byte (see [`crate::fds`]).
//!
//! A request is answered by one [`Reply`]. The VMM also sends [`Message::Exited`] on its own, as its last line, when the VM
//! ended; after that it closes the socket and its process ends with [`ExitReason::code`].

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::CachePolicy;
use crate::net::{NetDevice, NetStats};

/// Longest request, in bytes, with the end of its line.
pub const MAX_REQUEST_LEN: usize = 4096;

/// What a caller can ask of a VM.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// State of the VM.
    State,
    /// Stop every vCPU until [`Request::Resume`].
    Pause,
    /// Let paused vCPUs run again.
    Resume,
    /// End the VM at once.
    Shutdown,
    /// Counters of the VMM.
    Stats,
    /// Plug a shared directory in: the directory's descriptor comes with the request, the device appears on the guest's
    /// PCI bus, and the guest looks for it when it is told to.
    AddShare {
        /// Mount tag, as in [`crate::ShareConfig`].
        tag: String,
        /// How long the guest may trust what it cached.
        cache: CachePolicy,
        /// Refuse whatever writes, as in [`crate::ShareConfig`].
        #[serde(default)]
        read_only: bool,
    },
    /// Pull a shared directory out. The guest should have unmounted it.
    RemoveShare {
        /// Its mount tag.
        tag: String,
    },
    /// Plug a network interface in: its descriptors come with the request, see [`crate::net::Backend`].
    AddNetwork {
        /// The interface.
        device: NetDevice,
    },
    /// Pull a network interface out.
    RemoveNetwork {
        /// Its name.
        name: String,
    },
    /// Give the guest a carrier, or take it away: frames are dropped in both directions then.
    SetLink {
        /// The interface.
        name: String,
        /// Whether there is a carrier.
        up: bool,
    },
    /// Counters of the network interfaces.
    NetStats,
    /// Take back what the guest says is free: a balloon appears on its PCI bus, and it looks for that when it is told to.
    ReportFreePages,
}

/// What the VMM writes to the control socket.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// The answer to a request; answers come in the order of the requests.
    Reply(Reply),
    /// The VM has ended.
    Exited(Exit),
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Done.
    Done,
    /// Answer to [`Request::State`].
    State(State),
    /// Answer to [`Request::Stats`].
    Stats(Stats),
    /// Answer to [`Request::NetStats`].
    NetStats(Vec<NetStats>),
    /// Refused; the text says why.
    Refused(String),
}

/// State of a VM.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// vCPUs run.
    Running,
    /// vCPUs are stopped.
    Paused,
}

/// Counters since the VM was started.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Stats {
    /// Exits from `KVM_RUN` to the VMM that read or wrote a port.
    pub port_exits: u64,
    /// Exits from `KVM_RUN` to the VMM that read or wrote MMIO.
    pub mmio_exits: u64,
    /// Returns of `KVM_RUN` because a signal asked for it, as a pause does.
    pub interrupted_exits: u64,
    /// Every other return of `KVM_RUN`.
    pub other_exits: u64,
    /// Accesses to ports or addresses where no device is.
    pub unclaimed_accesses: u64,
}

/// How and why a VM ended.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Exit {
    /// Why.
    pub reason: ExitReason,
    /// The last lines that the guest wrote to its serial console.
    pub console_tail: String,
}

/// Why a VM ended.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "why", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest asked for a reset or power-off, as its kernel does when it is told to and when it panics.
    GuestReset,
    /// The guest took a triple fault.
    TripleFault {
        /// What is known of the vCPU: its registers, unless the CPU has reset them, and its last access to a device.
        registers: String,
    },
    /// KVM could not run the guest on.
    KvmError {
        /// What KVM said.
        detail: String,
    },
    /// The VMM could not go on.
    VmmError {
        /// The chain of causes.
        detail: String,
    },
    /// [`Request::Shutdown`] was asked for.
    Requested,
    /// The other end of the control socket was closed.
    OwnerGone,
    /// The VMM got this signal.
    Signal {
        /// Signal number.
        signal: i32,
    },
}

impl ExitReason {
    /// Exit status of the VMM process for this reason: 0 for an end that was asked for, 128 and its number for a signal,
    /// else 1.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::GuestReset | Self::Requested | Self::OwnerGone => 0,
            Self::Signal { signal } => u8::try_from(signal.saturating_add(128)).unwrap_or(u8::MAX),
            Self::TripleFault { .. } | Self::KvmError { .. } | Self::VmmError { .. } => 1,
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestReset => f.write_str("the guest asked for a reset"),
            Self::TripleFault { registers } => write!(f, "triple fault ({registers})"),
            Self::KvmError { detail } => write!(f, "KVM error: {detail}"),
            Self::VmmError { detail } => f.write_str(detail),
            Self::Requested => f.write_str("shutdown was requested"),
            Self::OwnerGone => f.write_str("the owner of the VM is gone"),
            Self::Signal { signal } => write!(f, "signal {signal}"),
        }
    }
}
