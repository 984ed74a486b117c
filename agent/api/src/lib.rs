//! The protocol between the host and the agent in the guest: `proto/agent.proto` compiled, and its constants.
//!
//! Ports and paths that both sides must agree on stand here and nowhere else.

#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub mod cgroup;

pub use generated::agent as message;
pub use generated::agent_ttrpc as service;

/// Host port that the agent dials once, when it is ready; it then serves the protocol on that connection.
pub const CONTROL_PORT: u32 = 1024;

/// Host port that the agent dials for each byte stream; the first 8 bytes are the stream id, little-endian.
pub const STREAM_PORT: u32 = 1025;

/// Context id of the host (VIRTIO 1.2, 5.10.4).
pub const HOST_CID: u32 = 2;

/// Folder of the guest in which the virtio-fs shares are mounted, each under its tag.
pub const SHARE_DIR: &str = "/run/share";

/// File of the guest that is the init of a container when it is mounted there and run with `init COMMAND`.
pub const INIT_PATH: &str = "/run/agent/init";

/// File of the guest that containers mount as `/etc/hosts`.
pub const HOSTS_PATH: &str = "/run/agent/hosts";

/// File of the guest that containers mount as `/etc/resolv.conf`.
pub const RESOLV_CONF_PATH: &str = "/run/agent/resolv.conf";
