//! The network of a pod VM, wired by real CNI plugins in a host network of the story's own.

use sandbox::network::pod::{PodOptions, attach};
use sandbox::network::{Network, Policy};
use serde_json::{Value, json};
use tests::Story;
use tests::lan::{Attachment, Lan, Netns, bridge, ip};
use tests::pod::{Pod, SMALL};

fn network(netns: &Netns) -> Network {
    attach(&netns.path(), &options()).expect("the namespace is joined")
}

fn options() -> PodOptions {
    PodOptions { queue_pairs: 1, resolv_conf: "nameserver 10.88.0.1\n".to_owned(), policy: Policy::default() }
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
    pod.0.stop().await;
    drop(pod);
    assert_eq!(netns.redirections(), "");
}
