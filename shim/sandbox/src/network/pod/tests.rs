//! What a look at a namespace asks for, without a kernel.

use super::super::facts::Address;
use super::*;
use crate::message::Route;
use crate::network::MacAddress;

fn address(text: &str) -> Address {
    Address { ip: text.parse().expect("an address"), prefix_len: 24, has_prefix_route: true }
}

fn link(index: u32, name: &str) -> Link {
    let mac = MacAddress([2, 0, 0, 0, 0, u8::try_from(index).expect("small")]);
    Link { index, name: name.to_owned(), is_up: true, mac, mtu: 1500, addresses: vec![address("10.0.0.2")] }
}

fn route(interface: &str) -> Route {
    let (destination, gateway) = ("0.0.0.0/0".to_owned(), "10.0.0.1".to_owned());
    Route { destination, gateway, interface: interface.to_owned(), ..Default::default() }
}

fn found(links: Vec<Link>, routes: Vec<Route>) -> Found {
    let facts = Facts { links, routes, ..Default::default() };
    Found { facts, redirections: [1, 2, 3].map(|index| [(index, 90), (90, index)]).concat() }
}

/// A pod that has what was found, by TAP interfaces that are all there.
fn pod(anti_spoofing: bool, seen: &Found) -> PodNetwork {
    let policy = Policy { anti_spoofing, ..Default::default() };
    let options = PodOptions { queue_pairs: 1, resolv_conf: String::new(), policy };
    let namespace = Arc::new(std::fs::File::open("/proc/self/ns/net").expect("a namespace").into());
    let mut pod = PodNetwork { namespace, options, joined: Vec::new(), told: Facts::default() };
    let wanted = pod.wanted(pod.change(seen));
    for (link, device) in wanted.devices {
        let join = Some(Join::assumed(link.index, 90));
        pod.joined.push(Joined { link_index: link.index, is_up: true, device, join });
    }
    pod.set_told(seen);
    pod
}

#[test]
fn nothing_is_done_when_nothing_has_changed() {
    let seen = found(vec![link(1, "eth0")], vec![route("eth0")]);
    let pod = pod(true, &seen);
    let change = pod.change(&seen);
    assert!(change.gone.is_empty() && change.carriers.is_empty() && change.new.is_empty(), "{change:?}");
    assert_eq!(pod.news(&seen), None);
}

#[test]
fn what_comes_is_new_and_what_goes_is_gone() {
    let pod = pod(false, &found(vec![link(1, "eth0"), link(2, "eth1")], vec![]));
    let change = pod.change(&found(vec![link(3, "eth2")], vec![]));
    assert_eq!(change.gone, [1, 0]);
    assert_eq!(change.new, [link(3, "eth2")]);
}

#[test]
fn another_mtu_or_a_lost_redirection_makes_an_interface_anew() {
    let seen = found(vec![link(1, "eth0")], vec![]);
    let pod = pod(false, &seen);
    let jumbo = Link { mtu: 9000, ..link(1, "eth0") };
    let change = pod.change(&found(vec![jumbo.clone()], vec![]));
    assert_eq!((change.gone, change.new), (vec![0], vec![jumbo]));
    for left in [vec![(1, 0)], vec![(1, 90)], vec![(90, 1)], vec![(2, 90), (90, 2)]] {
        let seen = Found { redirections: left, ..found(vec![link(1, "eth0")], vec![]) };
        assert_eq!(pod.change(&seen).gone, [0], "{seen:?}");
    }
}

#[test]
fn new_addresses_are_told_and_checked_ones_make_an_interface_anew() {
    let seen = found(vec![link(1, "eth0")], vec![]);
    let moved = Link { addresses: vec![address("10.0.0.3")], ..link(1, "eth0") };
    let moved = found(vec![moved], vec![]);
    let checked = pod(true, &seen);
    assert_eq!(checked.change(&moved).gone, [0]);
    let free = pod(false, &seen);
    assert!(free.change(&moved).gone.is_empty());
    let news = free.news(&moved).expect("news");
    assert_eq!(news.interfaces[0].addresses, ["10.0.0.3/24"]);
    assert_eq!(news.interfaces[0].gone_addresses, ["10.0.0.2/24"]);
}

#[test]
fn an_address_without_its_route_is_set_anew_without() {
    let pod = pod(true, &found(vec![link(1, "eth0")], vec![]));
    let unrouted = Address { has_prefix_route: false, ..address("10.0.0.2") };
    let seen = found(vec![Link { addresses: vec![unrouted], ..link(1, "eth0") }], vec![]);
    assert!(pod.change(&seen).gone.is_empty());
    let news = pod.news(&seen).expect("news").interfaces.remove(0);
    let address = ["10.0.0.2/24".to_owned()];
    assert_eq!(
        (news.gone_addresses, news.addresses, news.noprefixroute),
        (address.to_vec(), address.to_vec(), address.to_vec())
    );
}

#[test]
fn an_interface_that_is_down_keeps_what_the_guest_knows_of_it() {
    let seen = found(vec![link(1, "eth0")], vec![route("eth0")]);
    let mut pod = pod(false, &seen);
    let down = found(vec![Link { is_up: false, ..link(1, "eth0") }], vec![]);
    assert_eq!(pod.change(&down).carriers, [0]);
    pod.joined[0].is_up = false;
    assert_eq!(pod.news(&down), None);
    pod.joined[0].is_up = true;
    let news = pod.news(&found(vec![link(1, "net0")], vec![])).expect("news");
    assert_eq!((news.interfaces[0].name.as_str(), news.gone_routes), ("net0", vec![route("eth0")]));
}

#[test]
fn one_that_was_refused_is_left_alone_until_it_is_another_one() {
    let seen = found(vec![link(1, "eth0")], vec![]);
    let mut pod = pod(false, &seen);
    pod.joined[0].join = None;
    let change = pod.change(&seen);
    assert!(change.gone.is_empty() && change.new.is_empty(), "{change:?}");
    assert!(pod.for_guest(&seen.facts).links.is_empty());
    let again = Link { mac: MacAddress([2, 0, 0, 0, 0, 99]), ..link(1, "eth0") };
    assert_eq!(pod.change(&found(vec![again.clone()], vec![])).new, [again]);
}

#[test]
fn the_vmm_knows_two_interfaces_of_one_name_by_two() {
    let seen = found(vec![link(1, "eth0")], vec![]);
    let pod = pod(false, &seen);
    let renamed = found(vec![link(1, "net0"), link(2, "eth0")], vec![]);
    let change = pod.change(&renamed);
    assert!(change.gone.is_empty(), "{change:?}");
    assert_eq!(pod.wanted(change).devices[0].1.name, "eth0#2");
}
