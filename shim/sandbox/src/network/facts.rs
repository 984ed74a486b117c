//! What a CNI plugin has wired into a network namespace: interfaces, addresses, routes and permanent neighbours, read by
//! netlink.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{MacAddress, NetworkError, ingress, tap};
use crate::message::{Interface, Neighbour, Route, SetNetworkRequest};

/// An Ethernet interface.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) is_up: bool,
    pub(super) mac: MacAddress,
    pub(super) mtu: u16,
    /// Addresses without the guest's own link-local ones.
    pub(super) addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Address {
    pub(super) ip: IpAddr,
    pub(super) prefix_len: u8,
    /// Whether there is the route to its network that a kernel makes by itself. CNI's ptp plugin removes it, so that packets to
    /// that network go by the gateway.
    pub(super) has_prefix_route: bool,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix_len)
    }
}

impl Address {
    /// Destination of that route.
    fn network(&self) -> String {
        let host_len = |len: u32| len.saturating_sub(self.prefix_len.into());
        let start: IpAddr = match self.ip {
            IpAddr::V4(ip) => {
                Ipv4Addr::from_bits(ip.to_bits() & u32::MAX.checked_shl(host_len(32)).unwrap_or(0)).into()
            }
            IpAddr::V6(ip) => {
                Ipv6Addr::from_bits(ip.to_bits() & u128::MAX.checked_shl(host_len(128)).unwrap_or(0)).into()
            }
        };
        format!("{start}/{}", self.prefix_len)
    }
}

/// Everything that a guest has to be told.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Facts {
    pub(super) links: Vec<Link>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
}

/// What is in a namespace.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(super) facts: Facts,
    /// Indices of two interfaces, where frames that arrive at the first leave through the second.
    pub(super) redirections: Vec<(u32, u32)>,
}

/// Every interface of the namespace.
pub(super) async fn interfaces(handle: &Handle) -> Result<Vec<LinkMessage>, NetworkError> {
    let found = handle.link().get().execute().try_collect().await;
    found.map_err(NetworkError::netlink("list the interfaces of the network namespace"))
}

/// Whether the namespace has a default route of IPv6.
pub(super) async fn has_ipv6_route(handle: &Handle) -> Result<bool, NetworkError> {
    let routes = handle.route().get(v6_query()).execute().try_collect().await;
    let routes: Vec<RouteMessage> = routes.map_err(NetworkError::netlink("list the routes of the host"))?;
    let leads_out = |header: &RouteHeader| {
        header.destination_prefix_length == 0
            && header.table == RouteHeader::RT_TABLE_MAIN
            && header.kind == RouteType::Unicast
    };
    Ok(routes.iter().any(|route| leads_out(&route.header)))
}

impl Found {
    pub(super) async fn read(handle: &Handle) -> Result<Self, NetworkError> {
        let messages = interfaces(handle).await?;
        let mut links: Vec<Link> = messages.iter().filter_map(link).collect();
        let addresses: Vec<AddressMessage> = handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(NetworkError::netlink("list the addresses of the network namespace"))?;
        for link in &mut links {
            link.addresses = addresses.iter().filter_map(|message| address(message, link.index)).collect();
        }
        let (mut routes, mut of_kernel) = (Vec::new(), Vec::new());
        for family in [RouteMessageBuilder::<Ipv4Addr>::new().build(), v6_query()] {
            let found: Vec<RouteMessage> = handle
                .route()
                .get(family)
                .execute()
                .try_collect()
                .await
                .map_err(NetworkError::netlink("list the routes of the network namespace"))?;
            for message in &found {
                let is_of_kernel = message.header.protocol == RouteProtocol::Kernel;
                let kept = if is_of_kernel { &mut of_kernel } else { &mut routes };
                kept.extend(route(message, &links));
            }
        }
        for link in &mut links {
            link.mark_prefix_routes(&of_kernel);
        }
        // A gateway must be reachable before a route goes through it.
        routes.sort_by_key(|route| !route.gateway.is_empty());
        let found: Vec<NeighbourMessage> = handle
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(NetworkError::netlink("list the neighbours of the network namespace"))?;
        let neighbours = found.iter().filter_map(|message| neighbour(message, &links)).collect();
        let queues = ingress::read(handle).await?;
        let redirections = queues.iter().flat_map(|queue| queue.targets().map(|target| (queue.link_index, target)));
        Ok(Self { redirections: redirections.collect(), facts: Facts { links, routes, neighbours } })
    }
}

impl Link {
    /// The guest's kernel makes the routes that this one has made from addresses, unless told otherwise.
    fn mark_prefix_routes(&mut self, of_kernel: &[Route]) {
        for address in &mut self.addresses {
            let network = address.network();
            let is_its = |route: &Route| route.interface == self.name && route.destination == network;
            address.has_prefix_route = of_kernel.iter().any(is_its);
        }
    }
}

impl Facts {
    /// The part that is about these interfaces.
    pub(super) fn of(&self, is_wanted: impl Fn(&Link) -> bool) -> Self {
        let links: Vec<Link> = self.links.iter().filter(|link| is_wanted(link)).cloned().collect();
        let is_named = |name: &str| links.iter().any(|link| link.name == name);
        let routes = self.routes.iter().filter(|route| is_named(&route.interface)).cloned().collect();
        let neighbours = self.neighbours.iter().filter(|at| is_named(&at.interface)).cloned().collect();
        Self { links, routes, neighbours }
    }

    /// As the agent is told, which may have been told something else before.
    pub(super) fn request(&self, told: &Self) -> SetNetworkRequest {
        let interface = |link: &Link| {
            let before = told.links.iter().find(|before| before.index == link.index);
            let gone = before.into_iter().flat_map(|before| &before.addresses);
            let unrouted = link.addresses.iter().filter(|address| !address.has_prefix_route);
            Interface {
                name: link.name.clone(),
                mac: link.mac.to_string(),
                addresses: link.addresses.iter().map(Address::to_string).collect(),
                mtu: link.mtu.into(),
                gone_addresses: without(gone, &link.addresses).map(Address::to_string).collect(),
                noprefixroute: unrouted.map(Address::to_string).collect(),
                ..Default::default()
            }
        };
        SetNetworkRequest {
            interfaces: self.links.iter().map(interface).collect(),
            routes: self.routes.clone(),
            neighbours: self.neighbours.clone(),
            gone_routes: without(&told.routes, &self.routes).cloned().collect(),
            gone_neighbours: without(&told.neighbours, &self.neighbours).cloned().collect(),
            ..Default::default()
        }
    }
}

fn without<'a, T: PartialEq>(all: impl IntoIterator<Item = &'a T>, kept: &'a [T]) -> impl Iterator<Item = &'a T> {
    all.into_iter().filter(|one| !kept.contains(one))
}

/// Whether we made it.
pub(super) fn is_tap(message: &LinkMessage) -> bool {
    let ours =
        |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::IfName(name) if name.starts_with(tap::PREFIX));
    message.attributes.iter().any(ours)
}

fn v6_query() -> RouteMessage {
    RouteMessageBuilder::<Ipv6Addr>::new().build()
}

fn link(message: &LinkMessage) -> Option<Link> {
    let flags = message.header.flags;
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    if !ethernet || flags.contains(LinkFlags::Loopback) || is_tap(message) {
        return None;
    }
    let (mut name, mut mac, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress),
            LinkAttribute::Mtu(bytes) => mtu = Some(u16::try_from(*bytes).unwrap_or(u16::MAX)),
            _ => {}
        }
    }
    let is_up = flags.contains(LinkFlags::Up);
    Some(Link { index: message.header.index, name: name?, is_up, mac: mac?, mtu: mtu?, addresses: Vec::new() })
}

fn address(message: &AddressMessage, link_index: u32) -> Option<Address> {
    if message.header.index != link_index || message.header.scope == AddressScope::Link {
        return None;
    }
    let own = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    };
    let any = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    };
    // With a peer, `Address` is the peer's.
    let ip = message.attributes.iter().find_map(own).or_else(|| message.attributes.iter().find_map(any))?;
    Some(Address { ip, prefix_len: message.header.prefix_len, has_prefix_route: false })
}

fn route(message: &RouteMessage, links: &[Link]) -> Option<Route> {
    let header = &message.header;
    let main = header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast;
    // What a router advertises, the guest hears itself.
    if !main || header.protocol == RouteProtocol::Ra {
        return None;
    }
    let unspecified = if header.address_family == AddressFamily::Inet { "0.0.0.0" } else { "::" };
    let mut route = Route { destination: format!("{unspecified}/0"), ..Default::default() };
    let mut link = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination = format!("{}/{}", ip(address)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = ip(address)?.to_string(),
            RouteAttribute::PrefSource(address) => route.source = ip(address)?.to_string(),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(index) => link = links.iter().find(|link| link.index == *index),
            _ => {}
        }
    }
    route.interface = link?.name.clone();
    route.on_link = header.flags.contains(RouteFlags::Onlink);
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage, links: &[Link]) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let link = links.iter().find(|link| link.index == message.header.ifindex)?;
    let mut found = Neighbour { interface: link.name.clone(), ..Default::default() };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => found.address = address.to_string(),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => found.address = address.to_string(),
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                found.mac = MacAddress(<[u8; 6]>::try_from(bytes.as_slice()).ok()?).to_string();
            }
            _ => {}
        }
    }
    (!found.address.is_empty() && !found.mac.is_empty()).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::Address;

    #[test]
    fn the_route_of_an_address_leads_to_its_network() {
        let network = |ip: &str, prefix_len| {
            Address { ip: ip.parse().expect("an address"), prefix_len, has_prefix_route: true }.network()
        };
        assert_eq!(network("10.88.129.2", 17), "10.88.128.0/17");
        assert_eq!(network("10.88.0.2", 32), "10.88.0.2/32");
        assert_eq!(network("10.88.0.2", 0), "0.0.0.0/0");
        assert_eq!(network("fd88::2", 64), "fd88::/64");
    }
}
