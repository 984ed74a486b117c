//! The network of a sandbox: what carries its frames on the host, and what the guest is told about it.
//!
//! ```text
//!   pod::attach  a network namespace that a CNI plugin wires: each interface is joined to a TAP interface
//!   user::start  no set-up on the host: `passt` turns frames into sockets of ours
//! ```
//!
//! Called by `vmrun` and by the containerd shim. Whatever it changes on the host is undone when the [`Network`] is dropped.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use thiserror::Error;
use vmm_api::net::NetDevice;

use crate::message::SetNetworkRequest;

mod counters;
mod facts;
mod ingress;
pub(crate) mod loopback;
pub mod netns;
pub mod pod;
mod redirect;
pub mod tap;
pub mod user;
mod vhost;
pub(crate) mod watch;

pub use vmm_api::net::{MacAddress, NetStats, RateLimit};

/// A network for one VM. The default is none but loopback.
#[derive(Default)]
pub struct Network {
    pub(crate) interfaces: Vec<Interface>,
    /// What the agent sets in the guest.
    pub(crate) guest: SetNetworkRequest,
    pub(crate) held: Held,
}

/// An interface of the VM with the descriptors that carry its frames.
pub(crate) struct Interface {
    pub(crate) device: NetDevice,
    pub(crate) fds: Vec<OwnedFd>,
}

/// What lives as long as the sandbox.
#[derive(Default)]
pub(crate) struct Held {
    pub(crate) pod: Option<pod::PodNetwork>,
    pub(crate) _passt: Option<user::Passt>,
    pub(crate) others: Vec<OwnedFd>,
}

impl Network {
    /// Keeps descriptors open for as long as the sandbox has this network.
    pub fn hold(&mut self, fds: Vec<OwnedFd>) {
        self.held.others.extend(fds);
    }

    /// Text of the guest's `/etc/resolv.conf`, or nothing.
    #[must_use]
    pub fn resolv_conf(&self) -> &str {
        &self.guest.resolv_conf
    }

    /// Sets the text of the guest's `/etc/hosts`.
    pub fn set_hosts(&mut self, text: String) {
        self.guest.hosts = text;
    }

    /// Addresses of the guest, without the lengths of their prefixes.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        let addresses = self.guest.interfaces.iter().flat_map(|interface| &interface.addresses);
        addresses.map(|address| address.split('/').next().unwrap_or(address))
    }

    /// The first of them.
    #[must_use]
    pub fn first_address(&self) -> Option<&str> {
        self.addresses().next()
    }
}

/// Limits and rules of a network, the same for each of its interfaces.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Limit of what reaches the guest.
    pub rx_limit: RateLimit,
    /// Limit of what the guest sends.
    pub tx_limit: RateLimit,
    /// Whether the guest can only send from the addresses that it was given.
    pub anti_spoofing: bool,
    /// Whether the host's kernel may carry the frames of a pod (vhost-net), unchecked, where nothing of the above is asked for.
    pub vhost: bool,
}

/// Why there is no network. Nothing of it is left on the host.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The namespace cannot be opened.
    #[error("cannot open the network namespace {}", path.display())]
    OpenNamespace {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path is something else.
    #[error("{} is not a network namespace", path.display())]
    NotANamespace {
        /// The path.
        path: PathBuf,
    },
    /// The namespace is the host's own.
    #[error("{} is the host's network: a VM cannot share it (hostNetwork); give the pod a namespace of its own", path.display())]
    HostNetwork {
        /// The path.
        path: PathBuf,
    },
    /// The namespace has a VM.
    #[error("the frames of {interface} are redirected already: another VM uses this network namespace")]
    Busy {
        /// The interface.
        interface: String,
    },
    /// Another program has filters where ours would be.
    #[error(
        "{interface} has a queue of another program for what arrives (`tc qdisc show dev {interface}` in the pod's network \
         namespace), and a VM needs its place: keep that program from this pod, or remove the queue"
    )]
    Filtered {
        /// The interface.
        interface: String,
    },
    /// There is no room for an interface.
    #[error("a pod has at most {limit} network interfaces, and {interface} is one more")]
    TooMany {
        /// The interface.
        interface: String,
        /// How many there can be.
        limit: usize,
    },
    /// The host's kernel refused something.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: String,
        /// Why.
        source: io::Error,
    },
    /// The host's kernel refused something by netlink.
    #[error("cannot {action}")]
    Netlink {
        /// What was tried.
        action: String,
        /// Why.
        source: rtnetlink::Error,
    },
    /// User mode needs a program.
    #[error("user-mode networking needs the program `passt`: install the package passt, or use --network none")]
    NoPasst,
    /// A port is published at an address of a family that passt does not carry here.
    #[error("cannot publish at {address}: passt carries IPv6 only where the host has a default route of it")]
    NoIpv6 {
        /// Address and port of the host.
        address: SocketAddr,
    },
    /// The program refused its work.
    #[error("passt did not start: {said}")]
    Passt {
        /// Its last words.
        said: String,
    },
}

impl NetworkError {
    pub(crate) fn host(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Host { action, source }
    }

    fn netlink(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let action = action.into();
        move |source| Self::Netlink { action, source }
    }
}

/// The text of a `resolv.conf` with these name servers (resolv.conf(5)).
#[must_use]
pub fn resolv_conf(servers: &[IpAddr]) -> String {
    servers.iter().map(|server| format!("nameserver {server}\n")).collect()
}
