//! Keeps a guest to its own addresses: the sender's in Ethernet, ARP, IPv4 and IPv6, and those that it tells its neighbours of.
//!
//! Only the first bytes of a frame are looked at, in our own copy of them. VLAN tags and other protocols are refused: what
//! cannot be read cannot be vouched for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vmm_api::net::MacAddress;

pub(super) const ETHERNET_HEADER_LEN: usize = 14;
pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;

const IPV6_HEADER_LEN: usize = 40;
// What a header says of the next one (RFC 8200, 4; RFC 4443, 1).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;
const DESTINATION_OPTIONS: u8 = 60;

// Neighbour discovery (RFC 4861, 4).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const SOURCE_LINK_LAYER_ADDRESS: u8 = 1;
const TARGET_LINK_LAYER_ADDRESS: u8 = 2;

/// The addresses of a guest.
#[derive(Clone, Debug)]
pub(super) struct SpoofGuard {
    mac: MacAddress,
    addresses: Vec<IpAddr>,
}

impl SpoofGuard {
    /// A guest with these addresses, and with the link-local one that Linux makes of `mac`.
    pub(super) fn new(mac: MacAddress, mut addresses: Vec<IpAddr>) -> Self {
        addresses.push(link_local(mac).into());
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
            ETHERTYPE_IPV6 => self.owns_v6(packet.get(8..24)) && self.allows_payload(packet),
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
        address.is_unspecified() || self.addresses.contains(&address.into())
    }

    /// Whether a packet of IPv6 is no lie to the neighbours: looks for ICMPv6 behind all headers that a receiver skips.
    fn allows_payload(&self, packet: &[u8]) -> bool {
        let Some((header, payload)) = packet.split_at_checked(IPV6_HEADER_LEN) else { return false };
        let payload_len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let mut is_whole = payload_len <= payload.len();
        // What lies behind is padding.
        let mut rest = &payload[..payload_len.min(payload.len())];
        let mut next = header[6];
        // Each turn takes 8 bytes at least.
        loop {
            let header_len = match (next, rest) {
                (ICMPV6, message) => return self.allows_icmpv6(message, is_whole),
                (HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS, [_, len, ..]) => 8 + usize::from(*len) * 8,
                (FRAGMENT, [_, _, offset_high, offset_low, ..]) => {
                    // Only the first one says what all of them are.
                    if u16::from_be_bytes([*offset_high, *offset_low]) >> 3 != 0 {
                        return true;
                    }
                    is_whole = false;
                    8
                }
                (HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | FRAGMENT, _) => return false,
                _ => return true,
            };
            let Some((extension, behind)) = rest.split_at_checked(header_len) else { return false };
            (next, rest) = (extension[0], behind);
        }
    }

    /// Whether a message, of which fragments may have the rest, tells neighbours of the guest's addresses alone.
    fn allows_icmpv6(&self, message: &[u8], is_whole: bool) -> bool {
        let options_at = match message.first() {
            None => return false,
            Some(&ROUTER_SOLICITATION) => 8,
            Some(&NEIGHBOUR_SOLICITATION) => 24,
            Some(&NEIGHBOUR_ADVERTISEMENT) if self.owns_v6(message.get(8..24)) => 24,
            // A guest is no router.
            Some(&(NEIGHBOUR_ADVERTISEMENT | ROUTER_ADVERTISEMENT | REDIRECT)) => return false,
            Some(_) => return true,
        };
        // Nobody sends them in fragments (RFC 6980).
        is_whole && message.get(options_at..).is_some_and(|options| self.owns_options(options))
    }

    /// Whether the link-layer addresses among the options (RFC 4861, 4.6) are the guest's.
    fn owns_options(&self, mut options: &[u8]) -> bool {
        while let [kind, len, ..] = *options {
            let Some((option, behind)) = options.split_at_checked(usize::from(len) * 8) else { return false };
            let is_address = matches!(kind, SOURCE_LINK_LAYER_ADDRESS | TARGET_LINK_LAYER_ADDRESS);
            if option.is_empty() || is_address && option[2..] != self.mac.0 {
                return false;
            }
            options = behind;
        }
        options.is_empty()
    }
}

/// RFC 4291, 2.5.1 and 2.5.6.
fn link_local(MacAddress([a, b, c, d, e, f]): MacAddress) -> Ipv6Addr {
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
    const LINK_LOCAL: &str = "fe80::ff:fe00:1";

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
        assert!(guard().allows(&frame(MAC, ETHERTYPE_IPV6, &v6(LINK_LOCAL))));
        assert!(guard().allows(&frame(MAC, ETHERTYPE_IPV6, &v6("::"))));
        assert!(guard().allows(&frame(MAC, ETHERTYPE_ARP, &arp(MAC, [10, 0, 0, 2]))));
    }

    #[test]
    fn foreign_addresses_and_what_cannot_be_read_do_not() {
        assert!(!guard().allows(&frame(OTHER_MAC, ETHERTYPE_IPV4, &v4([10, 0, 0, 2]))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_IPV4, &v4([10, 0, 0, 3]))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_IPV6, &v6("fd00::3"))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_IPV6, &v6("fe80::1"))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_ARP, &arp(OTHER_MAC, [10, 0, 0, 2]))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_ARP, &arp(MAC, [10, 0, 0, 1]))));
        assert!(!guard().allows(&frame(MAC, 0x8100, &v4([10, 0, 0, 2]))));
        assert!(!guard().allows(&frame(MAC, ETHERTYPE_IPV4, &[0x45; 12])));
    }

    /// A frame with the link-local address as its source, and a payload of `next` and this.
    fn carrying(next: u8, payload: &[u8]) -> Vec<u8> {
        let len = u16::try_from(payload.len()).expect("short").to_be_bytes();
        let source: Ipv6Addr = LINK_LOCAL.parse().expect("v6");
        let header = [&[0x60, 0, 0, 0, len[0], len[1], next, 255][..], &source.octets(), &[0xff; 16]].concat();
        frame(MAC, ETHERTYPE_IPV6, &[&header, payload].concat())
    }

    /// A message about a target, with a link-layer address as its option.
    fn about(kind: u8, target: &str, option: u8, mac: [u8; 6]) -> Vec<u8> {
        let target: Ipv6Addr = target.parse().expect("v6");
        [&[kind, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[option, 1], &mac].concat()
    }

    fn advertisement(target: &str, mac: [u8; 6]) -> Vec<u8> {
        about(NEIGHBOUR_ADVERTISEMENT, target, TARGET_LINK_LAYER_ADDRESS, mac)
    }

    #[test]
    fn it_tells_neighbours_of_its_own_addresses_alone() {
        let allows = |message: &[u8]| guard().allows(&carrying(ICMPV6, message));
        assert!(allows(&advertisement("fd00::2", MAC)) && allows(&advertisement(LINK_LOCAL, MAC)));
        assert!(allows(&advertisement("fd00::2", MAC)[..24]), "without the option");
        assert!(!allows(&advertisement("fd00::1", MAC)) && !allows(&advertisement("fe80::1", MAC)));
        assert!(!allows(&advertisement("fd00::2", OTHER_MAC)));
        // It asks for whom it likes, but says truthfully who asks.
        assert!(allows(&about(NEIGHBOUR_SOLICITATION, "fd00::1", SOURCE_LINK_LAYER_ADDRESS, MAC)));
        assert!(!allows(&about(NEIGHBOUR_SOLICITATION, "fd00::1", SOURCE_LINK_LAYER_ADDRESS, OTHER_MAC)));
        assert!(allows(&[ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0]));
        assert!(allows(&[128, 0, 0, 0, 0, 0, 0, 0]), "an echo request");
    }

    #[test]
    fn it_is_no_router() {
        let allows = |message: &[u8]| guard().allows(&carrying(ICMPV6, message));
        assert!(!allows(&[&[ROUTER_ADVERTISEMENT][..], &[0; 15]].concat()));
        assert!(!allows(&about(REDIRECT, LINK_LOCAL, TARGET_LINK_LAYER_ADDRESS, MAC)));
    }

    #[test]
    fn options_that_cannot_be_read_are_refused() {
        let allows = |message: &[u8]| guard().allows(&carrying(ICMPV6, message));
        let own = advertisement("fd00::2", MAC);
        assert!(allows(&[&own[..], &[14, 1, 0, 0, 0, 0, 0, 0]].concat()), "a nonce");
        assert!(!allows(&[&own[..], &[14, 0, 0, 0, 0, 0, 0, 0]].concat()), "an option of no length");
        assert!(!allows(&[&own[..], &[TARGET_LINK_LAYER_ADDRESS, 2], &MAC].concat()), "it is longer than the message");
        assert!(!allows(&[&own[..], &[14]].concat()) && !allows(&own[..31]) && !allows(&own[..23]) && !allows(&[]));
        // More than is looked at: the message is longer than what is there of it.
        let mut cut = carrying(ICMPV6, &own);
        cut[ETHERNET_HEADER_LEN + 5] += 8;
        assert!(!guard().allows(&cut));
        // Behind the packet is the padding of a short frame.
        assert!(guard().allows(&[carrying(ICMPV6, &own), vec![0xff; 8]].concat()));
    }

    #[test]
    fn no_header_before_it_hides_a_lie() {
        let behind = |extensions: &[u8], message: &[u8]| {
            guard().allows(&carrying(extensions[0], &[&extensions[1..], message].concat()))
        };
        let (own, foreign) = (advertisement("fd00::2", MAC), advertisement("fd00::1", MAC));
        let options = [DESTINATION_OPTIONS, HOP_BY_HOP, 0, 1, 4, 0, 0, 0, 0, ICMPV6, 1, 1, 12, 0, 0, 0, 0];
        let options = [&options[..], &[0; 8]].concat();
        assert!(behind(&options, &own) && !behind(&options, &foreign));
        let too_long = [DESTINATION_OPTIONS, ICMPV6, 9, 0, 0, 0, 0, 0, 0];
        assert!(!behind(&too_long, &own));
        let fragment = |offset: u8| [FRAGMENT, ICMPV6, 0, 0, offset | 1, 0, 0, 0, 7];
        assert!(!behind(&fragment(0), &own), "an advertisement is in one piece");
        assert!(behind(&fragment(0), &[128, 0, 0, 0]) && behind(&fragment(8), &foreign), "a large echo request is not");
        assert!(!behind(&fragment(0), &[]) && !behind(&fragment(0)[..4], &[]));
    }

    proptest! {
        #[test]
        fn no_packet_of_neighbours_panics(
            next in prop::sample::select(vec![HOP_BY_HOP, ROUTING, FRAGMENT, ICMPV6, DESTINATION_OPTIONS]),
            payload in prop::collection::vec(prop_oneof![0_u8..3, 58_u8..61, 133_u8..138], 0..80),
        ) {
            let _ = guard().allows(&carrying(next, &payload));
        }

        #[test]
        fn no_frame_panics(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = guard().allows(&bytes);
        }
    }
}
