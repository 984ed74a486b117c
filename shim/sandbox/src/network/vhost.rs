//! vhost-net: the host's kernel carries the frames of an interface, and no thread of the VMM does. It looks at none of them, so an
//! interface with limits or rules keeps the VMM's own datapath, as every one does where there is no vhost-net.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use super::{Policy, RateLimit};

const DEVICE: &str = "/dev/vhost-net";

/// Opens vhost-net once for each pair of queues, if `policy` lets it carry the frames of `interface` and the host has it.
pub(super) fn open(policy: &Policy, interface: &str, queue_count: u8) -> Option<Vec<OwnedFd>> {
    if !policy.vhost {
        return None;
    }
    if !policy.asks_nothing() {
        tracing::info!(interface, "limits and rules keep an interface from vhost-net");
        return None;
    }
    let open = |_| Ok(File::options().read(true).write(true).open(DEVICE)?.into());
    let opened: io::Result<_> = (0..queue_count).map(open).collect();
    opened
        .inspect_err(|error| tracing::warn!(interface, %error, "{DEVICE} is not used: the VMM carries the frames"))
        .ok()
}

impl Policy {
    /// Whether nobody has to look at the frames.
    fn asks_nothing(&self) -> bool {
        let limited = [self.rx_limit, self.tx_limit].iter().any(|limit| *limit != RateLimit::default());
        !limited && !self.anti_spoofing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_rules_need_the_vmm() {
        let limit = RateLimit { bytes_per_s: 1, frames_per_s: 0 };
        let vhost = || Policy { vhost: true, ..Default::default() };
        assert!(vhost().asks_nothing());
        for policy in [
            Policy { rx_limit: limit, ..vhost() },
            Policy { tx_limit: limit, ..vhost() },
            Policy { anti_spoofing: true, ..vhost() },
        ] {
            assert!(open(&policy, "eth0", 1).is_none(), "{policy:?}");
        }
        assert!(open(&Policy::default(), "eth0", 1).is_none(), "not unless it is asked for");
    }
}
