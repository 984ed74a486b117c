//! Two pods of a host network, each with two CPUs, and everybody whom they can talk to: each other, the host and the outside. All of them
//! run the program of [`crate::echo`].

use std::process::Command;

use sandbox::network::Policy;
use sandbox::plan::VmSize;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

use crate::echo::{Echo, READY};
use crate::lan::{Attachment, Lan, Netns, ip};
use crate::pod::{Pod, SMALL, net_capabilities, network};
use crate::{Story, iperf, outcome};

/// Ports of the host for the plugin `portmap`, one for each pod.
pub const HOST_PORTS: [u16; 2] = [8007, 8008];

/// What a pod asks each peer: `ask CPUS SIZE ADDRESS...`, with as many bytes as a packet has room for. Ping and UDP let nobody fragment
/// what fits. The guest's kernel sends from the queue of the CPU that asks, and hears the answer there.
const ASK: &str = r"
ask() {
    cpus=$1 size=$2; shift 2
    for at in $@; do
        ping -c 1 -W 20 -s $size $at >/dev/null && echo $at icmp
        nslookup story.example $at | grep -q 'Address: fd99::1$' && echo $at dns
    done
    taskset $cpus ECHO call 7 $size $@
}
";
/// What the guest's kernel has counted meanwhile.
const COUNTS: &str = "cat /proc/net/snmp /proc/net/snmp6 /proc/interrupts";

/// One of the two kinds of addresses.
struct Family {
    /// What its addresses have between their parts.
    sign: char,
    /// Bytes of a packet before the payload of ICMP and of UDP.
    headers_len: u32,
    /// The host, as a pod sees it, and the outside.
    others: [&'static str; 2],
    /// The CPU that asks, as taskset(1) has it.
    cpus: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family { sign: '.', headers_len: 20 + 8, others: ["10.88.0.1", "192.0.2.1"], cpus: "1" },
    Family { sign: ':', headers_len: 40 + 8, others: ["fd88::1", "fd99::1"], cpus: "2" },
];

/// The pods. What is below needs what is further below.
pub struct Pair {
    pods: [Pod; 2],
    attachments: [Attachment; 2],
    netns: [Netns; 2],
    _echoes: [Echo; 2],
    outside: Netns,
    _lan: Lan,
    echo: String,
    mtu: u32,
}

/// The program in the pods.
const ECHO_INSIDE: &str = "/opt/echo";

impl Pair {
    /// Wires them with what `plugins` has for a port of the host, and boots them with the datapath of the VMM. `echo` is the program.
    ///
    /// # Panics
    /// When something fails.
    pub async fn boot(story: &Story, echo: &str, mtu: u32, plugins: impl Fn(u16) -> Vec<Value>) -> Self {
        story.add_program(echo);
        let lan = Lan::enter();
        let outside = lan.outside();
        ip(&format!("link set uplink mtu {mtu}"));
        outside.ip(&format!("link set downlink mtu {mtu}"));
        let echoes = [Command::new(echo), outside.command(echo)].map(Echo::serve);
        let netns = [lan.netns(), lan.netns()];
        let attach = |at: usize| Attachment::add(&netns[at], "eth0", plugins(HOST_PORTS[at]));
        let attachments = [0, 1].map(attach);
        let pods = [boot(story, &netns[0]).await, boot(story, &netns[1]).await];
        Self { pods, attachments, netns, _echoes: echoes, outside, _lan: lan, echo: echo.to_owned(), mtu }
    }

    /// Asserts that everybody answers each pod by each protocol, nobody stands for the pod, no packet was fragmented, and each of the
    /// guest's CPUs has a queue.
    ///
    /// # Panics
    /// When it is not so.
    pub async fn assert_everybody_answers(&self) {
        for [asking, other] in [[0, 1], [1, 0]] {
            let (mut script, mut answers) = (ASK.replace("ECHO", ECHO_INSIDE), String::new());
            for family in &FAMILIES {
                let [own, other] = [asking, other].map(|at| self.attachments[at].address(family.sign));
                let everybody = [other.as_str(), family.others[0], family.others[1]];
                let size = self.mtu - family.headers_len;
                script += &format!("ask {} {size} {}\n", family.cpus, everybody.join(" "));
                answers += &everybody.map(|peer| format!("{peer} icmp\n{peer} dns\n")).concat();
                answers += &everybody.map(|peer| format!("{peer} tcp {own}\n{peer} udp\n")).concat();
            }
            let (_, output) = self.pods[asking].run("ask", &(script + COUNTS), net_capabilities).await;
            let counts = output.strip_prefix(&answers).unwrap_or_else(|| panic!("{output}\nis not\n{answers}"));
            assert_eq!(fragments(counts), 0, "{counts}");
            let interrupts = [0, 1].map(|queue| interrupts(counts, queue));
            assert!(interrupts.iter().all(|count| *count > 0), "{interrupts:?} {counts}");
        }
    }

    /// Asserts that the outside reaches each pod at its ports of the host, and nobody stands for the outside.
    ///
    /// # Panics
    /// When it is not so.
    pub fn assert_published(&self) {
        let size = self.mtu - FAMILIES[1].headers_len;
        for port in HOST_PORTS {
            let mut command = self.outside.command(&self.echo);
            command.args(["call", &port.to_string(), &size.to_string(), "192.0.2.2", "fd99::2"]);
            let answers = "192.0.2.2 tcp 192.0.2.1\n192.0.2.2 udp\nfd99::2 tcp fd99::1\nfd99::2 udp\n";
            assert_eq!(outcome(command).success(), answers, "port {port}");
        }
    }

    /// Asserts that a stream from one pod to the other lasts, to the first one's address with this sign.
    ///
    /// # Panics
    /// When it does not.
    pub async fn assert_stream(&self, sign: char) {
        let address = self.attachments[0].address(sign);
        let report = iperf::stream(&self.pods[0], &self.pods[1], &address).await;
        let segment_len = iperf::segment_len(self.mtu, &address);
        assert_eq!(report["start"]["tcp_mss_default"], json!(segment_len), "{}", report["start"]);
    }

    /// Asserts that the host has counted at the interfaces of the pods about what their VMMs have.
    ///
    /// # Panics
    /// When it has not.
    pub async fn assert_counted(&self) {
        for (pod, netns) in self.pods.iter().zip(&self.netns) {
            let told = pod.0.network_stats().await.expect("answered").remove(0);
            let read = netns.run("cat /sys/class/net/eth0/statistics/rx_bytes /sys/class/net/eth0/statistics/tx_bytes");
            let counted: Vec<u64> = read.success().lines().map(|line| line.parse().expect("a number")).collect();
            let differs = |counted: u64, told: u64| counted.abs_diff(told) > counted / 10;
            assert!(!differs(counted[0], told.rx_bytes) && !differs(counted[1], told.tx_bytes), "{counted:?} {told:?}");
        }
    }

    /// Ends the VMs, and takes the network back.
    pub async fn stop(self) {
        for pod in &self.pods {
            pod.0.stop().await;
        }
    }
}

/// Boots a pod that answers.
async fn boot(story: &Story, netns: &Netns) -> Pod {
    let pod = Pod::boot_with(story, VmSize { vcpus: 2, ..SMALL }, network(netns, Policy::default())).await;
    assert!(["net0", "net1"].iter().all(|name| pod.has_thread(name)), "{:?}", pod.threads());
    let streams = pod.create("echo", &format!("exec {ECHO_INSIDE} serve"), net_capabilities).await.expect("created");
    pod.0.start("echo").await.expect("started");
    let mut line = [0; READY.len()];
    streams.stdout.expect("standard output").read_exact(&mut line).await.expect("it listens");
    pod
}

/// Packets that a guest has taken apart or put together.
fn fragments(counts: &str) -> u64 {
    let number = |text: &str| text.parse::<u64>().expect("a number");
    // Names of counters in one line, numbers in the next.
    let mut ipv4 = counts.lines().filter_map(|line| line.strip_prefix("Ip: ")).map(str::split_whitespace);
    let (names, numbers) = (ipv4.next().expect("names"), ipv4.next().expect("numbers"));
    let ipv4 = names.zip(numbers).filter(|(name, _)| ["FragCreates", "ReasmReqds"].contains(name));
    let ipv6 = counts.lines().filter_map(|line| line.split_once(char::is_whitespace));
    let ipv6 = ipv6.filter(|(name, _)| ["Ip6FragCreates", "Ip6ReasmReqds"].contains(name));
    ipv4.chain(ipv6).map(|(_, count)| number(count.trim())).sum()
}

/// Interrupts of a queue for what arrives: `25:  17  4  PCI-MSIX-0000:00:03.0  1-edge  virtio2-input.0`.
fn interrupts(counts: &str, queue: u32) -> u64 {
    let ours = format!("-input.{queue}");
    let line =
        counts.lines().find(|line| line.ends_with(&ours)).unwrap_or_else(|| panic!("no queue {queue}: {counts}"));
    line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNTED: &str = "Ip: Forwarding FragOKs FragFails FragCreates ReasmReqds\nIp: 2 5 0 7 1\nIcmp: InMsgs\nIcmp: 3\n\
        Ip6ReasmReqds                   \t2\nIp6FragCreates                  \t30\n\
        25:         17          4   PCI-MSIX-0000:00:03.0   1-edge      virtio2-input.0\n\
        26:          0          0   PCI-MSIX-0000:00:03.0   2-edge      virtio2-output.0\n\
        27:          0          3   PCI-MSIX-0000:00:03.0   3-edge      virtio2-input.1\n";

    #[test]
    fn counts_of_a_guest_are_read() {
        assert_eq!(fragments(COUNTED), 7 + 1 + 2 + 30);
        assert_eq!([0, 1].map(|queue| interrupts(COUNTED, queue)), [21, 3]);
    }
}
