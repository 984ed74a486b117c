//! What can go wrong in a pod's network, on the host and in what others send: the guest sees an error or loses frames, the host
//! keeps its limits, and nothing is left.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use sandbox::ProcessId;
use sandbox::network::pod::{PodOptions, attach};
use sandbox::network::{NetStats, Policy, RateLimit};
use tests::lan::{Attachment, Lan, Netns, bridge, ip};
use tests::pod::{Pod, SMALL, net_capabilities};
use tests::{Story, eventually};
use tokio::net::TcpListener;
use tokio::time::timeout;

/// Limit of either direction.
const FRAMES_PER_S: u64 = 100;
const DEADLINE: Duration = Duration::from_secs(60);
/// A pod's VMM may not grow by more than the buffers of its queues, in KiB.
const MAX_GROWTH_KIB: u64 = 16 << 10;

async fn boot(story: &Story, netns: &Netns) -> Pod {
    let limit = RateLimit { bytes_per_s: 0, frames_per_s: FRAMES_PER_S };
    let policy = Policy { rx_limit: limit, tx_limit: limit, ..Default::default() };
    let options = PodOptions { queue_pairs: 1, resolv_conf: String::new(), policy };
    Pod::boot_with(story, SMALL, attach(&netns.path(), &options).expect("the namespace is joined")).await
}

/// What the guest says to a ping, over and over, until it has an answer.
async fn answers(pod: &Pod, id: &str) {
    let script = "for i in $(seq 60); do ping -c 1 -W 1 10.88.0.1 && exit; sleep 0.2; done; ip addr; ip route; exit 1";
    let (code, output) = pod.run(id, script, net_capabilities).await;
    assert_eq!(code, 0, "{output}");
}

/// Memory of the VMM that is its own, in KiB.
fn own_memory(pod: &Pod) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pod.0.vmm_pid())).expect("it runs");
    let value = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a line");
    value.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[tokio::test(flavor = "current_thread")]
async fn what_breaks_on_the_host_is_mended_or_told() {
    let story = Story::new();
    let lan = Lan::enter();
    let netns = lan.netns();
    let attachment = Attachment::add(&netns, "eth0", vec![bridge(&story.volume(), 1500)]);
    let pod = boot(&story, &netns).await;
    let told = async {
        netns.ip("link del vmtap0");
        answers(&pod, "tap-deleted").await;
        assert_eq!(netns.run("tc qdisc del dev eth0 ingress").code, 0);
        answers(&pod, "queue-deleted").await;
        netns.ip("link set eth0 down
link set eth0 name net0
link set net0 up");
        answers(&pod, "renamed").await;
        let script = "for i in $(seq 300); do ip link show net0 && break; sleep 0.2; done; ping -c 1 -W 1 203.0.113.1";
        let (code, output) = pod.run("no-route", script, net_capabilities).await;
        assert!(code != 0 && output.contains("Network is unreachable"), "{output}");
        let twin = lan.netns();
        ip(&format!("link add twin master cni0 type veth peer name eth0 netns {}", twin.name()));
        ip("link set twin up");
        let address = attachment.address('.');
        twin.ip(&format!("addr add {address}/24 dev eth0\nlink set eth0 up"));
        // Asks for the host's hardware address, so the host takes the twin's for the pod's.
        twin.inside(|| UdpSocket::bind((address.as_str(), 0)).expect("bound").send_to(b"", "10.88.0.1:9"))
            .expect("sent");
        ip("link del twin");
        answers(&pod, "twin").await;
    };
    tokio::select! {
        () = told => {}
        () = pod.0.follow_network() => panic!("the VM lives"),
    }
    // The interface ends with the namespace, which the pod is the last to hold.
    attachment.remove();
    netns.remove();
    assert_eq!(pod.run("namespace-removed", "echo on", |_| {}).await, (0, "on\n".to_owned()));
    pod.0.stop().await;
    drop(pod);
    eventually(DEADLINE, "the namespace ends", || !ip("-o link show").contains("veth"));
}

#[tokio::test(flavor = "current_thread")]
async fn floods_keep_to_the_limits_and_a_peer_that_never_reads_costs_nothing() {
    let story = Story::new();
    let lan = Lan::enter();
    let netns = lan.netns();
    let attachment = Attachment::add(&netns, "eth0", vec![bridge(&story.volume(), 1500)]);
    let pod = boot(&story, &netns).await;
    answers(&pod, "before").await;
    let memory = own_memory(&pod);
    let (guest, socket) = (attachment.address('.'), UdpSocket::bind("10.88.0.1:0").expect("bound"));
    let flood = || {
        (0..64).for_each(|_| assert_eq!(socket.send_to(&[0; 1000], (guest.as_str(), 9)).expect("sent"), 1000));
    };
    time_of_frames(&pod, |stats| stats.rx_frames, flood).await;
    // What was under way to the guest waits for its turn.
    answers(&pod, "between").await;
    let silent = TcpListener::bind("10.88.0.1:5000").await.expect("bound");
    let sink = TcpListener::bind("10.88.0.1:5001").await.expect("bound");
    let script = "yes | nc 10.88.0.1 5000 & yes | nc 10.88.0.1 5001";
    pod.create("flood", script, |_| {}).await.map(drop).expect("created");
    pod.0.start("flood").await.expect("started");
    let connected =
        async { (silent.accept().await.expect("a connection"), sink.accept().await.expect("a connection")) };
    let ((never_read, _), (mut read, _)) = timeout(DEADLINE, connected).await.expect("the guest connects");
    let reader = tokio::spawn(async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await });
    time_of_frames(&pod, |stats| stats.tx_frames, || {}).await;
    let init = ProcessId::init("flood");
    pod.0.signal(&init, 9, true).await.expect("killed");
    pod.0.wait(&init).await.expect("waited");
    let grown = own_memory(&pod).saturating_sub(memory);
    assert!(grown < MAX_GROWTH_KIB, "{grown} KiB");
    drop(never_read);
    answers(&pod, "after").await;
    reader.abort();
    pod.0.stop().await;
}

/// Waits until the interface has carried what its limit allows in two seconds, and asserts that it took them.
async fn time_of_frames(pod: &Pod, count: impl Fn(&NetStats) -> u64, flood: impl Fn()) {
    let before = pod.0.network_stats().await.expect("answered").remove(0);
    let start = Instant::now();
    let after = loop {
        flood();
        let stats = pod.0.network_stats().await.expect("the VMM answers under a flood").remove(0);
        if count(&stats) - count(&before) >= 2 * FRAMES_PER_S {
            break stats;
        }
        assert!(start.elapsed() < DEADLINE, "{before:?} {stats:?}");
    };
    // A tenth of a second is allowed at once.
    assert!(start.elapsed() > Duration::from_millis(1800), "{:?}", start.elapsed());
    assert!(after.throttled > before.throttled, "{after:?}");
}
