//! What may not be left in the host network of a story, and in a namespace of a pod whose VM has ended.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::{fs, io};

use super::ip;
use crate::{assert_nothing, outcome};

/// Chains that CNI's plugins `portmap` and `firewall` keep for the next pod, each with a jump to it.
const KEPT_CHAINS: [&str; 5] =
    ["CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-MASQ", "CNI-HOSTPORT-SETMARK", "CNI-FORWARD", "CNI-ADMIN"];
/// What two of them do.
const KEPT_RULES: [&str; 2] = ["-A CNI-HOSTPORT-MASQ -m mark ", "-A CNI-HOSTPORT-SETMARK "];
/// Loopback, and bridges, which CNI's plugin keeps for the next pod.
const KEPT_LINKS: [&str; 3] = ["lo", "cni0", "vmrun0"];

/// Asserts that nothing is left in the network of the calling thread, which was empty.
pub(super) fn assert_nothing_of_the_story() {
    assert_nothing("processes in the story's network", processes);
    assert_nothing("interfaces", || links().into_iter().filter(|name| !KEPT_LINKS.contains(&name.as_str())).collect());
    // The kernel has a number for each that a veth interface has led to, until the last who holds it lets it go.
    assert_nothing("network namespaces", || lines(&ip("netns list-id")));
    assert_nothing("rules", rules);
}

/// Asserts that a namespace has neither TAP interfaces of ours nor redirections.
pub(super) fn assert_nothing_of_a_vm(netns: &str) {
    assert_nothing("TAP interfaces and redirections", || {
        let taps = ip(&format!("-n {netns} -o link show")).lines().map(link_name).collect::<Vec<_>>();
        let taps = taps.into_iter().filter(|name| name.starts_with("vmtap"));
        taps.chain(lines(&redirections(netns))).collect()
    });
}

/// What a namespace is told from others by, through whatever file: device and inode.
pub(super) fn identity(namespace: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(namespace).map(|found| (found.dev(), found.ino()))
}

/// Asserts that this process has no descriptor of a namespace.
pub(super) fn assert_not_open(namespace: (u64, u64)) {
    assert_nothing("descriptors of a network namespace", || {
        let fds = fs::read_dir("/proc/self/fd").expect("proc").flatten().map(|entry| entry.path());
        let leads_there = fds.filter(|fd| identity(fd).is_ok_and(|found| found == namespace));
        leads_there.map(|fd| fd.display().to_string()).collect()
    });
}

/// Queues of tc's for what arrives.
pub(super) fn redirections(netns: &str) -> String {
    let mut command = Command::new("tc");
    command.args(["-n", netns, "qdisc", "show"]);
    let listed = outcome(command);
    let queues = listed.success().lines();
    let queues =
        queues.filter(|line| ["ingress", "clsact"].iter().any(|kind| line.starts_with(&format!("qdisc {kind}"))));
    queues.map(|line| format!("{line}\n")).collect()
}

fn processes() -> Vec<String> {
    let namespace = |process: &Path| identity(&process.join("ns/net"));
    let ours = namespace(Path::new("/proc/thread-self")).expect("our namespace");
    let other = |process: &Path| {
        let number = process.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
        number.is_some_and(|number| number != std::process::id())
    };
    let processes = fs::read_dir("/proc").expect("proc").flatten().map(|entry| entry.path());
    let here = processes.filter(|process| other(process) && namespace(process).is_ok_and(|found| found == ours));
    here.filter_map(|process| fs::read_to_string(process.join("cmdline")).ok()).collect()
}

fn links() -> Vec<String> {
    ip("-o link show").lines().map(link_name).collect()
}

/// `3: eth0@if2: <BROADCAST,...`
fn link_name(line: &str) -> String {
    let name = line.split(": ").nth(1).expect("a name");
    name.split('@').next().expect("a part").to_owned()
}

/// Rules of both families, and chains that somebody has made, but for those that are kept.
fn rules() -> Vec<String> {
    let saved = ["iptables-save", "ip6tables-save"].map(|program| outcome(Command::new(program)).success().to_owned());
    added(&saved.concat())
}

fn added(saved: &str) -> Vec<String> {
    let is_chain = |line: &str| line.starts_with(':') && line.contains(" - ");
    // What iptables cannot read it tells in a comment.
    let is_rule = |line: &str| ["-A ", "# Table "].iter().any(|start| line.starts_with(start));
    let is_of_chain =
        |line: &str, chain| line.starts_with(&format!(":{chain} ")) || line.ends_with(&format!(" -j {chain}"));
    let is_kept = |line: &str| {
        KEPT_CHAINS.iter().any(|chain| is_of_chain(line, chain)) || KEPT_RULES.iter().any(|rule| line.starts_with(rule))
    };
    lines(saved).into_iter().filter(|line| (is_chain(line) || is_rule(line)) && !is_kept(line)).collect()
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::added;

    #[test]
    fn chains_that_plugins_keep_are_not_left_behind() {
        let kept = r#"
*nat
:PREROUTING ACCEPT [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark" -j MARK --set-xmark 0x2000/0x2000
:CNI-ADMIN - [0:0]
:CNI-FORWARD - [0:0]
-A FORWARD -m comment --comment "CNI firewall plugin rules" -j CNI-FORWARD
-A CNI-FORWARD -m comment --comment "CNI firewall plugin admin overrides" -j CNI-ADMIN
"#;
        assert!(added(kept).is_empty(), "{:?}", added(kept));
    }

    #[test]
    fn what_is_a_pods_is_left_behind() {
        let left = [
            ":CNI-DN-2ea8959ab60cea2c009db - [0:0]",
            "-A CNI-HOSTPORT-DNAT -p udp -m multiport --dports 8007 -j CNI-DN-2ea8959ab60cea2c009db",
            "-A CNI-FORWARD -d 10.214.0.7/32 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "# Table `inet story' is incompatible, use 'nft' tool.",
        ];
        assert_eq!(added(&left.join("\n")), left);
    }
}
