//! The network that CNI's plugins give a pod, through containerd's CRI plugin.

use std::fs;
use std::path::Path;

use k8s_cri::v1::{NamespaceMode, PortMapping, Protocol};
use tests::containerd::{Check, Containerd};
use tests::cri::{Cri, WAIT, container, handler};
use tests::{checks, outcome, tell_each_release};

const CHECKS: &[Check] = checks![
    pods_have_the_network_of_cni,
    an_interface_that_comes_later_is_the_pods_until_it_goes,
    a_pod_in_the_network_of_the_host_is_refused_by_name,
];

/// What each release is told.
const SHORT_CHECKS: &[Check] = checks![an_interface_that_comes_later_is_the_pods_until_it_goes];

tell_each_release!(CHECKS, SHORT_CHECKS);

const CURL: &str = "curl --silent --show-error --globoff --max-time 60";

fn has_open(pid: u32, path: &str) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|target| target == Path::new(path))
}

fn pods_have_the_network_of_cni(containerd: &mut Containerd) {
    let in_room = |script: &str| outcome(containerd.command("sh", &["-c", script]));
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let mut config = cri.pod_config("server");
        let protocol = Protocol::Tcp.into();
        config.port_mappings =
            vec![PortMapping { protocol, container_port: 80, host_port: 8080, ..Default::default() }];
        let server = cri.run_pod(config, handler()).await.expect("a pod");
        let network = cri.pod_status(&server).await.network.expect("a network");
        let (v4, v6) = (network.ip, network.additional_ips[0].ip.clone());
        let page = "mkdir /www; echo page of the pod >/www/index.html; echo up; exec httpd -f -p 80 -h /www";
        let web = cri.start(&server, container("web", page)).await.expect("started");
        server.log_shows("web", "up");
        let own = cri.shell(&web, "ip addr show eth0; ip route").await;
        assert!(own.contains(&format!("inet {v4}/16")) && own.contains(&format!("inet6 {v6}/64")), "{own}");
        assert!(own.contains("default via 10.88.0.1 dev eth0"), "{own}");
        // One of the two by the host's kernel.
        let drop_ins = containerd.path("etc-vmrun/config.d");
        fs::create_dir(&drop_ins).expect("a folder");
        fs::write(drop_ins.join("vhost.toml"), "[network]\nvhost = true\n").expect("a drop-in");
        let client = cri.run_pod(cri.pod_config("client"), handler()).await.expect("a pod");
        fs::remove_dir_all(drop_ins).expect("removed");
        let by_kernel = containerd.processes("vmm").into_iter().filter(|pid| has_open(*pid, "/dev/vhost-net")).count();
        assert_eq!(by_kernel, usize::from(handler() == "vm"), "VMMs with vhost-net");
        let looker = cri.start(&client, container("looker", WAIT)).await.expect("started");
        for address in [v4.clone(), format!("[{v6}]")] {
            assert_eq!(in_room(&format!("{CURL} http://{address}/")).success(), "page of the pod\n");
            let fetched = cri.shell(&looker, &format!("wget -q -O - http://{address}/")).await;
            assert_eq!(fetched, "page of the pod\n");
        }
        // The port of the room, by the plugin `portmap`.
        assert_eq!(in_room(&format!("{CURL} http://10.88.0.1:8080/")).success(), "page of the pod\n");
        let mut forwarded = cri.forward(containerd, &server, 80).await;
        forwarded.send(0, b"GET / HTTP/1.0\r\n\r\n");
        let answer = forwarded.receive_until(0, "page of the pod\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("page of the pod\n"), "{answer}");
        assert_eq!(cri.forward(containerd, &server, 81).await.receive_until(0, "anything"), "");
        cri.remove_pod(&client).await.expect("removed");
        cri.remove_pod(&server).await.expect("removed");
    });
    assert_eq!(in_room("ip netns list; iptables-save | grep 8080; true").success(), "");
}

fn an_interface_that_comes_later_is_the_pods_until_it_goes(containerd: &mut Containerd) {
    let in_room = |script: &str| outcome(containerd.command("sh", &["-ec", script])).success().to_owned();
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let pod = cri.run_pod(cri.pod_config("story-pod"), handler()).await.expect("a pod");
        let looker = cri.start(&pod, container("looker", WAIT)).await.expect("started");
        // The only one there.
        let netns = in_room("ls /run/netns").trim().to_owned();
        in_room(&format!("ip link add late type veth peer name eth1 netns {netns}"));
        in_room("ip addr add 10.89.0.1/24 dev late; ip link set late up");
        in_room(&format!("ip -n {netns} addr add 10.89.0.2/24 dev eth1; ip -n {netns} link set eth1 up"));
        let script = "until ip addr show eth1 2>/dev/null | grep 'inet 10.89.0.2/24'; do sleep 0.2; done; \
            ping -c 1 -W 30 10.89.0.1; ls /sys/class/net";
        let seen = cri.shell(&looker, script).await;
        assert!(seen.contains("1 packets received") && seen.contains("eth0\neth1\nlo\n"), "{seen}");
        in_room("ip link del late");
        let script =
            "while ip link show eth1; do sleep 0.2; done >/dev/null 2>&1; ls /sys/class/net; ping -c 1 -W 30 10.88.0.1";
        let seen = cri.shell(&looker, script).await;
        assert!(seen.starts_with("eth0\nlo\n") && seen.contains("1 packets received"), "{seen}");
        cri.remove_pod(&pod).await.expect("removed");
    });
}

fn a_pod_in_the_network_of_the_host_is_refused_by_name(containerd: &mut Containerd) {
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let mut config = cri.pod_config("story-pod");
        let security = config.linux.as_mut().expect("linux").security_context.as_mut().expect("security context");
        security.namespace_options.as_mut().expect("namespaces").network = NamespaceMode::Node.into();
        let refused = cri.run_pod(config, handler()).await.map(drop).expect_err("refused");
        assert!(refused.message().contains("hostNetwork"), "{refused}");
        assert_eq!(cri.pod_count().await.expect("listed"), 0);
    });
}
