//! User mode: `passt` turns the guest's frames into sockets of an ordinary process, so a VM has a network without any set-up
//! on the host. The guest reaches what the host reaches, but not the host's loopback; the host reaches forwarded ports.
//!
//! passt ends when its socket is closed, thus with the VMM, whatever happens to us.

use std::env;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vmm_api::net::{Backend, NetDevice};

use super::{Held, Interface, MacAddress, Network, NetworkError, Policy, facts, netns};
use crate::message::{Interface as GuestInterface, Route, SetNetworkRequest};

/// The guest's address, when the caller has no wish.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 2);
/// Length of the prefix of the network that guest and gateway pretend to share.
const PREFIX_LEN: u8 = 24;
/// The same of IPv6, where the host has a default route of it. To public addresses programs prefer IPv4 then (RFC 6724, 2.1).
const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x213, 0, 0, 0, 0, 0, 2);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x213, 0, 0, 0, 0, 0, 1);
const PREFIX_LEN_V6: u8 = 64;
/// Host parts of the gateway and of the address at which the host's resolver answers.
const GATEWAY_HOST: u8 = 1;
const RESOLVER_HOST: u8 = 3;
/// The longest packets that passt carries; fewer of them cost less.
const MTU: u16 = 65_520;
/// Number of the socket in passt.
const SOCKET_FD: i32 = 3;
/// Time that passt has to answer.
const READY_DEADLINE: Duration = Duration::from_secs(10);
/// Most bytes of its words that are kept.
const MAX_WORDS: u64 = 4096;

/// A port of the host that reaches one of the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PortForward {
    /// Address of the host to listen at, or all.
    pub host_address: Option<IpAddr>,
    /// Port of the host.
    pub host_port: u16,
    /// Port of the guest.
    pub guest_port: u16,
    /// UDP instead of TCP.
    pub udp: bool,
}

/// What a user-mode network is made with.
#[derive(Clone, Debug, Default)]
pub struct UserOptions {
    /// The guest's address, or [`DEFAULT_ADDRESS`]. Its last byte is neither 1 nor 3.
    pub address: Option<Ipv4Addr>,
    /// Ports of the host.
    pub ports: Vec<PortForward>,
    /// Name servers instead of the host's.
    pub dns: Vec<IpAddr>,
    /// Limits and rules.
    pub policy: Policy,
}

/// The running program; killed when dropped.
pub(crate) struct Passt(Child);

impl Drop for Passt {
    fn drop(&mut self) {
        // It has usually ended with its socket.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program, if it is installed.
#[must_use]
pub fn find_passt() -> Option<PathBuf> {
    let executable = |path: &PathBuf| {
        path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    let path = env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/usr/local/bin".into());
    env::split_paths(&path).map(|folder| folder.join("passt")).find(executable)
}

/// Starts passt and waits until it carries frames and listens at every port. Blocks for some milliseconds.
///
/// # Errors
/// [`NetworkError::NoPasst`], [`NetworkError::NoIpv6`], [`NetworkError::Passt`] and [`NetworkError::Host`].
pub fn start(options: &UserOptions) -> Result<Network, NetworkError> {
    let program = find_passt().ok_or(NetworkError::NoPasst)?;
    let mac = random_mac()?;
    let address = options.address.unwrap_or(DEFAULT_ADDRESS);
    let has_v6 = netns::stay(async |handle| facts::has_ipv6_route(&handle).await)?;
    if !has_v6 {
        refuse_v6(&options.ports)?;
    }
    let (mut ours, theirs) = UnixStream::pair().map_err(NetworkError::host("make a socket for passt"))?;
    let mut words = words_file().map_err(NetworkError::host("make a file for the words of passt"))?;
    let child = spawn(&program, arguments(options, address, has_v6), theirs.into(), &words)?;
    let passt = Passt(child);
    if greet(&mut ours, mac, address).is_err() {
        drop(passt);
        return Err(NetworkError::Passt { said: said(&mut words) });
    }
    let mut addresses = vec![IpAddr::from(address)];
    addresses.extend(has_v6.then_some(IpAddr::from(ADDRESS_V6)));
    let device = NetDevice {
        name: "eth0".to_owned(),
        mac,
        mtu: MTU,
        backend: Backend::Stream,
        rx_limit: options.policy.rx_limit,
        tx_limit: options.policy.tx_limit,
        only_from: options.policy.anti_spoofing.then_some(addresses),
    };
    let mut guest = guest(&device, address, &options.dns);
    if has_v6 {
        add_v6(&mut guest);
    }
    let held = Held { _passt: Some(passt), ..Default::default() };
    Ok(Network { interfaces: vec![Interface { device, fds: vec![ours.into()] }], guest, held })
}

fn spawn(program: &Path, arguments: Vec<String>, socket: OwnedFd, words: &File) -> Result<Child, NetworkError> {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(words.try_clone().map_err(NetworkError::host("make a file for the words of passt"))?);
    // An interrupt at the terminal is for the container.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mapping = FdMapping { parent_fd: socket, child_fd: SOCKET_FD };
    command.fd_mappings(vec![mapping]).map_err(|_| NetworkError::Host {
        action: "hand a socket to passt".to_owned(),
        source: io::ErrorKind::InvalidInput.into(),
    })?;
    command.spawn().map_err(NetworkError::host(format!("start {}", program.display())))
}

fn arguments(options: &UserOptions, address: Ipv4Addr, has_v6: bool) -> Vec<String> {
    let mut words = ["--foreground", "--stderr", "--quiet", "--fd"].map(str::to_owned).to_vec();
    words.push(SOCKET_FD.to_string());
    let mut add = |flag: &str, value: String| words.extend([flag.to_owned(), value]);
    add("--address", address.to_string());
    add("--netmask", PREFIX_LEN.to_string());
    add("--gateway", in_network(address, GATEWAY_HOST).to_string());
    add("--dns-forward", in_network(address, RESOLVER_HOST).to_string());
    for udp in [false, true] {
        let flag = if udp { "--udp-ports" } else { "--tcp-ports" };
        let mut ports = options.ports.iter().filter(|port| port.udp == udp).peekable();
        if ports.peek().is_none() {
            // Without the word, UDP follows TCP.
            add(flag, "none".to_owned());
        }
        for port in ports {
            add(flag, port_spec(port));
        }
    }
    if has_v6 {
        add("--address", ADDRESS_V6.to_string());
        add("--gateway", GATEWAY_V6.to_string());
    } else {
        words.push("--ipv4-only".to_owned());
    }
    // The guest is told its addresses by its agent. The host's loopback is for the host: the gateway is no name of it, and
    // frames for it end in the VMM.
    words.extend(["--no-dhcp", "--no-dhcpv6", "--no-ra", "--no-map-gw"].map(str::to_owned));
    words
}

/// Otherwise passt would say only that it cannot listen there.
fn refuse_v6(ports: &[PortForward]) -> Result<(), NetworkError> {
    let listens = |port: &PortForward| Some(SocketAddr::new(port.host_address?, port.host_port));
    match ports.iter().filter_map(listens).find(SocketAddr::is_ipv6) {
        Some(address) => Err(NetworkError::NoIpv6 { address }),
        None => Ok(()),
    }
}

fn port_spec(port: &PortForward) -> String {
    // A server of the guest may have IPv4 alone, and passt takes a connection before it knows.
    let address = port.host_address.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
    format!("{address}/{}:{}", port.host_port, port.guest_port)
}

fn guest(device: &NetDevice, address: Ipv4Addr, dns: &[IpAddr]) -> SetNetworkRequest {
    let servers = if dns.is_empty() { vec![in_network(address, RESOLVER_HOST).into()] } else { dns.to_vec() };
    SetNetworkRequest {
        interfaces: vec![GuestInterface {
            name: device.name.clone(),
            mac: device.mac.to_string(),
            addresses: vec![format!("{address}/{PREFIX_LEN}")],
            mtu: device.mtu.into(),
            ..Default::default()
        }],
        routes: vec![Route {
            destination: "0.0.0.0/0".to_owned(),
            gateway: in_network(address, GATEWAY_HOST).to_string(),
            interface: device.name.clone(),
            ..Default::default()
        }],
        resolv_conf: super::resolv_conf(&servers),
        ..Default::default()
    }
}

fn add_v6(guest: &mut SetNetworkRequest) {
    for interface in &mut guest.interfaces {
        interface.addresses.push(format!("{ADDRESS_V6}/{PREFIX_LEN_V6}"));
        guest.routes.push(Route {
            destination: "::/0".to_owned(),
            gateway: GATEWAY_V6.to_string(),
            interface: interface.name.clone(),
            ..Default::default()
        });
    }
}

fn in_network(address: Ipv4Addr, host: u8) -> Ipv4Addr {
    let [a, b, c, _] = address.octets();
    Ipv4Addr::new(a, b, c, host)
}

/// Asks for the gateway's hardware address (RFC 826) and waits for the answer: passt then works, and knows the guest's.
fn greet(socket: &mut UnixStream, mac: MacAddress, address: Ipv4Addr) -> io::Result<()> {
    const REQUEST: [u8; 10] = [0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1];
    let gateway = in_network(address, GATEWAY_HOST).octets();
    let frame = [&[0xff; 6][..], &mac.0, &REQUEST, &mac.0, &address.octets(), &[0; 6], &gateway].concat();
    let len = u32::try_from(frame.len()).expect("42");
    socket.set_read_timeout(Some(READY_DEADLINE))?;
    socket.write_all(&[&len.to_be_bytes()[..], &frame].concat())?;
    let mut prefix = [0; 4];
    socket.read_exact(&mut prefix)?;
    // Whatever it says first, it speaks.
    let len = usize::try_from(u32::from_be_bytes(prefix)).unwrap_or(usize::MAX).min(usize::from(u16::MAX));
    socket.read_exact(&mut vec![0; len])?;
    socket.set_read_timeout(None)
}

/// Room for [`MAX_WORDS`] and no more: who has taken passt over must not fill our memory with words.
fn words_file() -> io::Result<File> {
    let file = File::from(memfd_create("passt-words", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(MAX_WORDS)?;
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

fn said(words: &mut File) -> String {
    let mut text = Vec::new();
    let read = words.rewind().and_then(|()| words.read_to_end(&mut text));
    let text = String::from_utf8_lossy(&text).into_owned();
    // What was not written is zero.
    let lines: Vec<&str> = text.trim_end_matches('\0').lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match read {
        Ok(_) if !lines.is_empty() => lines.join("; "),
        _ => format!("it did not answer within {} ms, and said nothing", READY_DEADLINE.as_millis()),
    }
}

fn random_mac() -> Result<MacAddress, NetworkError> {
    let mut bytes = [0; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| NetworkError::host("read random bytes")(error.into()))?;
    // Locally administered, for one station.
    bytes[0] = bytes[0] & 0xfc | 0x02;
    Ok(MacAddress(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_words_are_kept_as_far_as_there_is_room() {
        let mut words = words_file().expect("a file");
        words.write_all(b"one \n\n two\n").expect("written");
        assert_eq!(said(&mut words), "one; two");
        words.rewind().expect("rewound");
        let mut written = 0;
        while let Ok(length) = words.write(&[b'x'; 1000]) {
            written += length as u64;
            assert!(written <= MAX_WORDS, "{written}");
        }
    }

    #[test]
    fn ports_are_written_as_passt_reads_them() {
        let tcp = PortForward { host_address: None, host_port: 8080, guest_port: 80, udp: false };
        let udp =
            PortForward { host_address: Some(Ipv4Addr::LOCALHOST.into()), host_port: 53, guest_port: 53, udp: true };
        let options = UserOptions { ports: vec![tcp, udp], ..Default::default() };
        let words = arguments(&options, DEFAULT_ADDRESS, false).join(" ");
        assert!(words.contains("--tcp-ports 0.0.0.0/8080:80") && words.contains("--ipv4-only"), "{words}");
        assert!(words.contains("--udp-ports 127.0.0.1/53:53"), "{words}");
        let at_loopback = PortForward { host_address: Some(Ipv6Addr::LOCALHOST.into()), ..tcp };
        let options = UserOptions { ports: vec![tcp, at_loopback], ..Default::default() };
        let words = arguments(&options, DEFAULT_ADDRESS, true).join(" ");
        assert!(words.contains("--tcp-ports 0.0.0.0/8080:80 --tcp-ports ::1/8080:80"), "{words}");
        let words = arguments(&UserOptions::default(), DEFAULT_ADDRESS, true).join(" ");
        assert!(words.contains("--tcp-ports none --udp-ports none") && words.contains("--no-map-gw"), "{words}");
        assert!(words.contains("--gateway fd00:213::1") && !words.contains("--ipv4-only"), "{words}");
    }

    #[test]
    fn ports_of_ipv6_are_refused_where_there_is_none() {
        let port = PortForward { host_address: None, host_port: 8080, guest_port: 80, udp: false };
        let at_loopback = PortForward { host_address: Some(Ipv6Addr::LOCALHOST.into()), ..port };
        refuse_v6(&[port]).expect("it is one of IPv4");
        let refused = refuse_v6(&[port, at_loopback]).expect_err("refused").to_string();
        assert!(refused.starts_with("cannot publish at [::1]:8080: "), "{refused}");
    }

    #[test]
    fn the_guest_is_told_of_the_gateway_and_of_the_host_s_resolver() {
        let device = NetDevice {
            name: "eth0".to_owned(),
            mac: MacAddress([2, 0, 0, 0, 0, 1]),
            mtu: MTU,
            backend: Backend::Stream,
            rx_limit: Default::default(),
            tx_limit: Default::default(),
            only_from: None,
        };
        let mut told = guest(&device, DEFAULT_ADDRESS, &[]);
        assert_eq!(told.interfaces[0].addresses, ["10.213.0.2/24"]);
        add_v6(&mut told);
        assert_eq!(told.interfaces[0].addresses, ["10.213.0.2/24", "fd00:213::2/64"]);
        assert_eq!((told.routes[1].destination.as_str(), told.routes[1].gateway.as_str()), ("::/0", "fd00:213::1"));
        assert_eq!(told.routes[0].gateway, "10.213.0.1");
        assert_eq!(told.resolv_conf, "nameserver 10.213.0.3\n");
        let servers = ["1.1.1.1", "fd99::53"].map(|server| server.parse::<IpAddr>().expect("an address"));
        let told = guest(&device, DEFAULT_ADDRESS, &servers);
        assert_eq!(told.resolv_conf, "nameserver 1.1.1.1\nnameserver fd99::53\n");
    }
}
