//! Network interfaces of a VM: what the guest sees, and what carries its frames on the host.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Fd;

/// Most queue pairs of one interface.
pub const MAX_QUEUE_PAIRS: u8 = 8;
/// Least MTU, in bytes (VIRTIO 1.2, 5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// An interface with its descriptors.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The interface.
    pub device: NetDevice,
    /// What [`Backend`] asks for.
    pub fds: Vec<Fd>,
}

/// A network interface of the guest (VIRTIO 1.2, 5.1).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetDevice {
    /// What the VMM knows it by; the guest knows it by its address.
    pub name: String,
    /// Hardware address.
    pub mac: MacAddress,
    /// Largest packet without its Ethernet header, in bytes, [`MIN_MTU`] or more.
    pub mtu: u16,
    /// What carries the frames.
    pub backend: Backend,
    /// Limit of what reaches the guest, by all queue pairs together.
    pub rx_limit: RateLimit,
    /// Limit of what the guest sends, by all queue pairs together.
    pub tx_limit: RateLimit,
    /// When set, the guest can only send from its hardware address, from these addresses and from the link-local one that is made
    /// of the hardware address (RFC 4291, 2.5.1); it can tell neighbours of no others, and be no router.
    pub only_from: Option<Vec<IpAddr>>,
}

/// What carries the frames of an interface.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// A TAP interface (tun(4)), made with `IFF_NO_PI` and `IFF_VNET_HDR`: one descriptor for each queue pair, 1 to
    /// [`MAX_QUEUE_PAIRS`].
    Tap,
    /// As `Tap`, and behind those descriptors as many of /dev/vhost-net, which nobody has used: the host's kernel carries the frames. It
    /// checks none of them, so there can be no limit and no `only_from`, and the VMM counts nothing.
    Vhost,
    /// One connected stream socket: each frame behind its length as 4 bytes, big-endian, as `passt` speaks it.
    Stream,
}

/// Limits of one direction, each over 100 ms; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes of frames in a second.
    pub bytes_per_s: u64,
    /// Frames in a second; one that is segmented later counts once.
    pub frames_per_s: u64,
}

/// What an interface has carried; all of it 0 with [`Backend::Vhost`].
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct NetStats {
    /// The interface's name.
    pub name: String,
    /// Whether the guest sees a carrier.
    pub link_up: bool,
    /// Frames that reached the guest.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames for the guest that did not fit into its buffers.
    pub rx_dropped: u64,
    /// Frames that the guest sent.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames of the guest that the host did not take.
    pub tx_dropped: u64,
    /// Frames of the guest whose header or buffers break the standard.
    pub tx_malformed: u64,
    /// Frames of the guest from addresses that are not its own.
    pub tx_spoofed: u64,
    /// Times that a limit made either direction wait.
    pub throttled: u64,
}

/// An Ethernet address; as text six bytes in hexadecimal with colons between.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, last] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{last:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Digits alone: from_str_radix also takes a sign.
        let is_byte = |part: &str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        let byte = |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| is_byte(part));
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| format!("{text:?} is not a MAC address"))
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::MacAddress;

    #[test]
    fn a_hardware_address_is_read_as_it_is_written() {
        let mac = MacAddress([2, 0, 0xab, 0, 10, 255]);
        assert_eq!(mac.to_string(), "02:00:ab:00:0a:ff");
        assert_eq!("02:00:ab:00:0a:ff".parse(), Ok(mac));
        assert!("02:00:ab:00:0a".parse::<MacAddress>().is_err());
        assert!("02:00:ab:00:0a:+f".parse::<MacAddress>().is_err());
    }
}
