//! Escape rehearsal: a VMM that a guest has taken over tries to reach the host, as each kind of its threads. What it does reach is what
//! `vmm/README.md` lists, and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Stdio;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use sandbox::share::{Rootfs, rootfs_tree};
use tests::Story;
use tests::escape::{Became, Tried};
use tests::guest::{BUSY, config, kernel, program};
use tests::scorecard::told;
use vmm::jail::ThreadKind;
use vmm_api::{CachePolicy, Fd, ShareConfig};

/// What succeeds, and for whom. Each line is also in `vmm/README.md`, Confinement.
const REACHED: [(&str, &[&str]); 5] = [
    ("act as another user of the share", &["Devices", "Fs"]),
    ("make a pair of sockets", &["EventLoop"]),
    ("read a file of a share", &["Devices", "Fs"]),
    ("say something to the owner", &["Devices", "EventLoop", "Fs", "Net", "Vcpu", "VsockFinish"]),
    ("write to a share", &["Devices", "Fs"]),
];
/// Linux lets these past every filter (6.11 and newer); who makes them without a probe of the kernel's is ended by a signal.
const UNFILTERED: [&str; 2] = ["uprobe", "uretprobe"];

/// Runs the VMM that was taken over; returns what it tried.
fn rehearse(story: &Story) -> Vec<Tried> {
    let [share, read_only] = ["share", "read-only"].map(|name| {
        let dir = story.scratch().join(name);
        fs::create_dir(&dir).expect("a folder");
        fs::write(dir.join("file"), "content").expect("a file");
        dir
    });
    symlink("/etc/passwd", share.join("link")).expect("a link");
    fs::copy("/bin/true", share.join("program")).expect("a program");
    fs::set_permissions(share.join("program"), fs::Permissions::from_mode(0o755)).expect("a mode");
    let scratch = story.scratch().join("scratch");
    fs::create_dir(&scratch).expect("a folder");
    let tree = |path: &Path, read_only| {
        let path = path.to_owned();
        rootfs_tree(Rootfs::Directory { path, read_only }, &scratch).expect("a tree")
    };
    let passed = vec![kernel(&BUSY), tree(&share, false), tree(&read_only, true)];
    let mut config = config(Fd(3));
    config.control = Fd(3);
    let share = |tag: &str, root| ShareConfig {
        tag: tag.to_owned(),
        root: Fd(root),
        cache: CachePolicy::Auto,
        read_only: false,
    };
    config.shares = vec![share("share", 4), share("read-only", 5)];

    let socket = story.scratch().join("other.sock");
    let _listens = UnixDatagram::bind(&socket).expect("a socket");
    let abstract_name = format!("vmrun-escape-{}", std::process::id());
    let listens = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).expect("a socket");
    bind(&listens, &SocketAddrUnix::new_abstract_name(abstract_name.as_bytes()).expect("a name")).expect("bound");

    let mut command = program(env!("CARGO_BIN_EXE_escape").as_ref(), &config, passed);
    command.arg(std::process::id().to_string()).arg(&socket).arg(&abstract_name).env_clear();
    let output = command.stdin(Stdio::null()).output().expect("it runs");
    assert!(output.status.success(), "{:?}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// Numbers of system calls are not names of attempts.
fn is_number(tried: &Tried) -> bool {
    tried.attempt.parse::<i64>().is_ok()
}

#[test]
fn a_vmm_that_was_taken_over_reaches_what_is_documented_and_no_more() {
    let story = Story::new();
    let tried = rehearse(&story);
    let (numbers, attempts): (Vec<_>, Vec<_>) = tried.iter().partition(|tried| is_number(tried));
    let names: BTreeSet<&str> = attempts.iter().map(|tried| tried.attempt.as_str()).collect();
    let calls: BTreeSet<&str> = numbers.iter().map(|tried| tried.attempt.as_str()).collect();
    const ROW: &str = "escape rehearsal";
    assert_eq!((names.len(), calls.len()), (told(ROW, "ways out"), told(ROW, "system calls")));
    assert_eq!(ThreadKind::ALL.len(), told(ROW, "kinds of threads"));
    assert_eq!(tried.len(), (names.len() + calls.len()) * ThreadKind::ALL.len());

    let mut reached = BTreeMap::<&str, BTreeSet<&str>>::new();
    for tried in attempts.iter().filter(|tried| tried.became == Became::Done) {
        reached.entry(&tried.attempt).or_default().insert(&tried.thread);
    }
    println!("{} attempts by each of {} kinds of threads; these succeed:", names.len(), ThreadKind::ALL.len());
    reached.iter().for_each(|(attempt, threads)| println!("  {attempt}: {threads:?}"));
    let documented = REACHED.map(|(attempt, threads)| (attempt, threads.iter().copied().collect()));
    assert_eq!(reached, BTreeMap::from(documented));
    let readme = include_str!("../../vmm/README.md");
    assert!(reached.keys().all(|attempt| readme.contains(attempt)), "vmm/README.md lists what is reached");

    // The lists that are to be read are the lists that hold. A call that depends on its arguments ends the process here.
    let snapshot = include_str!("../../vmm/system-calls.txt");
    for kind in ThreadKind::ALL {
        let thread = format!("{kind:?}");
        let here = numbers.iter().filter(|tried| tried.thread == thread && tried.became != Became::Ended);
        let open = here.map(|tried| name_of(&tried.attempt)).filter(|name| !UNFILTERED.contains(&name.as_str()));
        let open: BTreeSet<String> = open.collect();
        assert_eq!(open, listed(snapshot, &thread), "{thread}");
    }
}

/// The name of a system call by its number.
fn name_of(number: &str) -> String {
    let number: usize = number.parse().expect("a number");
    syscalls::Sysno::new(number).map_or_else(|| format!("number {number}"), |call| call.name().to_owned())
}

/// The calls that never end the process; lines with a condition have more than a word, and what is answered by ENOSYS says so.
fn listed(snapshot: &str, thread: &str) -> BTreeSet<String> {
    let mut lines = snapshot.lines().skip_while(|line| line.split(':').next() != Some(thread));
    assert!(lines.next().is_some(), "{thread} is in the list");
    let calls = lines.take_while(|line| line.starts_with("  ")).map(|line| line.trim().trim_end_matches(" ENOSYS"));
    calls.filter(|call| !call.contains(' ')).map(str::to_owned).collect()
}
