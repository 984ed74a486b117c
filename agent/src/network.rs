//! The guest's network: interfaces, addresses, routes, neighbours and the resolver's configuration.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use agent_api::message::{Interface, Neighbour, Route, SetNetworkRequest};
use agent_api::{HOSTS_PATH, RESOLV_CONF_PATH};
use futures::TryStreamExt as _;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use thiserror::Error;

use crate::hotplug;

/// Time that the interface of a device has to appear.
const DEVICE_DEADLINE: Duration = Duration::from_secs(5);

/// Why the network could not be set.
#[derive(Debug, Error)]
pub(crate) enum NetworkError {
    #[error("{text:?} is not {what}")]
    Invalid { what: &'static str, text: String },
    #[error("no interface {0}")]
    NoInterface(String),
    #[error("cannot {action} {of}")]
    Netlink { action: &'static str, of: String, source: rtnetlink::Error },
    #[error("cannot {action}")]
    Io { action: &'static str, source: io::Error },
}

type Done = Result<(), NetworkError>;

/// Sets everything that the request names.
pub(crate) async fn apply(request: &SetNetworkRequest) -> Done {
    let failed = |source| NetworkError::Io { action: "open a netlink socket", source };
    let (connection, handle, _) = rtnetlink::new_connection().map_err(failed)?;
    let connection = tokio::spawn(connection);
    let done = apply_with(&handle, request).await;
    connection.abort();
    done
}

async fn apply_with(handle: &Handle, request: &SetNetworkRequest) -> Done {
    forget(handle, request).await?;
    for interface in &request.interfaces {
        set_interface(handle, interface).await?;
    }
    for route in &request.routes {
        set_route(handle, route).await?;
    }
    for neighbour in &request.neighbours {
        set_neighbour(handle, neighbour).await?;
    }
    for (path, text) in [(RESOLV_CONF_PATH, &request.resolv_conf), (HOSTS_PATH, &request.hosts)] {
        if !text.is_empty() {
            let folder = Path::new(path).parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(folder)
                .and_then(|()| fs::write(path, text))
                .map_err(|source| NetworkError::Io { action: "write a file for containers", source })?;
        }
    }
    Ok(())
}

/// Removes what is to be there no longer. What a container has removed itself is no error.
async fn forget(handle: &Handle, request: &SetNetworkRequest) -> Done {
    for mac_text in &request.gone_interfaces {
        let wanted = mac(mac_text)?;
        hotplug::let_go_of_interface(&wanted)
            .map_err(|source| NetworkError::Io { action: "let go of a device", source })?;
    }
    for route in &request.gone_routes {
        let Ok(message) = route_message(handle, route).await else { continue };
        gone_or(handle.route().del(message).execute().await)
            .map_err(failed("remove the route to", &route.destination))?;
    }
    for neighbour in &request.gone_neighbours {
        let Ok(index) = find(handle, &neighbour.interface, "").await else { continue };
        let gone = handle.neighbours().add(index, address(&neighbour.address)?).message_mut().clone();
        let removed = handle.neighbours().del(gone).execute().await;
        gone_or(removed).map_err(failed("remove the neighbour", &neighbour.address))?;
    }
    Ok(())
}

/// Success when there was nothing to remove.
fn gone_or(removed: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match removed {
        Err(rtnetlink::Error::NetlinkError(error))
            if [libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL].contains(&-error.raw_code()) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn failed(action: &'static str, of: &str) -> impl Fn(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::Netlink { action, of: of.to_owned(), source }
}

async fn set_interface(handle: &Handle, interface: &Interface) -> Done {
    let wanted = if interface.mac.is_empty() { &interface.name } else { &interface.mac };
    let index = plugged_in(handle, &interface.name, &interface.mac).await?;
    let named = find(handle, &interface.name, "").await.ok();
    if !interface.mac.is_empty() && !interface.name.is_empty() && named != Some(index) {
        if let Some(other) = named {
            // Two interfaces that came in the other order than their names: this one's turn to be named comes as well.
            rename(handle, other, format!("unnamed{other}"), wanted).await?;
        }
        rename(handle, index, interface.name.clone(), wanted).await?;
    }
    trust_link_local(&interface.name)?;
    let mut up = LinkUnspec::new_with_index(index).up();
    if interface.mtu > 0 {
        up = up.mtu(interface.mtu);
    }
    handle.link().set(up.build()).execute().await.map_err(failed("bring up", wanted))?;
    for text in &interface.gone_addresses {
        let (address, prefix_len) = prefix(text)?;
        let gone = handle.address().add(index, address, prefix_len).message_mut().clone();
        gone_or(handle.address().del(gone).execute().await).map_err(failed("remove the address", text))?;
    }
    for text in &interface.addresses {
        let (address, prefix_len) = prefix(text)?;
        let mut add = handle.address().add(index, address, prefix_len).replace();
        // Whoever gave the address has made sure that it is free; looking again would take a second.
        let mut flags = AddressFlags::Nodad;
        if interface.noprefixroute.contains(text) {
            flags |= AddressFlags::Noprefixroute;
        }
        add.message_mut().attributes.push(AddressAttribute::Flags(flags));
        add.execute().await.map_err(failed("add the address", text))?;
    }
    Ok(())
}

/// Lets an interface have its link-local address at once (RFC 4862, 5.1: `DupAddrDetectTransmits` 0), which is made of a hardware
/// address that is the guest's alone. Until it has one, passt does not know where to send what comes from the host's ::1.
fn trust_link_local(name: &str) -> Done {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"), "0") {
        // The guest has no IPv6, or the interface has another name.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written.map_err(|source| NetworkError::Io { action: "trust a link-local address", source }),
    }
}

async fn rename(handle: &Handle, index: u32, name: String, wanted: &str) -> Done {
    // A name can be changed only while the interface is down.
    let down = LinkUnspec::new_with_index(index).down().build();
    handle.link().set(down).execute().await.map_err(failed("take down", wanted))?;
    let named = LinkUnspec::new_with_index(index).name(name).build();
    handle.link().set(named).execute().await.map_err(failed("rename", wanted))
}

async fn set_route(handle: &Handle, route: &Route) -> Done {
    let add = handle.route().add(route_message(handle, route).await?).replace();
    add.execute().await.map_err(failed("add the route to", &route.destination))
}

async fn route_message(handle: &Handle, route: &Route) -> Result<RouteMessage, NetworkError> {
    let (destination, prefix_len) = prefix(&route.destination)?;
    let invalid = || NetworkError::Invalid { what: "a route", text: route.destination.clone() };
    let mut message =
        RouteMessageBuilder::<IpAddr>::new().destination_prefix(destination, prefix_len).map_err(|_| invalid())?;
    if route.gateway.is_empty() {
        // Only then can a gateway lie behind it.
        message.get_mut().header.scope = if destination.is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    } else {
        message = message.gateway(address(&route.gateway)?).map_err(|_| invalid())?;
    }
    if route.on_link {
        message = message.onlink();
    }
    if !route.source.is_empty() {
        message = message.pref_source(address(&route.source)?).map_err(|_| invalid())?;
    }
    if !route.interface.is_empty() {
        message = message.output_interface(find(handle, &route.interface, "").await?);
    }
    if route.metric > 0 {
        message = message.priority(route.metric);
    }
    Ok(message.build())
}

async fn set_neighbour(handle: &Handle, neighbour: &Neighbour) -> Done {
    let index = find(handle, &neighbour.interface, "").await?;
    let add = handle.neighbours().add(index, address(&neighbour.address)?).link_layer_address(&mac(&neighbour.mac)?);
    add.replace().execute().await.map_err(failed("add the neighbour", &neighbour.address))
}

/// As [`find`]; looks at the PCI bus again and waits for an interface whose device was plugged in just now.
async fn plugged_in(handle: &Handle, name: &str, mac_text: &str) -> Result<u32, NetworkError> {
    let io = |action| move |source| NetworkError::Io { action, source };
    // Before the look at the bus, so that no event is missed.
    let events = hotplug::device_events().map_err(io("listen to events of devices"))?;
    match find(handle, name, mac_text).await {
        Err(NetworkError::NoInterface(_)) => hotplug::rescan_pci().map_err(io("look at the PCI bus"))?,
        done => return done,
    }
    let found = async {
        loop {
            match find(handle, name, mac_text).await {
                Err(NetworkError::NoInterface(_)) => {
                    hotplug::next_event(&events).await.map_err(io("listen to events of devices"))?;
                }
                done => return done,
            }
        }
    };
    let missing = || NetworkError::NoInterface(if mac_text.is_empty() { name } else { mac_text }.to_owned());
    tokio::time::timeout(DEVICE_DEADLINE, found).await.unwrap_or_else(|_| Err(missing()))
}

/// The index of the interface with the MAC address if that is given, else with the name.
async fn find(handle: &Handle, name: &str, mac_text: &str) -> Result<u32, NetworkError> {
    let wanted = if mac_text.is_empty() { None } else { Some(mac(mac_text)?) };
    let links: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(failed("list", "the interfaces"))?;
    let is_wanted = |attribute: &LinkAttribute| match (attribute, &wanted) {
        (LinkAttribute::Address(found), Some(wanted)) => found.as_slice() == wanted,
        (LinkAttribute::IfName(found), None) => found == name,
        _ => false,
    };
    let found = links.iter().find(|link| link.attributes.iter().any(is_wanted)).map(|link| link.header.index);
    found.ok_or_else(|| NetworkError::NoInterface(if mac_text.is_empty() { name } else { mac_text }.to_owned()))
}

fn address(text: &str) -> Result<IpAddr, NetworkError> {
    text.parse().map_err(|_| NetworkError::Invalid { what: "an IP address", text: text.to_owned() })
}

/// An address and the length of its prefix.
fn prefix(text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let invalid = || NetworkError::Invalid { what: "an address with the length of its prefix", text: text.to_owned() };
    let (start, len) = text.split_once('/').ok_or_else(invalid)?;
    let (start, len): (IpAddr, u8) = (start.parse().map_err(|_| invalid())?, len.parse().map_err(|_| invalid())?);
    let longest = if start.is_ipv4() { 32 } else { 128 };
    if len > longest { Err(invalid()) } else { Ok((start, len)) }
}

fn mac(text: &str) -> Result<Vec<u8>, NetworkError> {
    // Digits alone: from_str_radix also takes a sign.
    let is_byte = |part: &str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
    let byte = |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| is_byte(part));
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    let invalid = || NetworkError::Invalid { what: "a MAC address", text: text.to_owned() };
    bytes.filter(|bytes| bytes.len() == 6).ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::{mac, prefix};

    #[test]
    fn prefix_has_an_address_and_a_length_that_fits() {
        assert_eq!(prefix("10.0.0.2/24").expect("v4").1, 24);
        assert_eq!(prefix("fd00::2/64").expect("v6").1, 64);
        assert!(prefix("10.0.0.2/33").is_err());
        assert!(prefix("10.0.0.2").is_err());
        assert!(prefix("x/8").is_err());
    }

    #[test]
    fn mac_address_has_six_bytes() {
        assert_eq!(mac("02:00:00:00:0a:ff").expect("a MAC address"), [2, 0, 0, 0, 10, 255]);
        assert!(mac("02:00:00:00:0a").is_err());
        assert!(mac("02:00:00:00:0a:+f").is_err());
        assert!(mac("").is_err());
    }
}
