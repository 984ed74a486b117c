//! The room that a hostile guest finds when it has taken over the VMM: looked at from outside while a VM runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
use tempfile::TempDir;
use tests::guest::{self, BUSY, config, kernel};
use tests::lan::Lan;
use tests::pod::Pod;
use tests::python::Python;
use tests::{Story, eventually};
use vmm::jail::ThreadKind;
use vmm_api::Fd;

/// `CAP_CHOWN`, `CAP_DAC_OVERRIDE`, `CAP_FOWNER`, `CAP_FSETID`, `CAP_SETGID`, `CAP_SETUID`, `CAP_SETFCAP`.
const KEPT_CAPABILITIES: &str = "00000000800000db";

const DEADLINE: Duration = Duration::from_secs(60);
/// How many filters of system calls a thread of each kind has, and how its name begins: one is its own, and those that the thread
/// `devices` starts have the one of that too. The main thread is the first.
const FILTERS: [(ThreadKind, &str, u32); 6] = [
    (ThreadKind::EventLoop, "", 1),
    (ThreadKind::Vcpu, "vcpu", 1),
    (ThreadKind::Devices, "devices", 1),
    (ThreadKind::Fs, "fs", 2),
    (ThreadKind::Net, "net", 2),
    (ThreadKind::VsockFinish, "vsock-finish", 2),
];
/// Threads of the host's kernel in a VMM: of KVM's large pages, and of vhost-net.
const OF_KERNEL: [&str; 2] = ["kvm-", "vhost-"];

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

    /// The kind of each thread of a VMM and how many filters it should have, by its id; or the name of a thread of no kind.
    fn kinds(&self) -> Result<BTreeMap<String, (ThreadKind, u32)>, String> {
        let names = self.list("task").into_iter().map(|thread| (self.read(&format!("task/{thread}/comm")), thread));
        let ours = names.filter(|(name, _)| !OF_KERNEL.iter().any(|kernels| name.starts_with(kernels)));
        let kind = |(name, thread): (String, String)| {
            let is_first = self.0.ends_with(&thread);
            let has = |beginning: &str| name.starts_with(beginning) && beginning.is_empty() == is_first;
            let found = FILTERS.into_iter().find(|(_, beginning, _)| has(beginning));
            found.map(|(kind, _, count)| (thread, (kind, count))).ok_or(name)
        };
        ours.map(kind).collect()
    }

    /// The kinds of threads of a VMM, and whether all of each have their filters.
    fn filtered(&self) -> Result<BTreeMap<ThreadKind, bool>, String> {
        let mut filtered = BTreeMap::new();
        for (thread, (kind, count)) in self.kinds()? {
            let status = self.read(&format!("task/{thread}/status"));
            *filtered.entry(kind).or_insert(true) &= field(&status, "Seccomp_filters") == count.to_string();
        }
        Ok(filtered)
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

/// What [`Seen::filtered`] says of a VMM with these kinds of threads, of which one may have no filter.
fn all_but(missing: Option<ThreadKind>, kinds: &[ThreadKind]) -> Result<BTreeMap<ThreadKind, bool>, String> {
    Ok(kinds.iter().map(|kind| (*kind, Some(*kind) != missing)).collect())
}

fn only(value: &str) -> BTreeSet<String> {
    BTreeSet::from([value.to_owned()])
}

const OF_BUSY: [ThreadKind; 3] = [ThreadKind::EventLoop, ThreadKind::Vcpu, ThreadKind::Devices];
const OF_A_POD: [ThreadKind; 4] = [ThreadKind::EventLoop, ThreadKind::Vcpu, ThreadKind::Devices, ThreadKind::Fs];

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
    assert_eq!(vmm.filtered(), all_but(None, &OF_A_POD), "by the filter of its kind");
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
    eventually(DEADLINE, "each thread is filtered", || seen.filtered() == all_but(None, &OF_BUSY));
    assert_eq!(seen.read("uid_map").split_whitespace().collect::<Vec<_>>(), ["0", "1000", "1"]);
    assert_eq!(seen.list("root"), ["proc"]);
    drop((control, lines));
    assert_eq!(vmm.wait().expect("wait").code(), Some(0));
}

/// A link to the VMM that leaves out the filter of a kind of threads; which one is the name of the link.
fn unfiltered(dir: &Path, missing: ThreadKind) -> PathBuf {
    let program = std::env::var_os("UNFILTERED_VMM").expect("UNFILTERED_VMM names the program: use `make test`");
    let link = dir.join(format!("{missing:?}"));
    symlink(program, &link).expect("a link");
    link
}

#[test]
fn a_filter_that_is_left_out_is_noticed() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for missing in OF_BUSY {
        let (control, theirs) = UnixStream::pair().expect("a socket pair");
        let mut config = config(Fd(4));
        config.control = Fd(3);
        let mut command = guest::program(&unfiltered(dir.path(), missing), &config, vec![theirs.into(), kernel(&BUSY)]);
        let mut vmm = command.spawn().expect("the VMM starts");
        let seen = Seen::of(vmm.id());
        // Until it has started, it is not a VMM.
        let message = format!("a VMM without the filter of {missing:?} is told from one with it");
        eventually(DEADLINE, &message, || {
            seen.list("task").len() >= OF_BUSY.len() && seen.filtered() == all_but(Some(missing), &OF_BUSY)
        });
        drop((control, command));
        assert_eq!(vmm.wait().expect("wait").code(), Some(0));
    }
}

#[test]
fn a_filter_that_is_left_out_of_the_threads_of_shares_is_noticed() {
    let story = Story::new();
    let vmm = unfiltered(&story.volume(), ThreadKind::Fs);
    let image = story.image();
    let mut vmrun =
        story.vmrun(&["run", "--rm", "--name", "open", "--network", "none", "-i", &image, "sh", "-c", "echo on; cat"]);
    let mut vmrun =
        vmrun.env("VMRUN_VMM", vmm).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("vmrun starts");
    let mut line = String::new();
    BufReader::new(vmrun.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    assert_eq!(vmm_of(&story, "open").filtered(), all_but(Some(ThreadKind::Fs), &OF_A_POD));
    drop(vmrun.stdin.take());
    assert_eq!(vmrun.wait().expect("wait").code(), Some(0));
}

/// The VMM of a container of `vmrun`.
fn vmm_of(story: &Story, name: &str) -> Seen {
    let pid = story.inspect(name)["State"]["Pid"].as_u64().expect("it runs");
    Seen::of(u32::try_from(pid).expect("a process id"))
}

/// strace(1) at all threads of a process, also at those that come later.
struct Strace {
    strace: Child,
    dir: TempDir,
}

impl Strace {
    /// Attaches it; returns when it watches.
    fn attach(seen: &Seen) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let pid = seen.0.file_name().expect("a process id").to_string_lossy().into_owned();
        let mut command = Command::new("strace");
        // A file for each thread, which ends with its id.
        command.args(["-ff", "-s", "0", "-e", "signal=none", "-p", &pid, "-o"]).arg(dir.path().join("thread"));
        let mut strace = command.stderr(Stdio::piped()).spawn().expect("strace is installed");
        let mut line = String::new();
        BufReader::new(strace.stderr.as_mut().expect("piped")).read_line(&mut line).expect("a line");
        assert!(line.contains("attached"), "{line}");
        Self { strace, dir }
    }

    /// Lets go; the names of the calls of each thread by its id.
    fn end(mut self) -> BTreeMap<String, BTreeSet<String>> {
        rustix::process::kill_process(Pid::from_child(&self.strace), Signal::INT).expect("it runs");
        self.strace.wait().expect("wait");
        let files = fs::read_dir(self.dir.path()).expect("a folder").map(|file| file.expect("a file").path());
        let thread = |file: &Path| file.extension().expect("the id of a thread").to_string_lossy().into_owned();
        files.map(|file| (thread(&file), call_names(&fs::read_to_string(&file).expect("text")))).collect()
    }
}

/// `futex(0x7f..., FUTEX_WAIT, ...) = 0` is a call; other lines tell of its end.
fn call_names(trace: &str) -> BTreeSet<String> {
    let names = trace.lines().filter_map(|line| Some(line.split_once('(')?.0));
    names.filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')).map(str::to_owned).collect()
}

/// The names of the calls that a kind of thread may make, whatever their arguments.
fn listed(kind: ThreadKind) -> BTreeSet<String> {
    let heading = format!("{kind:?}:");
    let lines =
        include_str!("../../vmm/system-calls.txt").lines().skip_while(|line| !line.starts_with(&heading)).skip(1);
    let calls = lines.map_while(|line| line.strip_prefix("  "));
    calls.map(|line| line.split(' ').next().expect("a name").to_owned()).collect()
}

#[test]
fn a_running_vm_makes_no_system_call_that_is_not_listed() {
    let story = Story::new();
    let lan = Lan::enter();
    let outside = lan.outside();
    let listener = outside.inside(|| TcpListener::bind("192.0.2.1:80")).expect("bound");
    let mut python = Python::start(&story, &["--name", "traced", "--network", "user", "-v", &story.volume_at_mnt()]);
    let vmm = vmm_of(&story, "traced");
    let expected = [&OF_A_POD[..], &[ThreadKind::Net]].concat();
    assert_eq!(vmm.filtered(), all_but(None, &expected));
    let kinds = vmm.kinds().expect("known kinds");

    let strace = Strace::attach(&vmm);
    let files = "os.chdir('/mnt'); open('a', 'w').write('x'); os.rename('a', 'b'); os.mkdir('d'); os.symlink('b', 'd/l'); \
        os.chmod('b', 0o600); os.truncate('b', 9); os.listdir('d'); os.unlink('b')";
    assert_eq!(python.exec(files), "None");
    assert_eq!(python.exec("import socket; s = socket.create_connection(('192.0.2.1', 80), 60)"), "None");
    let (mut connection, _) = listener.accept().expect("the guest connects");
    assert_eq!(python.exec("s.sendall(b'x' * 100_000); s.shutdown(socket.SHUT_WR)"), "None");
    assert_eq!(connection.read_to_end(&mut Vec::new()).expect("its end"), 100_000);
    assert_eq!(story.call(&["exec", "traced", "echo", "on"]).success(), "on\n");
    let traced = strace.end();

    for (thread, calls) in &traced {
        // What has come since was started by the thread `devices`, whose list has all that others of its threads may do.
        let kind = kinds.get(thread).map_or(ThreadKind::Devices, |(kind, _)| *kind);
        let listed = listed(kind);
        let unlisted: Vec<_> = calls.difference(&listed).collect();
        assert!(unlisted.is_empty(), "{kind:?}: {unlisted:?}");
    }
    let seen = |kind, call: &str| {
        traced.iter().any(|(thread, calls)| kinds.get(thread).is_some_and(|of| of.0 == kind) && calls.contains(call))
    };
    assert!(seen(ThreadKind::Vcpu, "ioctl") && seen(ThreadKind::EventLoop, "epoll_wait"), "{traced:?}");
    assert!(seen(ThreadKind::Fs, "renameat2") && seen(ThreadKind::Net, "epoll_wait"), "{traced:?}");
    assert_eq!(python.end(), 0);
}
