//! A host network of a story's own: the story's thread, and what it starts, live in a network namespace that nobody else has,
//! so that bridges, rules and leaks of other stories are not seen. Needs iproute2 and Debian's containernetworking-plugins.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns, unshare};

use crate::{Outcome, outcome};

mod cni;
mod left;

pub use cni::{Attachment, bridge, portmap, ptp};

/// Where `ip netns` has the names of namespaces.
const NETNS_DIR: &str = "/run/netns";

/// The host's network of a story. At its end nothing may be left in it (see `lan/left.rs`).
pub struct Lan(());

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
        Self(())
    }

    /// Makes another network namespace.
    #[must_use]
    pub fn netns(&self) -> Netns {
        Netns::create()
    }

    /// A namespace that plays the outside: this host's default route leads there, and its routes to pods lead here. The host is
    /// 192.0.2.2 and fd99::2, the outside 192.0.2.1 and fd99::1.
    #[must_use]
    pub fn outside(&self) -> Netns {
        let outside = Netns::create();
        ip(&format!("link add uplink type veth peer name downlink netns {}", outside.name()));
        ip("addr add 192.0.2.2/24 dev uplink");
        ip("addr add fd99::2/64 dev uplink nodad");
        ip("link set uplink up");
        outside.ip("addr add 192.0.2.1/24 dev downlink\naddr add fd99::1/64 dev downlink nodad\nlink set downlink up");
        outside.ip("route add 10.88.0.0/24 via 192.0.2.2\n-6 route add fd88::/64 via fd99::2");
        ip("route add default via 192.0.2.1");
        ip("-6 route add default via fd99::1");
        outside
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
        if !std::thread::panicking() {
            left::assert_nothing_of_the_story();
        }
    }
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

/// A network namespace with a path, as container engines make them. At its end nothing of a VM may be left in it.
pub struct Netns {
    name: Name,
    identity: (u64, u64),
    is_checked: bool,
}

/// The name of a namespace, removed when dropped.
struct Name(String);

impl Netns {
    fn create() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = Name(format!("story-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        ip(&format!("netns add {}", name.0));
        ip(&format!("-n {} link set lo up", name.0));
        let identity = left::identity(&Path::new(NETNS_DIR).join(&name.0)).expect("it was made");
        Self { name, identity, is_checked: true }
    }

    /// Its name for `ip -n`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name.0
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(self.name())
    }

    /// A command that will run in it.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.name(), program]).stdin(Stdio::null());
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
            ip(&format!("-n {} {words}", self.name()));
        }
    }

    /// Does something in it, on a thread of its own. A socket that is made there stays there.
    ///
    /// # Panics
    /// When the work does.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_network(&self.path(), work)
    }

    /// Queues of tc's for what arrives, which nobody has by default.
    #[must_use]
    pub fn redirections(&self) -> String {
        left::redirections(self.name())
    }

    /// Removes its name now, though a VM lives in it.
    pub fn remove(mut self) {
        self.is_checked = false;
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if self.is_checked && !std::thread::panicking() {
            left::assert_nothing_of_a_vm(self.name());
            left::assert_not_open(self.identity);
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let mut command = Command::new("ip");
        command.args(["netns", "del", &self.0]);
        let removed = outcome(command);
        assert!(removed.code == 0 || std::thread::panicking(), "{removed:?}");
    }
}
