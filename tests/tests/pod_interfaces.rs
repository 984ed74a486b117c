//! Interfaces that come to a pod and go while it runs. Told in a process of its own, whose descriptors it counts.

use std::fmt::Debug;
use std::time::Duration;

use sandbox::network::Policy;
use tests::lan::{Attachment, Lan, bridge, ip};
use tests::pod::{Pod, SMALL, net_capabilities, network};
use tests::{Story, descriptors, told_alone};
use tokio::time::{sleep, timeout};

/// For what ends by itself.
const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "current_thread")]
async fn interfaces_come_and_go_while_the_pod_runs() {
    if told_alone("pod_interfaces::interfaces_come_and_go_while_the_pod_runs") {
        return;
    }
    let story = Story::new();
    let lan = Lan::enter();
    let netns = lan.netns();
    let ours = descriptors("self");
    let pod = Pod::boot_with(&story, SMALL, network(&netns, Policy::default())).await;
    let _attachment = Attachment::add(&netns, "eth0", vec![bridge(&story.volume(), 1500)]);
    pod.0.rescan_network().await.expect("looked at again");
    let vmm = pod.0.vmm_pid().to_string();
    let told = async {
        let script = "ping -c 2 -W 20 10.88.0.1 && ping -6 -c 2 -W 20 fd88::1";
        let (code, output) = pod.run("wired", script, net_capabilities).await;
        assert_eq!(code, 0, "{output}");
        let before = [descriptors("self"), descriptors(&vmm)];
        netns.ip("link set eth0 mtu 1400\nroute add 203.0.113.0/24 via 10.88.0.1");
        ip(&format!("link add late type veth peer name eth1 netns {}", netns.name()));
        ip("addr add 10.89.0.1/24 dev late");
        ip("link set late up");
        netns.ip("addr add 10.89.0.2/24 dev eth1\nlink set eth1 up");
        let script = "for i in $(seq 300); do ip addr show eth1 2>&1 | grep 'inet 10.89.0.2/24' && break; sleep 0.2; done; ping -c 2 -W 20 10.89.0.1 \
            && ip route | grep 203.0.113.0/24 && ip link show eth0 | grep 'mtu 1400'";
        let (code, output) = pod.run("added", script, net_capabilities).await;
        assert_eq!(code, 0, "{output}");
        netns.ip("link set eth1 down");
        let script = "for i in $(seq 300); do ip link show eth1 | grep NO-CARRIER && break; sleep 0.2; done; \
            cat /sys/class/net/eth1/carrier; ip addr show eth1 | grep 'inet 10.89.0.2/24'";
        let (code, output) = pod.run("down", script, net_capabilities).await;
        assert!(code == 0 && output.contains("\n0\n"), "{output}");
        netns.ip("addr del 10.89.0.2/24 dev eth1\naddr add 10.89.0.3/24 dev eth1");
        netns.ip("link set eth1 name other\nlink set other up\nroute del 203.0.113.0/24");
        let script = "for i in $(seq 300); do ip addr show other 2>&1 | grep 'inet 10.89.0.3/24' && break; sleep 0.2; done; ping -c 2 -W 20 10.89.0.1; \
            ip addr show other | grep 10.89.0.2/ || ip route | grep 203.0.113.0/24";
        let (code, output) = pod.run("renamed", script, net_capabilities).await;
        assert!(code == 1 && output.contains("2 packets received"), "{output}");
        ip("link del late");
        let script = "for i in $(seq 300); do ip link show other || exit 0; sleep 0.2; done; exit 1";
        let (code, output) = pod.run("removed", script, net_capabilities).await;
        assert_eq!(code, 0, "{output}");
        becomes(&before, || [descriptors("self"), descriptors(&vmm)]).await;
    };
    tokio::select! {
        () = told => {}
        () = pod.0.follow_network() => panic!("the VM lives"),
    }
    let stats = pod.0.network_stats().await.expect("answered");
    assert_eq!(stats.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["eth0"]);
    pod.0.stop().await;
    drop(pod);
    becomes(&ours, || descriptors("self")).await;
}

/// Asserts that something becomes what it was, while the story's other tasks go on.
async fn becomes<T: Debug + PartialEq>(before: &T, now: impl Fn() -> T) {
    let same = async {
        while now() != *before {
            sleep(Duration::from_millis(50)).await;
        }
    };
    // The assertion tells of what is left.
    let _ = timeout(DEADLINE, same).await;
    assert_eq!(now(), *before);
}
