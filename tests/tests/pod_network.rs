//! The network of a pod VM, wired by real CNI plugins in a host network of the story's own.

use sandbox::network::Policy;
use sandbox::plan::VmSize;
use tests::lan::{Attachment, Lan, bridge, ip, portmap, ptp};
use tests::pair::Pair;
use tests::pod::{Pod, SMALL, net_capabilities, network};
use tests::{Story, iperf};

/// Whom pods talk to, and what they ask with.
const ECHO: &str = env!("CARGO_BIN_EXE_echo");

#[tokio::test(flavor = "current_thread")]
async fn pods_on_a_bridge_reach_everybody_and_are_reached_at_ports_of_the_host() {
    let story = Story::new();
    story.add_program(iperf::PROGRAM);
    let plugins = |port| vec![bridge(&story.volume(), 1500), portmap(port)];
    let pair = Pair::boot(&story, ECHO, 1500, plugins).await;
    pair.assert_everybody_answers().await;
    pair.assert_published();
    pair.assert_stream('.').await;
    pair.assert_counted().await;
    pair.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn pods_on_a_bridge_with_jumbo_frames_reach_everybody_and_are_reached_at_ports_of_the_host() {
    let story = Story::new();
    let plugins = |port| vec![bridge(&story.volume(), 9000), portmap(port)];
    let pair = Pair::boot(&story, ECHO, 9000, plugins).await;
    pair.assert_everybody_answers().await;
    pair.assert_published();
    pair.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn pods_with_links_of_their_own_reach_everybody() {
    let story = Story::new();
    let pair = Pair::boot(&story, ECHO, 1500, |_| vec![ptp(&story.volume(), 1500)]).await;
    pair.assert_everybody_answers().await;
    pair.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn pods_with_links_of_their_own_and_jumbo_frames_reach_everybody() {
    let story = Story::new();
    story.add_program(iperf::PROGRAM);
    let pair = Pair::boot(&story, ECHO, 9000, |_| vec![ptp(&story.volume(), 9000)]).await;
    pair.assert_everybody_answers().await;
    pair.assert_stream(':').await;
    pair.assert_counted().await;
    pair.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_pod_with_rules_sends_from_its_own_addresses_alone() {
    let story = Story::new();
    let lan = Lan::enter();
    let netns = lan.netns();
    let attachment = Attachment::add(&netns, "eth0", vec![bridge(&story.volume(), 1500)]);
    // Rules keep the interface from vhost-net.
    let policy = Policy { anti_spoofing: true, vhost: true, ..Default::default() };
    let pod = Pod::boot_with(&story, SMALL, network(&netns, policy)).await;
    assert!(pod.has_thread("net0"), "{:?}", pod.threads());
    let script = "ip addr show eth0; ping -c 2 -W 20 10.88.0.1 && ping -6 -c 2 -W 20 fd88::1";
    let (code, output) = pod.run("ping", script, net_capabilities).await;
    assert_eq!(code, 0, "{output}");
    assert!(output.contains(&format!("inet {}/24", attachment.address('.'))), "{output}");
    assert!(output.contains(&format!("inet6 {}/64", attachment.address(':'))), "{output}");
    assert!(ip("-s neigh").contains(&attachment.address('.')), "the bridge has seen the pod");
    let spoofed = "ip addr add 10.88.0.200/24 dev eth0; ping -I 10.88.0.200 -c 2 -W 5 10.88.0.1";
    let (code, output) = pod.run("spoof", spoofed, net_capabilities).await;
    assert!(code != 0 && output.contains("0 packets received"), "{output}");
    assert!(!ip("-s neigh").contains("10.88.0.200 "), "the bridge has not heard of the address");
    let counted = pod.0.network_stats().await.expect("answered");
    assert!(counted[0].tx_spoofed > 0 && counted[0].rx_frames > 0, "{counted:?}");
    pod.0.stop().await;
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

#[tokio::test(flavor = "current_thread")]
async fn a_pod_by_vhost_net_and_one_by_the_vmm_exchange_jumbo_frames_for_ten_seconds() {
    let story = Story::new();
    story.add_program(iperf::PROGRAM);
    let lan = Lan::enter();
    let [server_netns, client_netns] = [lan.netns(), lan.netns()];
    let attach_to_bridge = |netns| Attachment::add(netns, "eth0", vec![bridge(&story.volume(), 9000)]);
    let [attachment, _other] = [&server_netns, &client_netns].map(attach_to_bridge);
    let vhost = Policy { vhost: true, ..Default::default() };
    let server = Pod::boot_with(&story, VmSize { vcpus: 2, ..SMALL }, network(&server_netns, vhost)).await;
    let client = Pod::boot_with(&story, SMALL, network(&client_netns, Policy::default())).await;
    assert!(!server.has_thread("net") && client.has_thread("net0"), "{:?}", server.threads());
    let pings = "ping -c 2 -W 20 10.88.0.1 && ping -6 -c 2 -W 20 fd88::1";
    let (code, output) = server.run("reset", &(rebind(&attachment) + pings), net_capabilities).await;
    assert_eq!(code, 0, "{output}");
    let exits_before = exits(&server).await;
    for address in ['.', ':'].map(|sign| attachment.address(sign)) {
        let report = iperf::stream(&server, &client, &address).await;
        let segment_len = iperf::segment_len(9000, &address);
        assert_eq!(report["start"]["tcp_mss_default"], segment_len, "{}", report["start"]);
    }
    let counted = server.0.network_stats().await.expect("answered").remove(0);
    assert!(counted.link_up && counted.rx_bytes > 2 << 20 && counted.tx_frames > 100, "{counted:?}");
    let exits = exits(&server).await - exits_before;
    println!("vhost-net: {exits} exits for {} frames", counted.rx_frames + counted.tx_frames);
    assert!(exits * 10 < counted.rx_frames + counted.tx_frames, "{exits} exits, {counted:?}");
    server.0.stop().await;
    client.0.stop().await;
}
