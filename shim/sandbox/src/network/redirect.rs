//! Joins an interface to a TAP interface: each frame that arrives at one leaves through the other (tc-mirred(8)). The
//! interface keeps its name, its addresses and its counters, and its peer notices nothing.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use futures::TryStreamExt as _;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle};
use rtnetlink::{Error, Handle, LinkUnspec};

use super::counters::Counters;
use super::facts::{Found, Link, interfaces, is_tap};
use super::{NetworkError, ingress, netns, tap};

/// Parent of filters for frames that arrive (linux/pkt_sched.h).
const INGRESS_PARENT: u32 = 0xffff_0000;
/// linux/if_ether.h
const ETH_P_ALL: u16 = 0x0003;
const EEXIST: i32 = 17;

/// A joined interface; let go when dropped.
pub(crate) struct Join {
    namespace: Arc<OwnedFd>,
    link_index: u32,
    tap_index: u32,
}

impl Join {
    /// Makes a TAP interface with `queue_count` queues and joins it to `link`. Runs in the namespace.
    pub(super) async fn create(
        handle: &Handle,
        namespace: &Arc<OwnedFd>,
        link: &Link,
        queue_count: u8,
    ) -> Result<(Self, Vec<OwnedFd>), NetworkError> {
        add_ingress(handle, link).await?;
        // From here on the undo is in place.
        let mut join = Self { namespace: namespace.clone(), link_index: link.index, tap_index: 0 };
        let (tap_name, fds) =
            tap::create(queue_count).map_err(NetworkError::host(format!("make a TAP interface for {}", link.name)))?;
        let tap_index = find(handle, &tap_name).await?;
        join.tap_index = tap_index;
        // The host has nothing to say to the guest on its own; without IPv6 in the kernel there is no such file.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{tap_name}/disable_ipv6"), "1");
        let up = LinkUnspec::new_with_index(tap_index).mtu(link.mtu.into()).up().build();
        let failed = |action: &str| NetworkError::netlink(format!("{action} {tap_name}"));
        handle.link().set(up).execute().await.map_err(failed("bring up"))?;
        let queue = handle.qdisc().add(index(tap_index)).ingress();
        queue.execute().await.map_err(failed("add an ingress queue to"))?;
        redirect(handle, link.index, tap_index).await.map_err(failed("redirect frames to"))?;
        redirect(handle, tap_index, link.index).await.map_err(failed("redirect frames from"))?;
        Ok((join, fds))
    }

    /// What the TAP interface counts of the frames of `interface`.
    pub(super) fn counters(&self, interface: &str) -> Counters {
        Counters { namespace: self.namespace.clone(), interface: interface.to_owned(), tap_index: self.tap_index }
    }

    /// One that was never made.
    #[cfg(test)]
    pub(super) fn assumed(link_index: u32, tap_index: u32) -> Self {
        let namespace = std::fs::File::open("/dev/null").expect("it is always there");
        Self { namespace: Arc::new(namespace.into()), link_index, tap_index }
    }

    /// Whether nobody has taken it apart.
    pub(super) fn is_intact(&self, found: &Found) -> bool {
        let has = |from, to| found.redirections.contains(&(from, to));
        has(self.link_index, self.tap_index) && has(self.tap_index, self.link_index)
    }
}

impl Drop for Join {
    fn drop(&mut self) {
        let link_index = self.link_index;
        let undone = netns::enter(&self.namespace, async move |handle| {
            remove_ingress(&handle, link_index).await.map_err(NetworkError::netlink("remove the ingress queue"))
        });
        if let Err(error) = undone {
            // The interface is usually gone: its plugin removes it with the namespace.
            tracing::debug!(%error, link_index, "an interface was not let go");
        }
    }
}

/// Adds the queue that filters hang on. One that a killed owner left is replaced; there is room for one only.
async fn add_ingress(handle: &Handle, link: &Link) -> Result<(), NetworkError> {
    let add = || handle.qdisc().add(index(link.index)).ingress().execute();
    let failed = || NetworkError::netlink(format!("add an ingress queue to {}", link.name));
    match add().await {
        Err(Error::NetlinkError(error)) if error.raw_code() == -EEXIST => {}
        done => return done.map_err(failed()),
    }
    let queues = ingress::read(handle).await?;
    if let Some(queue) = queues.iter().find(|queue| queue.link_index == link.index && !queue.is_left_behind()) {
        // A TAP interface lives as long as its VM.
        let links = interfaces(handle).await?;
        let leads_to_vm = queue.targets().any(|to| links.iter().any(|link| link.header.index == to && is_tap(link)));
        let interface = link.name.clone();
        return Err(if leads_to_vm { NetworkError::Busy { interface } } else { NetworkError::Filtered { interface } });
    }
    remove_ingress(handle, link.index).await.map_err(failed())?;
    add().await.map_err(failed())
}

async fn remove_ingress(handle: &Handle, link_index: u32) -> Result<(), Error> {
    let mut request = handle.qdisc().del(index(link_index));
    request.message_mut().header.parent = TcHandle::INGRESS;
    // Otherwise the kernel removes a `clsact` that somebody has put in its place.
    request.message_mut().attributes.push(TcAttribute::Kind(ingress::KIND.to_owned()));
    request.execute().await
}

async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), Error> {
    let filter = handle.traffic_filter(index(from)).add().parent(INGRESS_PARENT).priority(1);
    // The kernel wants the protocol as it is in a frame.
    filter.protocol(ETH_P_ALL.to_be()).redirect(to)?.execute().await
}

async fn find(handle: &Handle, name: &str) -> Result<u32, NetworkError> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let found = links.try_next().await.map_err(NetworkError::netlink(format!("find the interface {name}")))?;
    let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
    found.map(|link| link.header.index).ok_or_else(missing).map_err(NetworkError::host(format!("find {name}")))
}

/// Netlink has signed numbers for interfaces here.
fn index(index: u32) -> i32 {
    i32::try_from(index).expect("the kernel counts interfaces from 1")
}
