//! `--network`, `--publish`, `--dns`, `--add-host`, `--ip` and `--ip6`: which network a container's VM gets, and the files that
//! tell the container of it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::Spec;
use rustix::fs::{AtFlags, statat};
use sandbox::network::pod::{PodOptions, attach};
use sandbox::network::user::{self, PortForward, UserOptions};
use sandbox::network::{Network, Policy, resolv_conf};
use sandbox::plan::{self, GuestFile};

use crate::cli::RunArgs;

pub(crate) mod bridge;

/// Where the host's name servers stand: those that systemd-resolved asks, when the usual file only names itself.
const RESOLVER_FILES: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// Value of `--network`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum NetworkMode {
    /// Loopback only.
    None,
    /// passt.
    User,
    /// A bridge of the host.
    Bridge,
    /// A namespace that somebody else has wired.
    Netns(PathBuf),
}

impl FromStr for NetworkMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "user" => Ok(Self::User),
            None if text == "bridge" => Ok(Self::Bridge),
            Some(("netns", path)) if !path.is_empty() => Ok(Self::Netns(path.into())),
            _ if text == "host" => {
                Err("a VM does not share the host's network: use user, and --publish for its ports".to_owned())
            }
            _ => Err(format!("{text:?} is not none, user, bridge or netns:PATH")),
        }
    }
}

/// Reads a value of `--publish`: `[IP:]HOST:GUEST[/tcp|/udp]`, or one port for both.
pub(crate) fn parse_port(text: &str) -> Result<PortForward, String> {
    let bad = || format!("{text:?} is not [IP:]HOST:GUEST[/udp]");
    let (ports, protocol) = text.rsplit_once('/').unwrap_or((text, "tcp"));
    let udp = match protocol {
        "tcp" => false,
        "udp" => true,
        _ => return Err(bad()),
    };
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(bad);
    let (rest, guest) = ports.rsplit_once(':').unwrap_or((ports, ports));
    let (address, host) = match rest.rsplit_once(':') {
        Some((address, host)) => (Some(address), host),
        None => (None, rest),
    };
    let address = address.map(|address| address.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>());
    let host_address = address.transpose().map_err(|_| bad())?;
    Ok(PortForward { host_address, host_port: port(host)?, guest_port: port(guest)?, udp })
}

/// Reads a value of `--add-host`: `NAME:ADDRESS`.
pub(crate) fn parse_host(text: &str) -> Result<(String, IpAddr), String> {
    let bad = || format!("{text:?} is not NAME:ADDRESS");
    let (name, address) = text.split_once([':', '=']).ok_or_else(bad)?;
    let address = address.trim_start_matches('[').trim_end_matches(']').parse().map_err(|_| bad())?;
    if name.is_empty() || name.contains(char::is_whitespace) {
        return Err(bad());
    }
    Ok((name.to_owned(), address))
}

/// Makes the network that the command line asks for, with a pair of queues for each vCPU. Without a wish it is none. What stays of it on the
/// host is taken back with the data folder.
pub(crate) fn create(args: &RunArgs, vcpus: u8, data_dir: &Path) -> Result<Network> {
    let wished = if args.publish.is_empty() && args.ip.is_none() { NetworkMode::None } else { NetworkMode::User };
    match args.network.as_ref().unwrap_or(&wished) {
        NetworkMode::Netns(path) => {
            refuse_ports(args, "the plugin that wired the namespace forwards its ports and gives addresses")?;
            join(path, &args.dns, vcpus, args.vhost_net)
        }
        NetworkMode::Bridge => {
            let wishes = bridge::Wishes { ip: args.ip, ip6: args.ip6, published: &args.publish };
            let wired = bridge::create(data_dir, &wishes).context("cannot make the network")?;
            let servers = if args.dns.is_empty() { host_servers() } else { args.dns.clone() };
            let mut network = join(&wired.netns, &servers, vcpus, args.vhost_net)?;
            network.hold(wired.ports);
            Ok(network)
        }
        NetworkMode::None => {
            refuse_ports(args, "a container without a network has none")?;
            refuse_vhost(args)?;
            Ok(Network::default())
        }
        NetworkMode::User => {
            refuse_vhost(args)?;
            refuse_ip6(args, "in user mode each guest has the same address of IPv6")?;
            user::start(&user_options(args)?).context("cannot make the network")
        }
    }
}

fn join(netns: &Path, dns: &[IpAddr], vcpus: u8, vhost: bool) -> Result<Network> {
    let policy = Policy { vhost, ..Policy::default() };
    let options = PodOptions { queue_pairs: vcpus, resolv_conf: resolv_conf(dns), policy };
    attach(netns, &options).context("cannot use the network namespace")
}

/// Name servers of the host that a guest can reach.
fn host_servers() -> Vec<IpAddr> {
    let files = RESOLVER_FILES.iter().filter_map(|file| fs::read_to_string(file).ok());
    files.map(|text| servers(&text)).find(|servers| !servers.is_empty()).unwrap_or_default()
}

/// The servers of a `resolv.conf`, without those of the host's loopback.
fn servers(resolv_conf: &str) -> Vec<IpAddr> {
    let values = resolv_conf.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    values.filter_map(|value| value.trim().parse().ok()).filter(|server: &IpAddr| !server.is_loopback()).collect()
}

/// Whether the container is to be told anything of a network.
pub(crate) fn is_wished(args: &RunArgs) -> bool {
    args.network.is_some()
        || !(args.publish.is_empty() && args.ip.is_none() && args.dns.is_empty() && args.add_host.is_empty())
}

fn refuse_vhost(args: &RunArgs) -> Result<()> {
    if args.vhost_net {
        bail!("--vhost-net needs --network bridge or netns:PATH: only those have a TAP interface");
    }
    Ok(())
}

fn refuse_ports(args: &RunArgs, why: &str) -> Result<()> {
    match (args.publish.is_empty(), args.ip) {
        (false, _) => bail!("--publish needs --network user or bridge: {why}"),
        (_, Some(_)) => bail!("--ip needs --network user or bridge: {why}"),
        _ => refuse_ip6(args, why),
    }
}

fn refuse_ip6(args: &RunArgs, why: &str) -> Result<()> {
    if args.ip6.is_some() {
        bail!("--ip6 needs --network bridge: {why}");
    }
    Ok(())
}

fn user_options(args: &RunArgs) -> Result<UserOptions> {
    if args.ip.is_some_and(|ip| matches!(ip.octets()[3], 0 | 1 | 3 | 255)) {
        bail!("--ip: .1 is the gateway's and .3 the resolver's; use another address of the network");
    }
    Ok(UserOptions { address: args.ip, ports: args.publish.clone(), dns: args.dns.clone(), policy: Policy::default() })
}

/// Tells the container of its network by `/etc/hosts` and `/etc/resolv.conf`, unless it brings its own.
pub(crate) fn tell(args: &RunArgs, name: &str, network: &mut Network, spec: &mut Spec, tree: &OwnedFd) {
    let hostname = args.hostname.as_deref().unwrap_or(name);
    network.set_hosts(hosts(hostname, network.addresses(), &args.add_host));
    let mut files = vec![GuestFile::Hosts];
    if !network.resolv_conf().is_empty() {
        files.push(GuestFile::ResolvConf);
    }
    for file in files {
        // A file that is not there can be mounted only where it can be made.
        let there = statat(tree, file.container_path().trim_start_matches('/'), AtFlags::empty()).is_ok();
        if there || !args.read_only {
            plan::add_guest_file(spec, file);
        }
    }
}

/// The text of `/etc/hosts`, which names the container by each of its addresses.
fn hosts<'a>(hostname: &str, addresses: impl Iterator<Item = &'a str>, added: &[(String, IpAddr)]) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for (name, address) in added {
        text.push_str(&format!("{address}\t{name}\n"));
    }
    let mut addresses = addresses.peekable();
    if addresses.peek().is_none() {
        text.push_str(&format!("{}\t{hostname}\n", Ipv4Addr::LOCALHOST));
    }
    for own in addresses {
        text.push_str(&format!("{own}\t{hostname}\n"));
    }
    text
}

/// Reads an address for `--ip`.
pub(crate) fn parse_ip(text: &str) -> Result<Ipv4Addr, String> {
    text.parse().map_err(|_| format!("{text:?} is not an IPv4 address"))
}

/// Reads an address for `--ip6`.
pub(crate) fn parse_ip6(text: &str) -> Result<Ipv6Addr, String> {
    text.parse().map_err(|_| format!("{text:?} is not an IPv6 address"))
}

/// The address of a name server.
pub(crate) fn parse_dns(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is not an IP address"))
}

#[cfg(test)]
mod tests {
    use std::iter;

    use super::*;

    #[test]
    fn ports_are_read_as_docker_reads_them() {
        let tcp = PortForward { host_address: None, host_port: 8080, guest_port: 80, udp: false };
        assert_eq!(parse_port("8080:80"), Ok(tcp));
        assert_eq!(parse_port("8080:80/tcp"), Ok(tcp));
        assert_eq!(parse_port("80"), Ok(PortForward { host_port: 80, ..tcp }));
        let local = PortForward { host_address: Some("127.0.0.1".parse().expect("v4")), udp: true, ..tcp };
        assert_eq!(parse_port("127.0.0.1:8080:80/udp"), Ok(local));
        let v6 = PortForward { host_address: Some("::1".parse().expect("v6")), ..tcp };
        assert_eq!(parse_port("[::1]:8080:80"), Ok(v6));
        let everywhere = PortForward { host_address: Some("::".parse().expect("v6")), udp: true, ..tcp };
        assert_eq!(parse_port("[::]:8080:80/udp"), Ok(everywhere));
        for bad in ["", "x", "80:x", "0:80", "70000:80", "8080:80/sctp", "a:8080:80", "[::g]:8080:80"] {
            assert!(parse_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn networks_are_named() {
        assert_eq!("none".parse(), Ok(NetworkMode::None));
        assert_eq!("bridge".parse(), Ok(NetworkMode::Bridge));
        assert_eq!("netns:/run/netns/a".parse(), Ok(NetworkMode::Netns("/run/netns/a".into())));
        assert!("host".parse::<NetworkMode>().expect_err("refused").contains("host's network"));
        assert!("netns:".parse::<NetworkMode>().is_err());
    }

    #[test]
    fn servers_of_the_hosts_loopback_are_left_out() {
        let text = "# a comment\nnameserver 127.0.0.53\nnameserver 192.0.2.53\n nameserver fd00::53\noptions edns0\n";
        let expected = ["192.0.2.53", "fd00::53"].map(|server| server.parse::<IpAddr>().expect("an address"));
        assert_eq!(servers(text), expected);
    }

    #[test]
    fn hosts_name_the_container_and_what_was_added() {
        let added = [parse_host("db:10.0.0.9").expect("a host"), parse_host("six:[fd00::1]").expect("a host")];
        let text = hosts("box", ["10.214.0.2", "fd00:214::2"].into_iter(), &added);
        assert!(text.ends_with("\n10.0.0.9\tdb\nfd00::1\tsix\n10.214.0.2\tbox\nfd00:214::2\tbox\n"), "{text}");
        assert!(hosts("box", iter::empty(), &[]).ends_with("\n127.0.0.1\tbox\n"));
        assert!(parse_host("db").is_err() && parse_host(":10.0.0.1").is_err());
    }
}
