//! The network of a pod: a namespace that a CNI plugin wires. The VM gets an interface for each of the namespace's, with the
//! same hardware address, MTU, addresses and routes, and reaches what they reach.
//!
//! ```text
//!   attach ─► Network ─► boot ─► PodNetwork ◄─ look ─► Change ─► follow.rs: the VMM and the agent do their part
//! ```

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use vmm_api::net::{Backend, MAX_QUEUE_PAIRS, NetDevice};

use super::counters::Counters;
use super::facts::{Facts, Found, Link};
use super::redirect::Join;
use super::{Held, Interface, Network, NetworkError, Policy, netns, vhost};
use crate::message::SetNetworkRequest;

/// Most interfaces of a pod: each has a thread for each of its queue pairs, and a slot of the VM's 31.
const MAX_INTERFACES: usize = 8;

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
    let mut pod = PodNetwork::open(path, options)?;
    let found = look(&pod.namespace)?;
    let mut interfaces = Vec::new();
    for Made { joined, fds } in pod.wanted(pod.change(&found)).make()? {
        interfaces.push(Interface { device: joined.device.clone(), fds: fds? });
        pod.joined.push(joined);
    }
    let facts = pod.for_guest(&found.facts);
    let guest = SetNetworkRequest { resolv_conf: options.resolv_conf.clone(), ..facts.request(&Facts::default()) };
    pod.told = facts;
    Ok(Network { interfaces, guest, held: Held { pod: Some(pod), ..Default::default() } })
}

/// What a VM has of a namespace.
pub(crate) struct PodNetwork {
    pub(crate) namespace: Arc<OwnedFd>,
    options: PodOptions,
    pub(crate) joined: Vec<Joined>,
    /// What the guest was told last.
    told: Facts,
}

/// An interface of the namespace that was given to the VM.
pub(crate) struct Joined {
    link_index: u32,
    pub(crate) is_up: bool,
    pub(crate) device: NetDevice,
    /// Without one it could not be joined, or the VM did not take it: it is left alone for as long as it is the same.
    pub(crate) join: Option<Join>,
}

/// What has to be done so that the VM has what is in the namespace.
#[derive(Debug, Default)]
pub(crate) struct Change {
    /// Positions of joined interfaces that are gone or are not what they were, the last one first.
    pub(crate) gone: Vec<usize>,
    /// Positions of joined interfaces that were brought up or taken down.
    pub(crate) carriers: Vec<usize>,
    new: Vec<Link>,
}

/// Interfaces to join.
pub(crate) struct Wanted {
    namespace: Arc<OwnedFd>,
    devices: Vec<(Link, NetDevice)>,
    queue_count: u8,
    policy: Policy,
    /// How many the VM has already.
    present_count: usize,
}

/// An interface that the VM does not know yet.
pub(crate) struct Made {
    pub(crate) joined: Joined,
    pub(crate) fds: Result<Vec<OwnedFd>, NetworkError>,
}

/// Reads what is in a namespace. Blocks.
pub(crate) fn look(namespace: &OwnedFd) -> Result<Found, NetworkError> {
    netns::enter(namespace, async |handle| Found::read(&handle).await)
}

impl PodNetwork {
    /// Takes the namespace at `path`, of which nothing is joined yet.
    pub(crate) fn open(path: &Path, options: &PodOptions) -> Result<Self, NetworkError> {
        let namespace = Arc::new(netns::open(path)?);
        Ok(Self { namespace, options: options.clone(), joined: Vec::new(), told: Facts::default() })
    }

    /// Compares what was found with what is joined.
    pub(crate) fn change(&self, found: &Found) -> Change {
        let mut change = Change::default();
        let links = &found.facts.links;
        for (position, joined) in self.joined.iter().enumerate() {
            match links.iter().find(|link| link.index == joined.link_index) {
                Some(link) if self.is_same(joined, link, found) => {
                    if link.is_up != joined.is_up {
                        change.carriers.push(position);
                    }
                }
                _ => change.gone.insert(0, position),
            }
        }
        let stays = |(position, _): &(usize, &Joined)| !change.gone.contains(position);
        let kept: Vec<u32> =
            self.joined.iter().enumerate().filter(stays).map(|(_, joined)| joined.link_index).collect();
        change.new = links.iter().filter(|link| link.is_up && !kept.contains(&link.index)).cloned().collect();
        change
    }

    fn is_same(&self, joined: &Joined, link: &Link, found: &Found) -> bool {
        let device = device(link, joined.device.name.clone(), &self.options.policy);
        let device = NetDevice { backend: joined.device.backend, ..device };
        device == joined.device && joined.join.as_ref().is_none_or(|join| join.is_intact(found))
    }

    /// What is new, once what is gone is forgotten.
    pub(crate) fn wanted(&self, change: Change) -> Wanted {
        let is_taken = |name: &str| self.joined.iter().any(|joined| joined.device.name == name);
        let device = |link: Link| {
            // The VMM knows an interface by the name that it had when it came.
            let name = if is_taken(&link.name) { format!("{}#{}", link.name, link.index) } else { link.name.clone() };
            let device = device(&link, name, &self.options.policy);
            (link, device)
        };
        Wanted {
            namespace: self.namespace.clone(),
            devices: change.new.into_iter().map(device).collect(),
            queue_count: self.options.queue_pairs.clamp(1, MAX_QUEUE_PAIRS),
            policy: self.options.policy.clone(),
            present_count: self.joined.iter().filter(|joined| joined.join.is_some()).count(),
        }
    }

    /// Takes an interface out of what is joined and of what the guest was told.
    pub(crate) fn forget(&mut self, position: usize) -> Joined {
        let joined = self.joined.remove(position);
        self.told = self.told.of(|link| link.index != joined.link_index);
        joined
    }

    /// Of interfaces whose frames the VMM does not see.
    pub(crate) fn counters(&self) -> Vec<Counters> {
        let by_kernel = self.joined.iter().filter(|joined| joined.device.backend == Backend::Vhost);
        by_kernel.filter_map(|joined| Some(joined.join.as_ref()?.counters(&joined.device.name))).collect()
    }

    /// What the guest is told so that it knows what was found, if that is anything.
    pub(crate) fn news(&self, found: &Found) -> Option<SetNetworkRequest> {
        let facts = self.for_guest(&found.facts);
        (facts != self.told).then(|| facts.request(&self.told))
    }

    /// The guest was told.
    pub(crate) fn set_told(&mut self, found: &Found) {
        self.told = self.for_guest(&found.facts);
    }

    /// What the guest is to know: all of an interface that it has. Of one that is down it keeps what it knows, for there the
    /// host's kernel forgets routes.
    fn for_guest(&self, found: &Facts) -> Facts {
        let joined = |link: &Link| self.joined.iter().find(|it| it.link_index == link.index && it.join.is_some());
        let mut facts = found.of(|link| joined(link).is_some_and(|joined| joined.is_up));
        let kept = self.told.of(|link| joined(link).is_some_and(|joined| !joined.is_up));
        facts.links.extend(kept.links);
        facts.routes.extend(kept.routes);
        facts.neighbours.extend(kept.neighbours);
        facts
    }
}

impl Wanted {
    /// Joins each, which may fail for each. Blocks.
    pub(crate) fn make(self) -> Result<Vec<Made>, NetworkError> {
        if self.devices.is_empty() {
            return Ok(Vec::new());
        }
        netns::enter(&self.namespace.clone(), async move |handle| {
            let (mut made, mut count) = (Vec::new(), self.present_count);
            for (link, mut device) in self.devices {
                let created = if count < MAX_INTERFACES {
                    Join::create(&handle, &self.namespace, &link, self.queue_count).await
                } else {
                    Err(NetworkError::TooMany { interface: link.name, limit: MAX_INTERFACES })
                };
                let (join, fds) = match created {
                    Ok((join, mut fds)) => {
                        if let Some(vhost) = vhost::open(&self.policy, &device.name, self.queue_count) {
                            device.backend = Backend::Vhost;
                            fds.extend(vhost);
                        }
                        (Some(join), Ok(fds))
                    }
                    Err(error) => (None, Err(error)),
                };
                count += usize::from(join.is_some());
                made.push(Made { joined: Joined { link_index: link.index, is_up: true, device, join }, fds });
            }
            Ok(made)
        })
    }
}

fn device(link: &Link, name: String, policy: &Policy) -> NetDevice {
    let addresses = || link.addresses.iter().map(|address| address.ip).collect();
    NetDevice {
        name,
        mac: link.mac,
        mtu: link.mtu,
        backend: Backend::Tap,
        rx_limit: policy.rx_limit,
        tx_limit: policy.tx_limit,
        only_from: policy.anti_spoofing.then(addresses),
    }
}

#[cfg(test)]
mod tests;
