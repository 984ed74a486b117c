//! Ports of the host that lead to a container on the bridge. The plugin portmap leads them there by rules of the host's kernel; here
//! they are taken by sockets that nobody reads, so that no other program thinks that they are free.

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{setsockopt, sockopt::BindToDevice};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use sandbox::network::user::PortForward;

/// Refuses ports that portmap would take, and that would lead nowhere.
pub(super) fn refuse_loopback(published: &[PortForward]) -> Result<()> {
    let at_loopback = |port: &&PortForward| port.host_address == Some(Ipv6Addr::LOCALHOST.into());
    if let Some(port) = published.iter().find(at_loopback) {
        bail!(
            "--publish: no kernel routes what comes from ::1, so [::1]:{} cannot lead to a bridge: use --network user, or \
             vmrun port-forward --address ::1",
            port.host_port
        );
    }
    Ok(())
}

/// Takes each port of the host at each address at which it is published.
pub(super) fn hold(published: &[PortForward], has_ipv6: bool) -> Result<Vec<OwnedFd>> {
    let wanted = published.iter().flat_map(|port| addresses(port, has_ipv6).into_iter().map(|at| (at, port.udp)));
    let held =
        wanted.map(|(address, udp)| take(address, udp).with_context(|| format!("--publish: cannot take {address}")));
    held.collect()
}

/// Takes sockets of IPv6 away from the host's loopback, once the bridge is there: no rule leads on from ::1, so whoever connects there
/// is to be refused and not to wait, as programs need it that try ::1 before 127.0.0.1 when they are told `localhost`.
pub(super) fn leave_loopback(held: &[OwnedFd], bridge: &str) -> Result<()> {
    for socket in held {
        if sockopt::socket_domain(socket)? == AddressFamily::INET6 {
            let bound = setsockopt(socket, BindToDevice, &OsString::from(bridge));
            bound.with_context(|| format!("cannot bind a published port to {bridge}"))?;
        }
    }
    Ok(())
}

fn addresses(port: &PortForward, has_ipv6: bool) -> Vec<SocketAddr> {
    let addresses: Vec<IpAddr> = match port.host_address {
        Some(address) => vec![address],
        None if has_ipv6 => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        None => vec![Ipv4Addr::UNSPECIFIED.into()],
    };
    addresses.into_iter().map(|address| SocketAddr::new(address, port.host_port)).collect()
}

fn take(address: SocketAddr, udp: bool) -> io::Result<OwnedFd> {
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let kind = if udp { SocketType::DGRAM } else { SocketType::STREAM };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if address.is_ipv6() {
        // The same port of IPv4 has a socket of its own, or is somebody else's.
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if udp {
        bind(&socket, &address)?;
        return Ok(socket);
    }
    // As a server does, which connections of the last minute do not keep from its port.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    listen(&socket, 1)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const PORT: PortForward = PortForward { host_address: None, host_port: 8080, guest_port: 80, udp: false };

    #[test]
    fn a_port_that_somebody_has_cannot_be_taken() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = taken.local_addr().expect("an address");
        let port = PortForward { host_address: Some(address.ip()), host_port: address.port(), ..PORT };
        let refused = format!("{:#}", hold(&[port], true).expect_err("refused"));
        assert!(refused.contains(&format!("cannot take {address}: Address already in use")), "{refused}");
        drop(taken);
        let held = hold(&[port], true).expect("it is free again");
        TcpListener::bind(address).expect_err("it is held");
        drop(held);
        TcpListener::bind(address).expect("it is free again");
    }

    #[test]
    fn a_port_without_an_address_is_one_of_each_family() {
        let texts = |port: &PortForward, has_ipv6| {
            addresses(port, has_ipv6).iter().map(SocketAddr::to_string).collect::<Vec<_>>()
        };
        assert_eq!(texts(&PORT, false), ["0.0.0.0:8080"]);
        assert_eq!(texts(&PORT, true), ["0.0.0.0:8080", "[::]:8080"]);
        let named = PortForward { host_address: Some("fd99::2".parse().expect("v6")), ..PORT };
        assert_eq!(texts(&named, true), ["[fd99::2]:8080"]);
    }

    #[test]
    fn a_port_at_the_loopback_of_ipv6_is_refused_with_what_to_do() {
        let at = |address: &str| PortForward { host_address: Some(address.parse().expect("an address")), ..PORT };
        let refused = refuse_loopback(&[PORT, at("::1")]).expect_err("refused").to_string();
        assert!(refused.contains("[::1]:8080") && refused.contains("--network user"), "{refused}");
        refuse_loopback(&[PORT, at("127.0.0.1"), at("::"), at("fd99::2")]).expect("these lead somewhere");
    }
}
