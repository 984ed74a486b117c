//! A pod's network namespace is not the VM's alone: its plugin has its own mind about routes, and other programs work in it.

use sandbox::network::Policy;
use sandbox::network::pod::{PodOptions, attach};
use serde_json::{Value, json};
use tests::Story;
use tests::lan::{Attachment, Lan, Netns, ptp};
use tests::pod::{Pod, SMALL};

/// An interface of the namespace whose frames arrive nowhere.
const WIRED: &str = "link add eth0 type veth peer name other\nlink set eth0 up";

fn options() -> PodOptions {
    PodOptions { queue_pairs: 1, resolv_conf: String::new(), policy: Policy::default() }
}

async fn boot(story: &Story, netns: &Netns) -> Pod {
    Pod::boot_with(story, SMALL, attach(&netns.path(), &options()).expect("the namespace is joined")).await
}

/// Why a namespace cannot be joined.
fn refusal(netns: &Netns) -> String {
    attach(&netns.path(), &options()).err().expect("refused").to_string()
}

/// Runs a script that succeeds.
fn run(netns: &Netns, script: &str) -> String {
    let done = netns.run(script);
    assert_eq!(done.code, 0, "{script}: {done:?}");
    done.stdout
}

/// What `ping` needs.
fn net_raw(spec: &mut Value) {
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set].as_array_mut().expect("a set").push(json!("CAP_NET_RAW"));
    }
}

/// Runs a command in the guest until it succeeds.
async fn succeeds(pod: &Pod, id: &str, command: &str) {
    let script =
        format!("for i in $(seq 60); do {command} && exit; sleep 0.2; done; ip addr; ip route; ip neigh; exit 1");
    let (code, output) = pod.run(id, &script, net_raw).await;
    assert_eq!(code, 0, "{output}");
}

#[test]
fn a_namespace_has_one_vm() {
    let lan = Lan::enter();
    let netns = lan.netns();
    netns.ip(WIRED);
    let network = attach(&netns.path(), &options()).expect("joined");
    assert_eq!(refusal(&netns), "the frames of eth0 are redirected already: another VM uses this network namespace");
    drop(network);
    assert_eq!(netns.redirections(), "");
    drop(attach(&netns.path(), &options()).expect("joined again"));
}

#[test]
fn filters_of_others_stay_and_those_of_a_killed_owner_go() {
    let lan = Lan::enter();
    let netns = lan.netns();
    netns.ip(WIRED);
    run(&netns, "tc qdisc add dev eth0 ingress; tc filter add dev eth0 ingress u32 match u8 0 0 flowid 1:1");
    let refused = refusal(&netns);
    assert!(refused.starts_with("eth0 has a queue of another program for what arrives"), "{refused}");
    assert!(run(&netns, "tc filter show dev eth0 ingress").contains("flowid 1:1"));
    run(&netns, "tc qdisc del dev eth0 ingress; tc qdisc add dev eth0 clsact");
    assert_eq!(refusal(&netns), refused);
    assert!(run(&netns, "tc qdisc show dev eth0").contains("clsact"));
    // As a VM does that is killed together with its shim.
    run(
        &netns,
        "tc qdisc del dev eth0 clsact; tc qdisc add dev eth0 ingress; ip tuntap add vmtap9 mode tap; \
         tc filter add dev eth0 ingress u32 match u8 0 0 action mirred egress redirect dev vmtap9; ip link del vmtap9",
    );
    drop(attach(&netns.path(), &options()).expect("what was left is replaced"));
    assert_eq!(netns.redirections(), "");
}

#[tokio::test(flavor = "current_thread")]
async fn pods_of_the_ptp_plugin_reach_each_other_and_follow_what_is_done_to_their_namespace() {
    let story = Story::new();
    let lan = Lan::enter();
    let [netns, other_netns] = [lan.netns(), lan.netns()];
    let attach_to_host = |netns| Attachment::add(netns, "eth0", vec![ptp(&story.volume(), 1500)]);
    let [_attachment, other] = [&netns, &other_netns].map(attach_to_host);
    let pod = boot(&story, &netns).await;
    let other_pod = boot(&story, &other_netns).await;
    succeeds(&pod, "ipv4", &format!("ping -c 1 -W 5 {}", other.address('.'))).await;
    // The guest's kernel would take the other one for a neighbour, if it had a route of its own.
    succeeds(&pod, "ipv6", &format!("ping -6 -c 1 -W 5 {}", other.address(':'))).await;
    let followed = async {
        netns.ip("neigh add 10.88.0.99 lladdr 02:00:00:00:00:99 dev eth0");
        succeeds(&pod, "neighbour", "ip neigh | grep '10.88.0.99.*02:00:00:00:00:99'").await;
        netns.ip("neigh del 10.88.0.99 dev eth0");
        succeeds(&pod, "no-neighbour", "! ip neigh | grep 02:00:00:00:00:99").await;
        run(&netns, "tc qdisc del dev vmtap0 ingress");
        succeeds(&pod, "queue-of-tap-deleted", "ping -c 1 -W 1 10.88.0.1").await;
        run(&netns, "tc filter del dev eth0 ingress");
        succeeds(&pod, "filter-deleted", "ping -c 1 -W 1 10.88.0.1").await;
    };
    tokio::select! {
        () = followed => {}
        () = pod.0.follow_network() => panic!("the VM lives"),
    }
    pod.0.stop().await;
    other_pod.0.stop().await;
    drop((pod, other_pod));
    assert_eq!(netns.redirections() + &other_netns.redirections(), "");
}
