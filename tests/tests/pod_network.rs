//! The network of a pod VM, wired by real CNI plugins in a host network of the story's own.

use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use sandbox::ProcessId;
use sandbox::network::pod::{PodOptions, attach};
use sandbox::network::{Network, Policy};
use sandbox::plan::VmSize;
use serde_json::{Value, json};
use tests::Story;
use tests::dns::Dns;
use tests::lan::{Attachment, Lan, Netns, bridge, ip};
use tests::pod::{Pod, SMALL};
use tokio::io::AsyncReadExt as _;

/// Two pairs of queues, of which a guest with one CPU uses one.
fn network(netns: &Netns, policy: Policy) -> Network {
    let options = PodOptions { queue_pairs: 2, resolv_conf: "nameserver 10.88.0.1\n".to_owned(), policy };
    attach(&netns.path(), &options).expect("the namespace is joined")
}

/// Names of the threads of a pod's VMM; some kernels count vhost's among them.
fn threads(pod: &Pod) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", pod.0.vmm_pid())).expect("the VMM runs");
    tasks.map(|task| fs::read_to_string(task.expect("a thread").path().join("comm")).expect("a name")).collect()
}

fn has_thread(pod: &Pod, name: &str) -> bool {
    threads(pod).iter().any(|thread| thread.starts_with(name))
}

/// Returns of a pod's vCPUs to its VMM.
async fn exits(pod: &Pod) -> u64 {
    let stats = pod.0.vm_stats().await.expect("answered");
    stats.port_exits + stats.mmio_exits + stats.other_exits
}

/// Lets the guest's kernel lose its network device and find it again, with its addresses.
fn rebind(attachment: &Attachment) -> String {
    let (v4, v6) = (attachment.address('.'), attachment.address(':'));
    format!(
        "mount -o remount,rw /sys; device=$(basename $(readlink /sys/class/net/eth0/device)); \
         cd /sys/bus/virtio/drivers/virtio_net; echo $device > unbind; echo $device > bind; \
         echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad; \
         ip addr add {v4}/24 dev eth0; ip addr add {v6}/64 dev eth0; ip link set eth0 up; "
    )
}

/// What `ping` needs.
fn net_raw(spec: &mut Value) {
    for set in ["bounding", "effective", "permitted"] {
        let set = spec["process"]["capabilities"][set].as_array_mut().expect("a set");
        set.extend([json!("CAP_NET_RAW"), json!("CAP_NET_ADMIN")]);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_pod_reaches_the_host_and_the_outside_over_ipv4_and_ipv6() {
    let story = Story::new();
    let lan = Lan::enter();
    let outside = lan.outside();
    outside.ip("route add 10.88.0.0/24 via 192.0.2.2\n-6 route add fd88::/64 via fd99::2");
    let listeners = outside.inside(|| ["192.0.2.1:80", "[fd99::1]:80"].map(|at| TcpListener::bind(at).expect("bound")));
    let names = outside.inside(|| UdpSocket::bind("[::]:53").expect("bound"));
    let _dns = Dns::serve(names, Ipv4Addr::new(192, 0, 2, 1), "fd99::1".parse().expect("v6"));
    let netns = lan.netns();
    let attachment = Attachment::add(&netns, "eth0", vec![bridge(&story.volume(), 1500)]);
    // Rules keep the interface from vhost-net.
    let policy = Policy { anti_spoofing: true, vhost: true, ..Default::default() };
    let pod = Pod::boot_with(&story, SMALL, network(&netns, policy)).await;
    assert!(has_thread(&pod, "net0"), "{:?}", threads(&pod));
    let script = "ip addr show eth0; ip route; ping -c 2 -W 20 10.88.0.1 && ping -6 -c 2 -W 20 fd88::1";
    let (code, output) = pod.run("ping", script, net_raw).await;
    assert_eq!(code, 0, "{output}");
    assert!(output.contains(&format!("inet {}/24", attachment.address('.'))), "{output}");
    assert!(output.contains(&format!("inet6 {}/64", attachment.address(':'))), "{output}");
    assert!(ip("-s neigh").contains(&attachment.address('.')), "the bridge has seen the pod");
    let greeter = std::thread::spawn(move || {
        listeners.map(|listener| {
            let (mut connection, from) = listener.accept().expect("a connection");
            connection.write_all(b"greetings\n").expect("sent");
            from.ip().to_string()
        })
    });
    let script = "for at in 192.0.2.1 fd99::1; do nc -w 60 $at 80 </dev/null && ping -c 1 -W 20 $at && nslookup outside.example $at || exit; done";
    let (code, output) = pod.run("outside", script, net_raw).await;
    assert_eq!(code, 0, "{output}");
    assert_eq!(output.matches("greetings\n").count(), 2, "{output}");
    assert_eq!(output.matches("Address: fd99::1\n").count(), 2, "both name servers have answered: {output}");
    // Nobody stands for the pod.
    let from = greeter.join().expect("no panic");
    assert_eq!(from, [attachment.address('.'), attachment.address(':')]);
    let spoofed = "ip addr add 10.88.0.200/24 dev eth0; ping -I 10.88.0.200 -c 2 -W 5 10.88.0.1";
    let (code, output) = pod.run("spoof", spoofed, net_raw).await;
    assert!(code != 0 && output.contains("0 packets received"), "{output}");
    assert!(!ip("-s neigh").contains("10.88.0.200 "), "the bridge has not heard of the address");
    let counted = pod.0.network_stats().await.expect("answered");
    assert!(counted[0].tx_spoofed > 0 && counted[0].rx_frames > 0, "{counted:?}");
    pod.0.stop().await;
    drop(pod);
    assert_eq!(netns.redirections(), "");
}

#[tokio::test(flavor = "current_thread")]
async fn interfaces_come_and_go_while_the_pod_runs() {
    let story = Story::new();
    let lan = Lan::enter();
    let netns = lan.netns();
    let pod = Pod::boot_with(&story, SMALL, network(&netns, Policy::default())).await;
    let _attachment = Attachment::add(&netns, "eth0", vec![bridge(&story.volume(), 1500)]);
    pod.0.rescan_network().await.expect("looked at again");
    let (code, output) = pod.run("wired", "ping -c 2 -W 20 10.88.0.1 && ping -6 -c 2 -W 20 fd88::1", net_raw).await;
    assert_eq!(code, 0, "{output}");
    let told = async {
        netns.ip("link set eth0 mtu 1400\nroute add 203.0.113.0/24 via 10.88.0.1");
        ip(&format!("link add late type veth peer name eth1 netns {}", netns.name()));
        ip("addr add 10.89.0.1/24 dev late");
        ip("link set late up");
        netns.ip("addr add 10.89.0.2/24 dev eth1\nlink set eth1 up");
        let script = "for i in $(seq 300); do ip addr show eth1 2>&1 | grep 'inet 10.89.0.2/24' && break; sleep 0.2; done; ping -c 2 -W 20 10.89.0.1 \
            && ip route | grep 203.0.113.0/24 && ip link show eth0 | grep 'mtu 1400'";
        let (code, output) = pod.run("added", script, net_raw).await;
        assert_eq!(code, 0, "{output}");
        netns.ip("addr del 10.89.0.2/24 dev eth1\naddr add 10.89.0.3/24 dev eth1\nlink set eth1 down");
        netns.ip("link set eth1 name other\nlink set other up\nroute del 203.0.113.0/24");
        let script = "for i in $(seq 300); do ip addr show other 2>&1 | grep 'inet 10.89.0.3/24' && break; sleep 0.2; done; ping -c 2 -W 20 10.89.0.1; \
            ip addr show other | grep 10.89.0.2/ || ip route | grep 203.0.113.0/24";
        let (code, output) = pod.run("renamed", script, net_raw).await;
        assert!(code == 1 && output.contains("2 packets received"), "{output}");
        ip("link del late");
        let script = "for i in $(seq 300); do ip link show other || exit 0; sleep 0.2; done; exit 1";
        let (code, output) = pod.run("removed", script, net_raw).await;
        assert_eq!(code, 0, "{output}");
    };
    tokio::select! {
        () = told => {}
        () = pod.0.follow_network() => panic!("the VM lives"),
    }
    let stats = pod.0.network_stats().await.expect("answered");
    assert_eq!(stats.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["eth0"]);
    pod.0.stop().await;
    drop(pod);
    assert_eq!(netns.redirections(), "");
}

#[tokio::test(flavor = "current_thread")]
async fn two_pods_exchange_jumbo_frames_for_ten_seconds() {
    let story = Story::new();
    story.add_program("/usr/bin/iperf3");
    let lan = Lan::enter();
    let [server_netns, client_netns] = [lan.netns(), lan.netns()];
    let attach_to_bridge = |netns| Attachment::add(netns, "eth0", vec![bridge(&story.volume(), 9000)]);
    let attachments = [&server_netns, &client_netns].map(attach_to_bridge);
    let vhost = Policy { vhost: true, ..Default::default() };
    let server = Pod::boot_with(&story, VmSize { vcpus: 2, ..SMALL }, network(&server_netns, vhost)).await;
    let client = Pod::boot_with(&story, SMALL, network(&client_netns, Policy::default())).await;
    assert!(!has_thread(&server, "net") && has_thread(&client, "net0"), "{:?}", threads(&server));
    let pings = "ping -c 2 -W 20 10.88.0.1 && ping -6 -c 2 -W 20 fd88::1";
    let (code, output) = server.run("reset", &(rebind(&attachments[0]) + pings), net_raw).await;
    assert_eq!(code, 0, "{output}");
    let exits_before = exits(&server).await;
    for family in ['.', ':'] {
        let id = if family == '.' { "ipv4" } else { "ipv6" };
        let streams =
            server.create(id, "exec /usr/bin/iperf3 --server --one-off --forceflush", |_| {}).await.expect("created");
        server.0.start(id).await.expect("started");
        let mut served = streams.stdout.expect("standard output");
        // Its first line, once it listens.
        served.read_exact(&mut [0; 1]).await.expect("iperf3 listens");
        let address = attachments[0].address(family);
        let (code, report) =
            client.run(id, &format!("/usr/bin/iperf3 --client {address} --time 10 --json"), |_| {}).await;
        assert_eq!(code, 0, "{report}");
        let report: Value = serde_json::from_str(&report).expect("JSON");
        let received = &report["end"]["sum_received"];
        assert!(received["seconds"].as_f64().is_some_and(|seconds| seconds > 9.0), "{received}");
        assert!(received["bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{received}");
        // 9000 bytes less the headers of IP and TCP with time stamps (RFC 7323).
        let segment = if family == '.' { 9000 - 52 } else { 9000 - 72 };
        assert_eq!(report["start"]["tcp_mss_default"], segment, "{}", report["start"]);
        let mut rest = String::new();
        served.read_to_string(&mut rest).await.expect("its report");
        let exit = server.0.wait(&ProcessId::init(id)).await.expect("waited");
        assert_eq!(exit.exit_code, 0, "{rest}");
        server.0.delete(&ProcessId::init(id), false).await.expect("deleted");
    }
    let counted = server.0.network_stats().await.expect("answered").remove(0);
    assert!(counted.link_up && counted.rx_bytes > 2 << 20 && counted.tx_frames > 100, "{counted:?}");
    let exits = exits(&server).await - exits_before;
    println!("vhost-net: {exits} exits for {} frames", counted.rx_frames + counted.tx_frames);
    assert!(exits * 10 < counted.rx_frames + counted.tx_frames, "{exits} exits, {counted:?}");
    server.0.stop().await;
    client.0.stop().await;
    drop((server, client));
    assert_eq!(server_netns.redirections() + &client_netns.redirections(), "");
}
