//! The network of a pod: a namespace that a CNI plugin has wired. The VM gets an interface for each of the namespace's, with
//! the same hardware address, MTU, addresses and routes, and reaches what they reach.

use std::path::Path;
use std::sync::Arc;

use vmm_api::net::{Backend, MAX_QUEUE_PAIRS, NetDevice};

use super::facts::{Facts, Link};
use super::redirect::Join;
use super::{Held, Interface, Network, NetworkError, Policy, netns, vhost};
use crate::message::SetNetworkRequest;

/// What a pod's network is made with.
#[derive(Clone, Debug)]
pub struct PodOptions {
    /// Queue pairs of each interface, one for each vCPU up to 8.
    pub queue_pairs: u8,
    /// Text of `/etc/resolv.conf`, or nothing for containers that bring their own.
    pub resolv_conf: String,
    /// Limits and rules.
    pub policy: Policy,
}

/// Joins every Ethernet interface of the network namespace at `path` that is up to a VM that is yet to be booted. Blocks for
/// some milliseconds.
///
/// # Errors
/// Each variant of [`NetworkError`] but those of user mode.
pub fn attach(path: &Path, options: &PodOptions) -> Result<Network, NetworkError> {
    let namespace = Arc::new(netns::open(path)?);
    let queue_count = options.queue_pairs.clamp(1, MAX_QUEUE_PAIRS);
    netns::enter(&namespace, async |handle| {
        let facts = Facts::read(&handle).await?;
        let (mut interfaces, mut held) = (Vec::new(), Held::default());
        for link in &facts.links {
            let (join, mut fds) = Join::create(&handle, &namespace, link, queue_count).await?;
            let mut device = device(link, &options.policy);
            if let Some(vhost) = vhost::open(&options.policy, &link.name, queue_count) {
                device.backend = Backend::Vhost;
                fds.extend(vhost);
                held.counters.push(join.counters(&link.name));
            }
            held.joins.push(join);
            interfaces.push(Interface { device, fds });
        }
        let guest = SetNetworkRequest {
            interfaces: facts.guest_interfaces(),
            routes: facts.routes,
            neighbours: facts.neighbours,
            resolv_conf: options.resolv_conf.clone(),
            ..Default::default()
        };
        Ok(Network { interfaces, guest, held })
    })
}

fn device(link: &Link, policy: &Policy) -> NetDevice {
    let addresses = || link.addresses.iter().map(|(address, _)| *address).collect();
    NetDevice {
        name: link.name.clone(),
        mac: link.mac,
        mtu: link.mtu,
        backend: Backend::Tap,
        rx_limit: policy.rx_limit,
        tx_limit: policy.tx_limit,
        only_from: policy.anti_spoofing.then(addresses),
    }
}
