//! A host network of a story's own: the story's thread, and what it starts, live in a network namespace that nobody else has,
//! so that bridges, rules and leaks of other stories are not seen. Needs iproute2 and Debian's containernetworking-plugins.

use std::cell::Cell;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Value, json};

use crate::{Outcome, outcome};

/// Where Debian has the plugins.
const CNI_DIR: &str = "/usr/lib/cni";

/// The host's network of a story. At its end nothing but loopback may be left in it.
pub struct Lan {
    /// Whether nftables is looked at, which costs a process.
    used_rules: Cell<bool>,
}

impl Lan {
    /// Moves the calling thread into a new network namespace.
    ///
    /// # Panics
    /// When the host does not allow it.
    #[must_use]
    pub fn enter() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("stories run as root");
        ip("link set lo up");
        // As distributions have it; a new namespace lets nobody use ping sockets.
        fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").expect("a sysctl of this namespace");
        Self { used_rules: Cell::new(false) }
    }

    /// Makes another network namespace.
    #[must_use]
    pub fn netns(&self) -> Netns {
        Netns::create()
    }

    /// A namespace that plays the outside: this host's default route leads there. The host is 192.0.2.2 and fd99::2, the
    /// outside 192.0.2.1 and fd99::1.
    #[must_use]
    pub fn outside(&self) -> Netns {
        let outside = Netns::create();
        ip(&format!("link add uplink type veth peer name downlink netns {}", outside.name));
        ip("addr add 192.0.2.2/24 dev uplink");
        ip("addr add fd99::2/64 dev uplink nodad");
        ip("link set uplink up");
        for words in
            ["addr add 192.0.2.1/24 dev downlink", "addr add fd99::1/64 dev downlink nodad", "link set downlink up"]
        {
            ip(&format!("-n {} {words}", outside.name));
        }
        ip("route add default via 192.0.2.1");
        ip("-6 route add default via fd99::1");
        outside
    }

    /// Lets the plugins write rules, whose absence is checked at the end.
    pub fn expect_rules(&self) {
        self.used_rules.set(true);
    }
}

/// Does something in the network namespace at `path`, on a thread of its own. A socket that is made there stays there.
pub(crate) fn in_network<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> T {
    let namespace = fs::File::open(path).expect("the namespace");
    std::thread::scope(|scope| {
        let entered = || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).expect("stories run as root");
            work()
        };
        scope.spawn(entered).join().expect("it does not panic")
    })
}

impl Drop for Lan {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let ours = fs::metadata("/proc/thread-self/ns/net").expect("our namespace").ino();
        let here = |pid: &PathBuf| fs::metadata(pid.join("ns/net")).is_ok_and(|found| found.ino() == ours);
        let other = |pid: &PathBuf| {
            let number = pid.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
            number.is_some_and(|number| number != std::process::id())
        };
        let processes: Vec<String> = fs::read_dir("/proc")
            .expect("proc")
            .flatten()
            .map(|entry| entry.path())
            .filter(|pid| other(pid) && here(pid))
            .filter_map(|pid| fs::read_to_string(pid.join("cmdline")).ok())
            .collect();
        assert!(processes.is_empty(), "processes left in the story's network: {processes:?}");
        let links = ip("-o link show");
        let left: Vec<&str> =
            links.lines().filter(|line| !line.contains(": lo:") && !line.contains("bridge")).collect();
        assert!(left.iter().all(|line| is_known(line)), "interfaces left behind: {left:?}");
        if self.used_rules.get() {
            let rules =
                ["iptables-save", "ip6tables-save"].map(|program| outcome(Command::new(program)).stdout).concat();
            // The plugins keep their chains, and the jumps to them.
            let kinds = ["-j DNAT", "-s 10.", "-s fd"];
            let left: Vec<&str> = rules.lines().filter(|rule| kinds.iter().any(|kind| rule.contains(kind))).collect();
            assert!(left.is_empty(), "rules left behind: {left:?}");
        }
    }
}

/// The link to the outside, and bridges, which CNI's plugin keeps for the next pod.
fn is_known(line: &str) -> bool {
    ["uplink", "cni", "vmrun"].iter().any(|name| line.contains(&format!(": {name}")))
}

/// Runs `ip` in the story's network.
///
/// # Panics
/// When it fails.
pub fn ip(words: &str) -> String {
    let mut command = Command::new("ip");
    command.args(words.split_whitespace());
    let done = outcome(command);
    assert_eq!(done.code, 0, "ip {words}: {}", done.stderr);
    done.stdout
}

/// A network namespace with a path, as container engines make them.
pub struct Netns {
    name: String,
}

impl Netns {
    fn create() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("story-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        Self { name }
    }

    /// Its name for `ip -n`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// A command that will run in it.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]).stdin(Stdio::null());
        command
    }

    /// Runs a shell script in it.
    #[must_use]
    pub fn run(&self, script: &str) -> Outcome {
        let mut command = self.command("sh");
        command.args(["-c", script]);
        outcome(command)
    }

    /// Runs `ip` in it, once for each line.
    ///
    /// # Panics
    /// When it fails.
    pub fn ip(&self, lines: &str) {
        for words in lines.lines() {
            ip(&format!("-n {} {words}", self.name));
        }
    }

    /// Does something in it, on a thread of its own. A socket that is made there stays there.
    ///
    /// # Panics
    /// When the work does.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_network(&self.path(), work)
    }

    /// Queues and filters that are not there by default.
    #[must_use]
    pub fn redirections(&self) -> String {
        let queues = self.run("tc qdisc show").stdout;
        queues.lines().filter(|line| line.contains("ingress")).map(|line| format!("{line}\n")).collect()
    }

    /// Removes it now.
    pub fn remove(self) {
        drop(self);
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let mut command = Command::new("ip");
        command.args(["netns", "del", &self.name]);
        let removed = outcome(command);
        assert!(removed.code == 0 || std::thread::panicking(), "{removed:?}");
    }
}

/// An attachment of a namespace to a network by real CNI plugins, undone when dropped.
pub struct Attachment {
    netns: PathBuf,
    id: String,
    interface: String,
    plugins: Vec<Value>,
    /// What the last plugin said.
    pub result: Value,
}

impl Attachment {
    /// Runs the plugins' ADD, in their order (CNI specification 1.0.0, section 3).
    ///
    /// # Panics
    /// When a plugin refuses.
    #[must_use]
    pub fn add(netns: &Netns, interface: &str, plugins: Vec<Value>) -> Self {
        let mut attachment = Self {
            netns: netns.path(),
            id: netns.name().to_owned(),
            interface: interface.to_owned(),
            plugins,
            result: Value::Null,
        };
        for mut plugin in attachment.plugins.clone() {
            plugin["prevResult"] = attachment.result.take();
            let added = attachment.call("ADD", &plugin);
            assert_eq!(added.code, 0, "{added:?}");
            attachment.result = serde_json::from_str(&added.stdout).expect("JSON");
        }
        attachment
    }

    /// Address of the namespace in the family of `like`.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn address(&self, like: char) -> String {
        let ips = self.result["ips"].as_array().expect("addresses");
        let found = ips.iter().filter_map(|ip| ip["address"].as_str()).find(|address| address.contains(like));
        found.expect("an address").split('/').next().expect("a part").to_owned()
    }

    fn call(&self, verb: &str, plugin: &Value) -> Outcome {
        let mut plugin = plugin.clone();
        if plugin["prevResult"].is_null() {
            plugin.as_object_mut().expect("an object").remove("prevResult");
        }
        let program = plugin["type"].as_str().expect("a type");
        let mut child = Command::new(format!("{CNI_DIR}/{program}"))
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.id)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", &self.interface)
            .env("CNI_PATH", CNI_DIR)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("containernetworking-plugins is installed");
        child.stdin.take().expect("piped").write_all(plugin.to_string().as_bytes()).expect("read");
        Outcome::of(child.wait_with_output().expect("it ends"))
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        for plugin in self.plugins.clone().iter().rev() {
            let mut plugin = plugin.clone();
            plugin["prevResult"] = self.result.clone();
            let deleted = self.call("DEL", &plugin);
            assert!(deleted.code == 0 || std::thread::panicking(), "{deleted:?}");
        }
    }
}

/// The `bridge` plugin with `host-local`: pods of one bridge, 10.88.0.0/24 and fd88::/64, the host at `.1` and `::1`.
#[must_use]
pub fn bridge(state: &Path, mtu: u32) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "story", "type": "bridge", "bridge": "cni0",
        "isGateway": true, "ipMasq": false, "hairpinMode": true, "mtu": mtu,
        "ipam": host_local(state),
    })
}

/// The `ptp` plugin with `host-local`: a link of its own for each pod.
#[must_use]
pub fn ptp(state: &Path, mtu: u32) -> Value {
    json!({ "cniVersion": "1.0.0", "name": "story", "type": "ptp", "ipMasq": false, "mtu": mtu, "ipam": host_local(state) })
}

fn host_local(state: &Path) -> Value {
    json!({
        "type": "host-local", "dataDir": state,
        "ranges": [[{ "subnet": "10.88.0.0/24" }], [{ "subnet": "fd88::/64" }]],
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
    })
}
