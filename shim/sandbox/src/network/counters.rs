//! What a TAP interface has carried, as the host's kernel counts it: for interfaces whose frames the VMM does not see.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use futures::TryStreamExt as _;
use rtnetlink::packet_route::link::{LinkAttribute, Stats64};
use vmm_api::net::NetStats;

use super::{NetworkError, netns};

/// Counters of one interface of a VM.
pub(crate) struct Counters {
    pub(super) namespace: Arc<OwnedFd>,
    pub(super) interface: String,
    pub(super) tap_index: u32,
}

impl Counters {
    /// Puts them in the place of those that the VMM has told of the interface. Blocks for about a millisecond.
    pub(crate) fn fill(&self, stats: &mut [NetStats]) {
        let Some(told) = stats.iter_mut().find(|told| told.name == self.interface) else { return };
        match self.read() {
            Ok(counted) => *told = from_host(told, &counted),
            // Its namespace is usually gone.
            Err(error) => tracing::debug!(%error, interface = self.interface, "counters of an interface are not known"),
        }
    }

    fn read(&self) -> Result<Stats64, NetworkError> {
        netns::enter(&self.namespace, async |handle| {
            let action = || format!("read the counters of {}", self.interface);
            let mut links = handle.link().get().match_index(self.tap_index).execute();
            let found = links.try_next().await.map_err(NetworkError::netlink(action()))?;
            let counters = |attribute| match attribute {
                LinkAttribute::Stats64(counters) => Some(counters),
                _ => None,
            };
            let found = found.into_iter().flat_map(|link| link.attributes).find_map(counters);
            found.ok_or_else(|| NetworkError::host(action())(std::io::ErrorKind::NotFound.into()))
        })
    }
}

/// What the TAP interface receives, the guest has sent.
fn from_host(told: &NetStats, counted: &Stats64) -> NetStats {
    NetStats {
        name: told.name.clone(),
        link_up: told.link_up,
        rx_frames: counted.tx_packets,
        rx_bytes: counted.tx_bytes,
        rx_dropped: counted.tx_dropped,
        tx_frames: counted.rx_packets,
        tx_bytes: counted.rx_bytes,
        tx_dropped: counted.rx_dropped,
        tx_malformed: counted.rx_frame_errors,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_tap_interface_receives_the_guest_has_sent() {
        let mut counted = Stats64::default();
        (counted.rx_packets, counted.rx_bytes, counted.tx_packets, counted.tx_bytes) = (1, 2, 3, 4);
        let told = NetStats { name: "eth0".to_owned(), link_up: true, rx_frames: 9, ..Default::default() };
        let stats = from_host(&told, &counted);
        assert_eq!((stats.tx_frames, stats.tx_bytes, stats.rx_frames, stats.rx_bytes), (1, 2, 3, 4));
        assert_eq!((stats.name.as_str(), stats.link_up), ("eth0", true));
    }
}
