//! The network of a pod VM, wired by real CNI plugins in a host network of the story's own.

use sandbox::ProcessId;
use sandbox::network::pod::{PodOptions, attach};
use sandbox::network::{Network, Policy};
use serde_json::{Value, json};
use tests::Story;
use tests::lan::{Attachment, Lan, Netns, bridge, ip};
use tests::pod::{Pod, SMALL};
use tokio::io::AsyncReadExt as _;

fn network(netns: &Netns) -> Network {
    attach(&netns.path(), &options()).expect("the namespace is joined")
}

fn options() -> PodOptions {
    let policy = Policy { anti_spoofing: true, ..Default::default() };
    PodOptions { queue_pairs: 1, resolv_conf: "nameserver 10.88.0.1\n".to_owned(), policy }
}

/// What `ping` needs.
fn net_raw(spec: &mut Value) {
    for set in ["bounding", "effective", "permitted"] {
        let set = spec["process"]["capabilities"][set].as_array_mut().expect("a set");
        set.extend([json!("CAP_NET_RAW"), json!("CAP_NET_ADMIN")]);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_pod_reaches_the_host_and_is_reached_over_ipv4_and_ipv6() {
    let story = Story::new();
    let lan = Lan::enter();
    let netns = lan.netns();
    let attachment = Attachment::add(&netns, "eth0", vec![bridge(&story.volume(), 1500)]);
    let pod = Pod::boot_with(&story, SMALL, network(&netns)).await;
    let script = "ip addr show eth0; ip route; ping -c 2 -W 20 10.88.0.1 && ping -6 -c 2 -W 20 fd88::1";
    let (code, output) = pod.run("ping", script, net_raw).await;
    assert_eq!(code, 0, "{output}");
    assert!(output.contains(&format!("inet {}/24", attachment.address('.'))), "{output}");
    assert!(output.contains(&format!("inet6 {}/64", attachment.address(':'))), "{output}");
    assert!(ip("-s neigh").contains(&attachment.address('.')), "the bridge has seen the pod");
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
async fn two_pods_exchange_jumbo_frames_for_ten_seconds() {
    let story = Story::new();
    story.add_program("/usr/bin/iperf3");
    let lan = Lan::enter();
    let [server_netns, client_netns] = [lan.netns(), lan.netns()];
    let attach_to_bridge = |netns| Attachment::add(netns, "eth0", vec![bridge(&story.volume(), 9000)]);
    let attachments = [&server_netns, &client_netns].map(attach_to_bridge);
    let server = Pod::boot_with(&story, SMALL, network(&server_netns)).await;
    let client = Pod::boot_with(&story, SMALL, network(&client_netns)).await;
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
    server.0.stop().await;
    client.0.stop().await;
}
