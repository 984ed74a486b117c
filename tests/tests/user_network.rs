//! `vmrun run` with the networks of the command line, in a host network of the story's own.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use tests::dns::Dns;
use tests::lan::{Attachment, Lan, ip, ptp};
use tests::python::{Python, debian_image};
use tests::{Story, outcome};

const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn a_web_server_is_reached_at_a_port_of_the_host() {
    let story = Story::new();
    let lan = Lan::enter();
    let _outside = lan.outside();
    let image = debian_image();
    let arguments =
        ["run", "--rm", "-p", "8080:80", "--name", "web", &image, "python3", "-u", "-m", "http.server", "80"];
    let mut vmrun = story.vmrun(&arguments).stdout(Stdio::piped()).spawn().expect("vmrun starts");
    let mut first = String::new();
    BufReader::new(vmrun.stdout.take().expect("piped")).read_line(&mut first).expect("a line");
    assert!(first.starts_with("Serving HTTP"), "{first}");
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "60", "http://127.0.0.1:8080/etc/debian_version"]);
    let page = outcome(curl);
    assert!(page.success().starts_with("12."), "{page:?}");
    assert_eq!(story.call(&["kill", "web"]).code, 0);
    assert_eq!(vmrun.wait().expect("ended").code(), Some(137));
}

#[test]
fn the_outside_is_reached_by_tcp_udp_icmp_and_names() {
    let story = Story::new();
    let lan = Lan::enter();
    let outside = lan.outside();
    let listener = outside.inside(|| TcpListener::bind("192.0.2.1:80")).expect("bound");
    let names = outside.inside(|| UdpSocket::bind("192.0.2.1:53")).expect("bound");
    let _dns = Dns::serve(names, "192.0.2.1".parse().expect("v4"), "fd99::1".parse().expect("v6"));
    let mut python = Python::start(&story, &["--dns", "192.0.2.1", "--cap-add", "NET_RAW"]);
    assert_eq!(python.eval("open('/etc/resolv.conf').read()"), "nameserver 192.0.2.1 ");
    python.exec("import socket; s = socket.create_connection(('story.example', 80), 60)");
    let (mut connection, from) = listener.accept().expect("the guest connects");
    assert_eq!(from.ip().to_string(), "192.0.2.2");
    connection.write_all(b"hello").expect("sent");
    assert_eq!(python.eval("s.recv(16)"), "b'hello'");
    let mut received = [0; 1 << 20];
    let reader = std::thread::spawn(move || connection.read_exact(&mut received).map(|()| received));
    assert_eq!(python.exec("s.sendall(b'x' * (1 << 20))"), "None");
    assert!(reader.join().expect("no panic").expect("a megabyte").iter().all(|byte| *byte == b'x'));
    // An echo request by a datagram socket (icmp(7)).
    python.exec("p = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); p.settimeout(60)");
    python.exec("p.sendto(b'\\x08\\x00\\xf7\\xfd\\x00\\x01\\x00\\x01', ('192.0.2.1', 0))");
    assert_eq!(python.eval("p.recv(99)[20]"), "0");
}

#[test]
fn ports_of_the_host_carry_udp_and_listen_where_they_were_told() {
    let story = Story::new();
    let lan = Lan::enter();
    let _outside = lan.outside();
    let mut python = Python::start(&story, &["-p", "127.0.0.1:5300:53/udp", "-p", "127.0.0.1:8443:443"]);
    python.exec("import socket; u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('', 53))");
    let client = UdpSocket::bind("127.0.0.1:0").expect("bound");
    client.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    client.send_to(b"question", "127.0.0.1:5300").expect("sent");
    python.exec("d, a = u.recvfrom(99); u.sendto(d + b'!', a)");
    let mut answer = [0; 99];
    let len = client.recv(&mut answer).expect("an answer");
    assert_eq!(&answer[..len], b"question!");
    python.exec("l = socket.create_server(('', 443))");
    let mut stream = TcpStream::connect("127.0.0.1:8443").expect("connected");
    python.exec("c, _ = l.accept(); c.sendall(b'secret'); c.close()");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("text");
    assert_eq!(text, "secret");
    TcpStream::connect("192.0.2.2:8443").expect_err("only loopback was asked for");
}

#[test]
fn the_guest_does_not_reach_the_loopback_of_the_host() {
    let story = Story::new();
    let lan = Lan::enter();
    let _outside = lan.outside();
    let _private = TcpListener::bind("127.0.0.1:4000").expect("bound");
    let mut python = Python::start(&story, &[]);
    python.exec("import socket");
    let refused = python.eval("socket.create_connection(('10.213.0.1', 4000), 5)");
    assert!(["ECONNREFUSED", "ETIMEDOUT", "EHOSTUNREACH", "timed out"].contains(&refused.as_str()), "{refused}");
}

#[test]
fn hosts_are_added_and_a_container_without_a_network_has_loopback() {
    let story = Story::new();
    let options = ["--network", "none", "--add-host", "db:10.0.0.9", "--hostname", "box"];
    let done = story.run(&options, &["sh", "-c", "cat /etc/hosts; ls /sys/class/net; ping -c 1 127.0.0.1"]);
    assert!(done.success().contains("10.0.0.9\tdb\n127.0.0.1\tbox\nlo\nPING"), "{done:?}");
    assert_eq!(done.stderr, "");
}

#[test]
fn without_passt_a_container_runs_and_a_port_is_refused_with_the_package() {
    let story = Story::new();
    let image = story.image();
    let without = |arguments: &[&str]| {
        let mut command = story.vmrun(arguments);
        command.env("PATH", "/nowhere");
        outcome(command)
    };
    let quiet = without(&["run", "--rm", &image, "ls", "/sys/class/net"]);
    assert_eq!(quiet.success(), "lo\n");
    assert!(quiet.stderr.contains("the container has no network"), "{quiet:?}");
    assert!(quiet.stderr.contains("install the package passt"), "{quiet:?}");
    let refused = without(&["run", "--rm", "-p", "80:80", &image, "true"]);
    assert_eq!(refused.code, 125);
    assert!(refused.stderr.contains("install the package passt"), "{refused:?}");
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
    assert!(ports.stderr.contains("--publish needs --network user"), "{ports:?}");
    let gateway = story.run(&["--ip", "10.0.0.1"], &["true"]);
    assert!(gateway.stderr.contains("the gateway's"), "{gateway:?}");
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
    assert_eq!(netns.redirections(), "");
    assert!(!ip(&format!("-n {} link show", netns.name())).contains("vmtap"));
}
