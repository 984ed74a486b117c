//! Keeps a guest to its own addresses: the sender's in Ethernet, ARP, IPv4 and IPv6.
//!
//! Only the first bytes of a frame are looked at, in our own copy of them. VLAN tags and other protocols are refused: what
//! cannot be read cannot be vouched for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vmm_api::net::MacAddress;

pub(super) const ETHERNET_HEADER_LEN: usize = 14;
pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;

/// The addresses of a guest.
#[derive(Clone, Debug)]
pub(super) struct SpoofGuard {
    mac: MacAddress,
    addresses: Vec<IpAddr>,
}

impl SpoofGuard {
    pub(super) fn new(mac: MacAddress, addresses: Vec<IpAddr>) -> Self {
        Self { mac, addresses }
    }

    /// Whether a frame, of which `frame` is the beginning, names the guest as its sender.
    pub(super) fn allows(&self, frame: &[u8]) -> bool {
        let Some((ethernet, packet)) = frame.split_at_checked(ETHERNET_HEADER_LEN) else { return false };
        if ethernet[6..12] != self.mac.0 {
            return false;
        }
        match u16::from_be_bytes([ethernet[12], ethernet[13]]) {
            // RFC 826: hardware address at 8, protocol address at 14.
            ETHERTYPE_ARP => packet.get(8..14) == Some(&self.mac.0) && self.owns_v4(packet.get(14..18)),
            ETHERTYPE_IPV4 => self.owns_v4(packet.get(12..16)),
            ETHERTYPE_IPV6 => self.owns_v6(packet.get(8..24)),
            _ => false,
        }
    }

    fn owns_v4(&self, bytes: Option<&[u8]>) -> bool {
        let Some(bytes) = bytes.and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()) else { return false };
        let address = Ipv4Addr::from(bytes);
        // An address is asked for (DHCP, RFC 5227) from none.
        address.is_unspecified() || self.addresses.contains(&address.into())
    }

    fn owns_v6(&self, bytes: Option<&[u8]>) -> bool {
        let Some(bytes) = bytes.and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()) else { return false };
        let address = Ipv6Addr::from(bytes);
        // Its own link-local address is made of anything; a router on the link does not forward it.
        address.is_unspecified() || address.is_unicast_link_local() || self.addresses.contains(&address.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn guard() -> SpoofGuard {
        let addresses = vec!["10.0.0.2".parse().expect("v4"), "fd00::2".parse().expect("v6")];
        SpoofGuard::new(MacAddress(MAC), addresses)
    }

    fn frame(mac: [u8; 6], ethertype: u16, packet: &[u8]) -> Vec<u8> {
        [&[0xff; 6][..], &mac, &ethertype.to_be_bytes(), packet].concat()
    }

    fn v4(source: [u8; 4]) -> Vec<u8> {
        [&[0x45; 12][..], &source, &[10, 0, 0, 1]].concat()
    }

    fn v6(source: &str) -> Vec<u8> {
        let source: Ipv6Addr = source.parse().expect("v6");
        [&[0x60; 8][..], &source.octets(), &[0; 16]].concat()
    }

    fn arp(mac: [u8; 6], source: [u8; 4]) -> Vec<u8> {
        [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac, &source, &[0; 10]].concat()
    }

    #[test]
    fn its_own_addresses_pass() {
        assert!(guard().allows(&frame(MAC, ETHERTYPE_IPV4, &v4([10, 0, 0, 2]))));
        assert!(guard().allows(&frame(MAC, ETHERTYPE_IPV4, &v4([0; 4]))));
        assert!(guard().allows(&frame(MAC, ETHERTYPE_IPV6, &v6("fd00::2"))));
        assert!(guard().allows(&frame(MAC, ETHERTYPE_IPV6, &v6("fe80::1"))));
        assert!(guard().allows(&frame(MAC, ETHERTYPE_ARP, &arp(MAC, [10, 0, 0, 2]))));
    }

    #[test]
    fn foreign_addresses_and_what_cannot_be_read_do_not() {
        assert!(!guard().allows(&frame([2, 0, 0, 0, 0, 9], ETHERTYPE_IPV4, &v4([10, 0, 0, 2]))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_IPV4, &v4([10, 0, 0, 3]))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_IPV6, &v6("fd00::3"))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_ARP, &arp([2, 0, 0, 0, 0, 9], [10, 0, 0, 2]))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_ARP, &arp(MAC, [10, 0, 0, 1]))));
        assert!(!guard().allows(&frame(MAC, 0x8100, &v4([10, 0, 0, 2]))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_IPV4, &[0x45; 12])));
    }

    proptest! {
        #[test]
        fn no_frame_panics(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = guard().allows(&bytes);
        }
    }
}
