//! `vmrun run` with the networks of the command line, in a host network of the story's own.

use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tests::dns::Dns;
use tests::echo::Echo;
use tests::lan::{Attachment, Lan, Netns, ip, ptp};
use tests::python::{Python, debian_image};
use tests::{Story, eventually, outcome};

/// Answers in a container, and asks from elsewhere.
const ECHO: &str = env!("CARGO_BIN_EXE_echo");
const USER: [&str; 2] = ["--network", "user"];
const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn a_web_server_is_reached_at_a_port_of_the_host() {
    let story = Story::new();
    let lan = Lan::enter();
    let _outside = lan.outside();
    let image = debian_image();
    let options = ["run", "--rm", "-p", "8080:80", "--name", "web"];
    let server = ["python3", "-u", "-m", "http.server", "80"];
    let arguments = [&options, &[image.as_str()][..], &server].concat();
    let mut vmrun = story.vmrun(&arguments).stdout(Stdio::piped()).spawn().expect("vmrun starts");
    let mut first = String::new();
    BufReader::new(vmrun.stdout.take().expect("piped")).read_line(&mut first).expect("a line");
    assert!(first.starts_with("Serving HTTP"), "{first}");
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "60", "http://127.0.0.1:8080/etc/debian_version"]);
    let page = outcome(curl);
    assert!(page.success().starts_with("12."), "{page:?}");
    let passt = status_of_passt(vmrun.id());
    assert!(!passt.contains("\nUid:\t0\t") && passt.contains("\nSeccomp:\t2\n"), "{passt}");
    assert_eq!(story.call(&["kill", "web"]).code, 0);
    assert_eq!(vmrun.wait().expect("ended").code(), Some(137));
}

/// What the kernel says of the passt that a `vmrun` in the foreground has started.
fn status_of_passt(vmrun: u32) -> String {
    let processes = fs::read_dir("/proc").expect("proc").flatten();
    let mut statuses = processes.filter_map(|process| fs::read_to_string(process.path().join("status")).ok());
    let parent = format!("\nPPid:\t{vmrun}\n");
    statuses.find(|status| status.starts_with("Name:\tpasst") && status.contains(&parent)).expect("it runs")
}

#[test]
fn the_outside_is_reached_by_tcp_and_names() {
    let story = Story::new();
    let lan = Lan::enter();
    let outside = lan.outside();
    let listener = outside.inside(|| TcpListener::bind("192.0.2.1:80")).expect("bound");
    let listener_v6 = outside.inside(|| TcpListener::bind("[fd99::1]:80")).expect("bound");
    let names = outside.inside(|| UdpSocket::bind("192.0.2.1:53")).expect("bound");
    let _dns = Dns::serve(names, "192.0.2.1".parse().expect("v4"), "fd99::1".parse().expect("v6"));
    let mut python = Python::start(&story, &[&USER[..], &["--dns", "192.0.2.1"]].concat());
    assert_eq!(python.eval("open('/etc/resolv.conf').read()"), "nameserver 192.0.2.1");
    python.exec("import socket");
    // Its name has both kinds of addresses, and one like the guest's own goes first.
    assert_eq!(python.exec("s = socket.create_connection(('story.example', 80), 60)"), "None");
    let (mut connection, from) = listener_v6.accept().expect("the guest connects");
    assert_eq!(from.ip().to_string(), "fd99::2");
    connection.write_all(b"hello").expect("sent");
    assert_eq!(python.eval("s.recv(16)"), "b'hello'");
    let mut received = vec![0; 1 << 20];
    let reader = std::thread::spawn(move || connection.read_exact(&mut received).map(|()| received));
    assert_eq!(python.exec("s.sendall(b'x' * (1 << 20))"), "None");
    assert!(reader.join().expect("no panic").expect("a megabyte").iter().all(|byte| *byte == b'x'));
    assert_eq!(python.exec("s = socket.create_connection(('192.0.2.1', 80), 60)"), "None");
    let (mut connection, from) = listener.accept().expect("the guest connects");
    assert_eq!(from.ip().to_string(), "192.0.2.2");
    connection.write_all(b"hello").expect("sent");
    assert_eq!(python.eval("s.recv(16)"), "b'hello'");
    assert_eq!(python.end(), 0);
}

#[test]
fn the_outside_is_reached_by_udp_and_icmp_and_the_name_servers_of_the_host_are_asked() {
    let story = Story::new();
    let lan = Lan::enter();
    let outside = lan.outside();
    let _echo = Echo::serve(outside.command(ECHO));
    let mut python = Python::of(with_name_server(&story, "192.0.2.1", &["--cap-add", "NET_RAW"]));
    python.exec("import socket");
    for (family, address) in [("AF_INET", "192.0.2.1"), ("AF_INET6", "fd99::1")] {
        python.exec(&format!("u = socket.socket(socket.{family}, socket.SOCK_DGRAM); u.settimeout(60)"));
        assert_eq!(python.exec(&format!("u.sendto(b'question', ('{address}', 7))")), "None");
        assert_eq!(python.eval("u.recv(99)"), "b'question'");
    }
    // An echo request and its reply (RFC 792).
    python.exec("p = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); p.settimeout(60)");
    python.exec("p.sendto(b'\\x08\\x00\\xf7\\xfd\\x00\\x01\\x00\\x01', ('192.0.2.1', 0))");
    assert_eq!(python.eval("p.recv(99)[20]"), "0");
    // The same of IPv6 (RFC 4443, 4), where the kernel adds the checksum, and neighbours are heard as well.
    python.exec("p = socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58); p.settimeout(60)");
    python.exec("p.sendto(b'\\x80\\x00\\x00\\x00\\x00\\x01\\x00\\x01', ('fd99::1', 0))");
    assert_eq!(python.eval("any(m[0] == 129 for m in iter(lambda: p.recv(99), None))"), "True");
    assert_eq!(python.eval("open('/etc/resolv.conf').read()"), "nameserver 10.213.0.3");
    let found = python.eval("sorted({one[4][0] for one in socket.getaddrinfo('story.example', 80)})");
    assert_eq!(found, "['192.0.2.1', 'fd99::1']");
    assert_eq!(python.end(), 0);
}

/// A Python in user mode on a host whose `resolv.conf` is another one.
fn with_name_server(story: &Story, server: &str, options: &[&str]) -> Command {
    let resolv_conf = story.volume().join("resolv.conf");
    fs::write(&resolv_conf, format!("nameserver {server}\n")).expect("a file");
    let vmrun = Python::command(story, &[&USER[..], options].concat());
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\""]).arg(resolv_conf);
    command.arg(vmrun.get_program()).args(vmrun.get_args());
    command
}

#[test]
fn ports_of_the_host_carry_udp_and_listen_where_they_were_told() {
    let story = Story::new();
    let lan = Lan::enter();
    let _outside = lan.outside();
    let mut python = Python::start(&story, &["-p", "53:53/udp", "-p", "127.0.0.1:8443:443"]);
    python.exec("import socket; u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('', 53))");
    // Not from loopback: passt of Debian 12 loses the answers there (shim/README.md).
    let client = UdpSocket::bind("192.0.2.2:0").expect("bound");
    client.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    client.send_to(b"question", "192.0.2.2:53").expect("sent");
    python.exec("u.settimeout(60); d, a = u.recvfrom(99); u.sendto(d + b'!', a)");
    let mut answer = [0; 99];
    let len = client.recv(&mut answer).expect("an answer");
    assert_eq!(&answer[..len], b"question!");
    python.exec("l = socket.create_server(('', 443)); l.settimeout(60)");
    let mut stream = TcpStream::connect("127.0.0.1:8443").expect("connected");
    stream.write_all(b"word").expect("sent");
    assert_eq!(python.eval("(c := l.accept()[0]).recv(4)"), "b'word'");
    assert_eq!(python.exec("c.sendall(b'secret'); c.close()"), "None");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("text");
    assert_eq!(text, "secret");
    TcpStream::connect("192.0.2.2:8443").expect_err("only loopback was asked for");
    assert_eq!(python.end(), 0);
}

#[test]
fn a_port_at_the_loopback_of_ipv6_and_a_name_server_of_ipv6_are_used_where_they_are_named() {
    let story = Story::new();
    let lan = Lan::enter();
    let outside = lan.outside();
    let names = outside.inside(|| UdpSocket::bind("[fd99::1]:53")).expect("bound");
    let _dns = Dns::serve(names, "192.0.2.1".parse().expect("v4"), "fd99::1".parse().expect("v6"));
    let mut python = Python::start(&story, &["-p", "[::1]:8443:443", "--dns", "fd99::1"]);
    python.exec("import socket; l = socket.create_server(('::', 443), family=socket.AF_INET6); l.settimeout(60)");
    let mut stream = TcpStream::connect("[::1]:8443").expect("connected");
    stream.write_all(b"word").expect("sent");
    assert_eq!(python.eval("(c := l.accept()[0]).recv(4)"), "b'word'");
    assert_eq!(python.exec("c.sendall(b'secret'); c.close()"), "None");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("text");
    assert_eq!(text, "secret");
    TcpStream::connect("127.0.0.1:8443").expect_err("only IPv6 was asked for");
    TcpStream::connect("[fd99::2]:8443").expect_err("only loopback was asked for");
    assert_eq!(python.eval("open('/etc/resolv.conf').read()"), "nameserver fd99::1");
    let found = python.eval("sorted({one[4][0] for one in socket.getaddrinfo('story.example', 80)})");
    assert_eq!(found, "['192.0.2.1', 'fd99::1']");
    assert_eq!(python.end(), 0);
}

/// Sends the first segment of a TCP connection (RFC 9293) to an address that the guest's kernel would not send to.
const FORGE: &str = r#"
import socket, struct
def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xffff) + (total >> 16)
    return struct.pack("!H", ~(total + (total >> 16)) & 0xffff)
def connect(address, port):
    addresses = socket.inet_aton("10.213.0.2") + socket.inet_aton(address)
    tcp = struct.pack("!HHIIBBHHHBBH", 40000, port, 1, 0, 0x60, 2, 64000, 0, 0, 2, 4, 1460)
    tcp = tcp[:16] + checksum(addresses + struct.pack("!HH", 6, len(tcp)) + tcp) + tcp[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0) + addresses
    ip = ip[:10] + checksum(ip) + ip[12:]
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    link.bind(("eth0", 0x800))
    link.send(b"\xff" * 6 + link.getsockname()[4] + b"\x08\x00" + ip + tcp)
def connect6(address, port):
    addresses = b"".join(socket.inet_pton(socket.AF_INET6, one) for one in ("fd00:213::2", address))
    tcp = struct.pack("!HHIIBBHHHBBH", 40000, port, 1, 0, 0x60, 2, 64000, 0, 0, 2, 4, 1440)
    tcp = tcp[:16] + checksum(addresses + struct.pack("!II", len(tcp), 6) + tcp) + tcp[18:]
    ip = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + addresses
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    link.bind(("eth0", 0x86dd))
    link.send(b"\xff" * 6 + link.getsockname()[4] + b"\x86\xdd" + ip + tcp)
"#;

#[test]
fn the_guest_does_not_reach_the_loopback_of_the_host() {
    let story = Story::new();
    let lan = Lan::enter();
    let _outside = lan.outside();
    let private = TcpListener::bind("127.0.0.1:4000").expect("bound");
    let private_v6 = TcpListener::bind("[::1]:4000").expect("bound");
    let public = TcpListener::bind("192.0.2.2:4001").expect("bound");
    let public_v6 = TcpListener::bind("[fd99::2]:4001").expect("bound");
    let mut python = Python::start(&story, &[&USER[..], &["--cap-add", "NET_RAW"]].concat());
    assert_eq!(python.exec(FORGE), "None");
    assert_eq!(python.eval("socket.create_connection(('10.213.0.1', 4000), 5)"), "timed out");
    assert_eq!(python.exec("connect('127.0.0.1', 4000); connect('0.0.0.0', 4000)"), "None");
    // Frames go in order: when this one has arrived, so have the others.
    assert_eq!(python.exec("connect('192.0.2.2', 4001)"), "None");
    public.accept().expect("the address of the host is reached");
    for local in ["::1", "::", "::ffff:127.0.0.1", "::127.0.0.1"] {
        assert_eq!(python.exec(&format!("connect6('{local}', 4000)")), "None");
    }
    assert_eq!(python.eval("socket.create_connection(('fd00:213::1', 4000), 5)"), "timed out");
    assert_eq!(python.exec("connect6('fd99::2', 4001)"), "None");
    public_v6.accept().expect("the address of the host is reached");
    for listener in [private, private_v6] {
        listener.set_nonblocking(true).expect("a flag");
        assert_eq!(listener.accept().expect_err("nobody came").kind(), ErrorKind::WouldBlock);
    }
    assert_eq!(python.end(), 0);
}

#[test]
fn hosts_are_added_and_a_container_without_a_network_has_loopback() {
    let story = Story::new();
    let options = ["--network", "none", "--add-host", "db:10.0.0.9", "--hostname", "box"];
    let done = story.run(&options, &["sh", "-c", "cat /etc/hosts; echo $(ls /sys/class/net); ping -c 1 127.0.0.1"]);
    assert!(done.success().contains("10.0.0.9\tdb\n127.0.0.1\tbox\n"), "{done:?}");
    assert!(done.stdout.lines().any(|line| line == "lo"), "no other interface: {done:?}");
    assert!(done.stdout.contains("1 packets received"), "{done:?}");
    assert_eq!(done.stderr, "");
}

#[test]
fn containers_on_the_bridge_reach_each_other_and_the_outside_and_are_reached_at_ports_of_the_host() {
    let story = Story::new();
    let lan = Lan::enter();
    let outside = lan.outside();
    let listener = outside.inside(|| TcpListener::bind("192.0.2.1:80")).expect("bound");
    let ports = ["-p", "8080:80", "-p", "8007:7", "-p", "8007:7/udp"];
    let options = [&["--network", "bridge", "--ip", "10.214.0.7", "--dns", "192.0.2.53"][..], &ports].concat();
    serve(&story, "web", &options);
    let curl = |url: &str| format!("curl --silent --show-error --max-time 60 http://{url}/passwd");
    eventually(DEADLINE, "the server listens", || outside.run(&curl("192.0.2.2:8080")).code == 0);
    assert_eq!(ask(&outside, "192.0.2.2"), "192.0.2.2 tcp 192.0.2.1\n192.0.2.2 udp\n");
    assert!(outside.run(&curl("192.0.2.2:8080")).success().starts_with("root:"));
    for url in ["10.214.0.7", "192.0.2.2:8080", "127.0.0.1:8080"] {
        let mut here = Command::new("sh");
        here.args(["-c", &curl(url)]);
        assert!(outcome(here).success().starts_with("root:"), "{url}");
    }
    let script = "cat /etc/resolv.conf; wget -q -O - http://10.214.0.7/passwd; nc -w 60 192.0.2.1 80 </dev/null";
    let greeter = greet(listener);
    let other =
        story.run(&["--name", "web-other", "--network", "bridge", "--dns", "192.0.2.53"], &["sh", "-c", script]);
    assert_eq!(greeter.join().expect("no panic"), "192.0.2.2", "the host's address stands for the container's");
    assert!(other.success().starts_with("nameserver 192.0.2.53\nroot:"), "{other:?}");
    assert!(other.stdout.ends_with("greetings"), "{other:?}");
    let taken = story.run(&["--name", "web-taken", "--network", "bridge", "-p", "8080:80"], &["true"]);
    assert_eq!(taken.code, 125);
    assert!(taken.stderr.contains("cannot take 0.0.0.0:8080: Address already in use"), "{taken:?}");
    let address = story.run(&["--name", "web-twice", "--network", "bridge", "--ip", "10.214.0.7"], &["true"]);
    assert!(address.stderr.contains("the CNI plugin bridge refused ADD") && address.code == 125, "{address:?}");
    let used = story.call(&["stats", "--no-stream", "--json", "web"]);
    let used: serde_json::Value = serde_json::from_str(used.success()).expect("JSON");
    assert!(used[0]["net_tx_bytes"].as_u64() > Some(1000) && used[0]["net_rx_bytes"].as_u64() > Some(100), "{used}");
    // Its supervisor is killed, so others have to clean up.
    kill_owner(&story, "web");
    assert_eq!(story.call(&["gc"]).success(), "web\n");
    assert_ne!(outside.run(&curl("192.0.2.2:8080")).code, 0, "nobody is there");
    assert!(given_addresses("web").is_empty(), "they are given back");
}

/// Starts a container that has a web server at its port 80, and answers at 7.
fn serve(story: &Story, name: &str, options: &[&str]) {
    story.add_program(ECHO);
    let script = "/opt/echo serve | { read ready; exec httpd -f -p 80 -h /etc; }";
    story.detach(name, options, &["sh", "-c", script]);
}

/// Asks who answers at port 8007 of an address of the host.
fn ask(outside: &Netns, address: &str) -> String {
    let mut command = outside.command(ECHO);
    command.args(["call", "8007", "1000", address]);
    outcome(command).success().to_owned()
}

/// Greets the first who connects; the thread returns where that came from.
fn greet(listener: TcpListener) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let (mut connection, from) = listener.accept().expect("a connection");
        connection.write_all(b"greetings").expect("sent");
        from.ip().to_string()
    })
}

/// Addresses of the bridge that `container`, and those whose names begin with its and a dash, have: the plugin writes them down for all
/// of a host, so those of other stories are there too.
fn given_addresses(container: &str) -> Vec<String> {
    let given = fs::read_dir("/var/lib/cni/networks/vmrun").expect("the plugin's folder").flatten();
    let owners = [".", "-"].map(|end| format!("{container}{end}"));
    let is_owned = |text: String| owners.iter().any(|owner| text.starts_with(owner));
    let owned = given.filter(|entry| fs::read_to_string(entry.path()).is_ok_and(is_owned));
    owned.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn containers_on_the_bridge_have_ipv6_and_are_reached_over_it_at_ports_of_the_host() {
    let story = Story::new();
    let lan = Lan::enter();
    let outside = lan.outside();
    let listener = outside.inside(|| TcpListener::bind("[fd99::1]:80")).expect("bound");
    let ports = ["-p", "8080:80", "-p", "[fd99::2]:8081:80", "-p", "8007:7", "-p", "8007:7/udp"];
    serve(&story, "web6", &[&["--network", "bridge", "--ip6", "fd00:214::7"][..], &ports].concat());
    let curl = |url: &str| format!("curl --silent --show-error --max-time 60 'http://{url}/passwd'");
    let here = |url: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &curl(url)]);
        outcome(command)
    };
    eventually(DEADLINE, "the server listens", || here("[fd00:214::7]").code == 0);
    for url in ["[fd99::2]:8080", "[fd99::2]:8081", "[fd00:214::1]:8080", "127.0.0.1:8080", "localhost:8080"] {
        assert!(here(url).success().starts_with("root:"), "{url}");
    }
    assert_eq!(ask(&outside, "fd99::2"), "fd99::2 tcp fd99::1\nfd99::2 udp\n");
    for url in ["[fd99::2]:8080", "[fd99::2]:8081", "192.0.2.2:8080"] {
        assert!(outside.run(&curl(url)).success().starts_with("root:"), "{url}");
    }
    // Nothing leads on from there; what does not wait can try 127.0.0.1.
    assert_eq!(here("[::1]:8080").code, 7, "the connection is refused");
    for held in ["[fd99::2]:8080", "[fd99::2]:8081"] {
        TcpListener::bind(held).expect_err("the port is the container's");
    }
    let script = "cat /etc/hosts; for at in 10.214.0.1 fd00:214::1; do ping -c 1 -W 30 $at || exit; done; \
        wget -q -O - 'http://[fd00:214::7]/passwd'; nc -w 60 fd99::1 80 </dev/null";
    let greeter = greet(listener);
    let options = ["--name", "web6-other", "--network", "bridge", "--cap-add", "NET_RAW", "--hostname", "other"];
    let other = story.run(&options, &["sh", "-c", script]);
    let named: Vec<&str> = other.success().lines().filter_map(|line| line.strip_suffix("\tother")).collect();
    assert!(named.len() == 2 && named[0].starts_with("10.214."), "{other:?}");
    assert!(named[1].starts_with("fd00:214::"), "{other:?}");
    assert!(other.stdout.contains("\nroot:") && other.stdout.ends_with("greetings"), "{other:?}");
    assert_eq!(greeter.join().expect("no panic"), "fd99::2", "the host's address stands for the container's");
    let address = story.run(&["--name", "web6-twice", "--network", "bridge", "--ip6", "fd00:214::7"], &["true"]);
    assert!(address.stderr.contains("the CNI plugin bridge refused ADD") && address.code == 125, "{address:?}");
    let loopback = story.run(&["--network", "bridge", "-p", "[::1]:8082:80"], &["true"]);
    assert!(loopback.stderr.contains("use --network user") && loopback.code == 125, "{loopback:?}");
    assert_eq!(given_addresses("web6").len(), 2);
    assert_eq!(story.call(&["rm", "--force", "web6"]).code, 0);
    assert_ne!(outside.run(&curl("[fd99::2]:8080")).code, 0, "nobody is there");
    assert!(given_addresses("web6").is_empty(), "they are given back");
}

#[test]
fn the_bridge_of_a_host_without_ipv6_has_ipv4_alone() {
    let story = Story::new();
    let _lan = Lan::enter();
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").expect("a sysctl of this namespace");
    let script = "ip addr show eth0; cat /etc/hosts; ping -c 1 -W 30 10.214.0.1";
    let done = story.run(&["--network", "bridge", "--cap-add", "NET_RAW"], &["sh", "-c", script]);
    assert!(done.success().contains("inet 10.214.") && !done.stdout.contains("fd00:"), "{done:?}");
    let refused = story.run(&["--network", "bridge", "-p", "[::]:8080:80"], &["true"]);
    assert_eq!(refused.code, 125);
    assert!(refused.stderr.contains("needs IPv6 on the bridge: the host has disabled it"), "{refused:?}");
}

/// Kills the process that owns a container, and waits until that is known.
fn kill_owner(story: &Story, name: &str) {
    let owner = story.inspect(name)["State"]["OwnerPid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    kill_process(owner.and_then(Pid::from_raw).expect("a process id"), Signal::KILL).expect("it runs");
    eventually(DEADLINE, "the owner is gone", || story.inspect(name)["State"]["Dead"] == true);
}

#[test]
fn a_network_whose_programs_are_missing_is_refused_with_the_package() {
    let story = Story::new();
    let image = story.image();
    let bridge = ("CNI_PATH", ["--network", "bridge"], "containernetworking-plugins");
    for (variable, options, package) in [("PATH", ["-p", "80:80"], "passt"), bridge] {
        let arguments = [&["run", "--rm"], &options[..], &[&image, "true"]].concat();
        let mut command = story.vmrun(&arguments);
        command.env(variable, "/nowhere");
        let refused = outcome(command);
        assert_eq!(refused.code, 125);
        assert!(refused.stderr.contains(&format!("install the package {package}")), "{refused:?}");
    }
}

#[test]
fn what_cannot_be_had_is_refused_by_name() {
    let story = Story::new();
    let lan = Lan::enter();
    let _outside = lan.outside();
    let _taken = TcpListener::bind("0.0.0.0:8080").expect("bound");
    let taken = story.run(&["-p", "8080:80"], &["true"]);
    assert_eq!(taken.code, 125);
    assert!(taken.stderr.contains("passt did not start") && taken.stderr.contains("8080"), "{taken:?}");
    let host = story.run(&["--network", "host"], &["true"]);
    assert!(host.stderr.contains("does not share the host's network"), "{host:?}");
    let own = story.run(&["--network", "netns:/proc/self/ns/net"], &["true"]);
    assert_eq!(own.code, 125);
    assert!(own.stderr.contains("hostNetwork"), "{own:?}");
    let nothing = story.run(&["--network", "netns:/run/netns/none"], &["true"]);
    assert!(nothing.stderr.contains("cannot open the network namespace /run/netns/none"), "{nothing:?}");
    let ports = story.run(&["--network", "none", "-p", "80:80"], &["true"]);
    assert!(ports.stderr.contains("--publish needs --network user or bridge"), "{ports:?}");
    let gateway = story.run(&["--ip", "10.0.0.1"], &["true"]);
    assert!(gateway.stderr.contains("the gateway's"), "{gateway:?}");
    let ip6 = story.run(&["--network", "user", "--ip6", "fd00:214::7"], &["true"]);
    assert!(ip6.stderr.contains("--ip6 needs --network bridge"), "{ip6:?}");
    ip("-6 route del default");
    let no_route = story.run(&["-p", "[::1]:8081:80"], &["true"]);
    assert!(no_route.stderr.contains("cannot publish at [::1]:8081: passt carries IPv6 only"), "{no_route:?}");
}

#[test]
fn a_namespace_that_a_plugin_has_wired_is_the_network_of_a_container() {
    let story = Story::new();
    let lan = Lan::enter();
    let netns = lan.netns();
    let attachment = Attachment::add(&netns, "eth0", vec![ptp(&story.volume(), 1500)]);
    let network = format!("netns:{}", netns.path().display());
    let script = "ip -4 addr show eth0 | grep inet; ip route; ping -c 1 -W 30 10.88.0.1";
    let done = story.run(&["--network", &network, "--cap-add", "NET_RAW"], &["sh", "-c", script]);
    assert!(done.success().contains(&attachment.address('.')), "{done:?}");
    assert!(done.stdout.contains("default via 10.88.0.1"), "{done:?}");
}
