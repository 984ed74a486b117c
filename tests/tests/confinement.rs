//! The room that a hostile guest finds when it has taken over the VMM: looked at from outside while a VM runs.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
use tests::Story;
use tests::guest::{self, BUSY, config, kernel};
use tests::pod::Pod;
use vmm_api::Fd;

/// `CAP_CHOWN`, `CAP_DAC_OVERRIDE`, `CAP_FOWNER`, `CAP_FSETID`, `CAP_SETGID`, `CAP_SETUID`, `CAP_SETFCAP`.
const KEPT_CAPABILITIES: &str = "00000000800000db";

/// A process, seen from outside.
struct Seen(PathBuf);

impl Seen {
    fn of(pid: u32) -> Self {
        Self(PathBuf::from(format!("/proc/{pid}")))
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn link(&self, name: &str) -> String {
        fs::read_link(self.0.join(name)).expect("a link").display().to_string()
    }

    fn list(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.0.join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
    }

    /// A field of the status of each thread: all that are different.
    fn fields(&self, name: &str) -> BTreeSet<String> {
        let statuses = self.list("task").into_iter().map(|thread| self.read(&format!("task/{thread}/status")));
        statuses.map(|status| field(&status, name)).collect()
    }

    /// The cookie of core scheduling of each thread: all that are different. There is none where no core runs two threads, or the
    /// kernel cannot keep them apart.
    fn cookies(&self) -> BTreeSet<Option<u64>> {
        let threads = self.list("task").into_iter().map(|thread| thread.parse().ok().and_then(Pid::from_raw));
        let asked = threads.map(|thread| core_scheduling_cookie(thread.expect("an id"), CoreSchedulingScope::Thread));
        let known = asked.map(|cookie| match cookie {
            Err(Errno::NODEV | Errno::INVAL) => None,
            cookie => Some(cookie.expect("a cookie")),
        });
        known.collect()
    }

    /// The namespaces that are also ours.
    fn shared_namespaces(&self) -> Vec<&'static str> {
        let ours = Self(PathBuf::from("/proc/self"));
        let kinds = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];
        kinds.into_iter().filter(|kind| self.link(&format!("ns/{kind}")) == ours.link(&format!("ns/{kind}"))).collect()
    }
}

/// The value behind `NAME:` in lines of that form.
fn field(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
}

fn only(value: &str) -> BTreeSet<String> {
    BTreeSet::from([value.to_owned()])
}

#[tokio::test(flavor = "current_thread")]
async fn a_running_vmm_has_no_namespace_and_no_right_of_the_host() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    let vmm = Seen::of(pod.0.vmm_pid());
    assert_eq!(vmm.shared_namespaces(), [""; 0]);
    assert!(field(&vmm.read("status"), "NSpid").ends_with("\t1"), "the first process of its pid namespace");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(vmm.fields(set), only(KEPT_CAPABILITIES), "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(vmm.fields(set), only("0000000000000000"), "{set}");
    }
    assert_eq!(vmm.fields("NoNewPrivs"), only("1"));
    assert_eq!(vmm.fields("Seccomp"), only("2"), "each thread's system calls are filtered");
    assert_eq!(vmm.read("environ"), "");
    let limits = vmm.read("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a limit");
    assert_eq!(core.split_whitespace().collect::<Vec<_>>()[4..6], ["0", "0"], "{limits}");
    pod.0.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn no_thread_of_anybody_else_shares_a_core_with_a_vmm() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    let ours = Seen(PathBuf::from("/proc/self")).cookies();
    let vmms = Seen::of(pod.0.vmm_pid()).cookies();
    assert_eq!(vmms.len(), 1, "one cookie for every thread: {vmms:?}");
    assert!(vmms.contains(&None) || vmms.is_disjoint(&ours), "{vmms:?} is also ours");
    pod.0.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_running_vmm_reaches_no_file_but_its_shares() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    assert_eq!(pod.run("one", "ls /bin > /dev/null; echo on", |_| ()).await, (0, "on\n".to_owned()));
    let vmm = Seen::of(pod.0.vmm_pid());
    assert_eq!(vmm.list("root"), ["proc"]);
    assert_eq!(vmm.list("root/proc"), ["self"]);
    assert_eq!(vmm.list("root/proc/self"), ["fd"]);
    let mounts = vmm.read("mountinfo");
    assert_eq!(mounts.lines().count(), 2, "{mounts}");
    assert!(mounts.lines().all(|line| line.contains(" ro,nosuid,nodev,noexec")), "{mounts}");

    // Its descriptors, less those of shares, which are in mounts that no mount table shows.
    let host_mounts: BTreeSet<String> = Seen(PathBuf::from("/proc/self"))
        .read("mountinfo")
        .lines()
        .map(|line| line.split(' ').next().expect("a mount id").to_owned())
        .collect();
    let of_host = |fd: &String| host_mounts.contains(&field(&vmm.read(&format!("fdinfo/{fd}")), "mnt_id"));
    let opened: BTreeSet<String> =
        vmm.list("fd").into_iter().filter(of_host).map(|fd| vmm.link(&format!("fd/{fd}"))).collect();
    let allowed = |link: &String| ["/dev/null", "/dev/kvm", "pipe:"].iter().any(|kind| link.starts_with(kind));
    let unexpected: Vec<_> = opened.iter().filter(|link| !allowed(link)).collect();
    // The standard error is the test's own.
    let stderr = fs::read_link("/proc/self/fd/2").expect("a link").display().to_string();
    assert!(unexpected.iter().all(|link| **link == stderr), "{unexpected:?}");
    pod.0.stop().await;
}

#[test]
fn without_root_the_vmm_is_confined_all_the_same() {
    let (mut control, theirs) = UnixStream::pair().expect("a socket pair");
    let mut config = config(Fd(4));
    config.control = Fd(3);
    let mut command = guest::vmm(&config, vec![theirs.into(), kernel(&BUSY)]);
    let mut vmm = command.uid(1000).gid(1000).spawn().expect("the VMM starts");
    writeln!(control, r#"{{"request":"state"}}"#).expect("written");
    let mut lines = BufReader::new(control.try_clone().expect("a socket")).lines();
    assert!(lines.next().expect("a line").expect("readable").contains("running"));
    let seen = Seen::of(vmm.id());
    // Who spawns it makes the pid namespace, which here was the story.
    assert_eq!(seen.shared_namespaces(), ["pid"]);
    assert_eq!(seen.fields("CapEff"), only(KEPT_CAPABILITIES));
    assert_eq!(seen.fields("Seccomp"), only("2"));
    assert_eq!(seen.read("uid_map").split_whitespace().collect::<Vec<_>>(), ["0", "1000", "1"]);
    assert_eq!(seen.list("root"), ["proc"]);
    drop((control, lines));
    assert_eq!(vmm.wait().expect("wait").code(), Some(0));
}
