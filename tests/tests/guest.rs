//! What the host sets in the guest beside containers: its network, its clock, its CPUs, shares that come and go.

use sandbox::CachePolicy;
use sandbox::message::{Interface, Neighbour, Route, SetNetworkRequest};
use sandbox::share::{Rootfs, Share, rootfs_tree};
use serde_json::{Value, json};
use tests::Story;
use tests::pod::{INVALID_ARGUMENT, NOT_FOUND, Pod, refusal};

/// Lets a container change the guest's network, which is also its own.
fn network_admin(spec: &mut Value) {
    // busybox reads a MAC address through a packet socket, hence the second.
    let sets = ["CAP_NET_ADMIN", "CAP_NET_RAW"];
    spec["process"]["capabilities"] = json!({ "bounding": sets, "effective": sets, "permitted": sets });
}

fn interface(name: &str, mac: &str, addresses: &[&str], mtu: u32) -> Interface {
    let addresses = addresses.iter().map(ToString::to_string).collect();
    Interface { name: name.to_owned(), mac: mac.to_owned(), addresses, mtu, ..Default::default() }
}

#[tokio::test(flavor = "current_thread")]
async fn network_is_set_as_asked() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    let make = "ip link add d0 type dummy && ip link set d0 address 02:00:00:00:00:01";
    assert_eq!(pod.run("make", make, network_admin).await, (0, String::new()));
    let mut request = SetNetworkRequest {
        interfaces: vec![interface("eth0", "02:00:00:00:00:01", &["10.1.2.3/24", "fd00::3/64"], 1400)],
        resolv_conf: "nameserver 10.1.2.1\n".to_owned(),
        ..Default::default()
    };
    let default = Route { destination: "0.0.0.0/0".into(), gateway: "10.1.2.1".into(), ..Default::default() };
    let direct = Route { destination: "10.9.0.0/16".into(), interface: "eth0".into(), metric: 7, ..Default::default() };
    request.routes = vec![default, direct];
    let (interface_name, address, mac) = ("eth0".to_owned(), "10.1.2.1".to_owned(), "02:00:00:00:00:99".to_owned());
    request.neighbours = vec![Neighbour { interface: interface_name, address, mac, ..Default::default() }];
    pod.0.set_network(&request).await.unwrap();
    // What is set already is no error.
    pod.0.set_network(&request).await.unwrap();

    let (_, text) = pod.run("look", "ip addr; ip route; ip neigh", network_admin).await;
    for expected in [
        "eth0: <BROADCAST,NOARP,UP,LOWER_UP> mtu 1400",
        "inet 10.1.2.3/24",
        "inet6 fd00::3/64",
        "inet 127.0.0.1/8",
        "default via 10.1.2.1 dev eth0",
        "10.9.0.0/16 dev eth0",
        "10.1.2.1 dev eth0 lladdr 02:00:00:00:00:99",
    ] {
        assert!(text.contains(expected), "no {expected:?} in {text}");
    }
    request.interfaces = vec![interface("eth7", "", &[], 0)];
    assert_eq!(refusal(pod.0.set_network(&request).await).0, NOT_FOUND);
    request.interfaces = vec![interface("eth0", "", &["10.0.0.1"], 0)];
    assert_eq!(refusal(pod.0.set_network(&request).await).0, INVALID_ARGUMENT);

    pod.0.sync_clock().await.unwrap();
    let online = pod.0.online_resources().await.unwrap();
    assert_eq!(online.cpus, 1);
    assert!(online.memory_bytes >= 256 << 20, "{online:?}");
    pod.0.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn share_comes_and_goes_while_the_guest_runs() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    std::fs::write(story.volume().join("file"), "shared").unwrap();
    let share = || {
        let rootfs = Rootfs::Directory { path: story.volume(), read_only: false };
        Share::of_tree("extra", rootfs_tree(rootfs, &story.scratch()).unwrap(), CachePolicy::Auto)
    };
    let mounted = |spec: &mut Value| {
        let mount =
            json!({ "destination": "/mnt", "type": "bind", "source": "/run/share/extra", "options": ["rbind"] });
        spec["mounts"].as_array_mut().unwrap().push(mount);
        spec["root"]["readonly"] = json!(false);
    };
    pod.0.add_share(share()).await.unwrap();
    assert_eq!(pod.run("one", "cat /mnt/file", mounted).await, (0, "shared".to_owned()));
    pod.0.remove_share("extra").await.unwrap();
    // The same place on the bus can be used again.
    pod.0.add_share(share()).await.unwrap();
    assert_eq!(pod.run("two", "cat /mnt/file", mounted).await, (0, "shared".to_owned()));
    pod.0.remove_share("extra").await.unwrap();
    pod.0.stop().await;
}
