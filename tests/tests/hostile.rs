//! A guest that attacks every device from ring 0 (`tests/hostile`), and what is left of its VMM and of the host.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use sandbox::network::tap;
use sandbox::share::{Rootfs, rootfs_tree};
use tests::Story;
use tests::guest::{self, config};
use tests::lan::{Lan, ip};
use tests::scorecard::told;
use vmm_api::control::{Message, Reply, Request, State};
use vmm_api::net::{Backend, MacAddress, NetConfig, NetDevice, RateLimit};
use vmm_api::{CachePolicy, Fd, HostPort, ShareConfig, VmConfig, VsockConfig};

/// No case takes longer.
const CASE_DEADLINE: Duration = Duration::from_secs(60);
/// The VMM's own memory beside the guest's RAM, at its peak.
const MOST_OWN_MEMORY_KIB: u64 = 48 << 10;
const RAM_MIB: u32 = 128;
/// What the guest has as its root image, as long as it takes it to be.
static ROOT_IMAGE: [u8; 2 << 20] = [0x5a; 2 << 20];

/// The VMM with the guest, and what it talks to.
struct Hostile {
    vmm: Child,
    control: BufReader<UnixStream>,
    console: mpsc::Receiver<String>,
}

fn interface(backend: Backend) -> NetDevice {
    NetDevice {
        name: "eth0".to_owned(),
        mac: MacAddress([2, 0, 0, 0, 0, 1]),
        mtu: 1500,
        backend,
        rx_limit: RateLimit::default(),
        tx_limit: RateLimit::default(),
        only_from: None,
    }
}

fn describe() -> VmConfig {
    let device = interface(Backend::Stream);
    VmConfig {
        memory_mib: RAM_MIB,
        control: Fd(3),
        console: Some(Fd(5)),
        shares: vec![ShareConfig { tag: "share".to_owned(), root: Fd(6), cache: CachePolicy::Never, read_only: false }],
        entropy: true,
        vsock: Some(VsockConfig { guest_cid: 3, host_ports: vec![HostPort { port: 1024, socket: Fd(7) }] }),
        networks: vec![NetConfig { device, fds: vec![Fd(8)] }],
        root_image: Some(Fd(9)),
        ..config(Fd(4))
    }
}

fn guest_file() -> OwnedFd {
    let guest = std::env::var_os("HOSTILE_GUEST").expect("HOSTILE_GUEST names the guest: use `make test`");
    File::open(guest).expect("the guest is built").into()
}

impl Hostile {
    fn start(share: OwnedFd, root_image: OwnedFd) -> Self {
        let (control, theirs) = UnixStream::pair().expect("a socket pair");
        let (console, console_end) = std::io::pipe().expect("a pipe");
        let (port, port_end) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket pair");
        let (net, net_end) = UnixStream::pair().expect("a socket pair");
        // In the order of the numbers in the configuration, 3 and up.
        let passed = vec![theirs.into(), guest_file(), console_end.into(), share, port_end, net_end.into(), root_image];
        let vmm = guest::vmm(&describe(), passed).spawn().expect("the VMM starts");
        thread::spawn(move || accept(&port));
        thread::spawn(move || std::io::copy(&mut &net, &mut std::io::sink()));
        Self { vmm, control: BufReader::new(control), console: lines(console) }
    }

    /// With a network interface alone: a TAP interface, and what carries its frames where the VMM does not.
    fn start_with_tap(backend: Backend, vhost: Option<OwnedFd>) -> Self {
        let (control, theirs) = UnixStream::pair().expect("a socket pair");
        let (console, console_end) = std::io::pipe().expect("a pipe");
        let (name, mut fds) = tap::create(1).expect("a TAP interface");
        ip(&format!("link set {name} up"));
        fds.extend(vhost);
        let network = NetConfig { device: interface(backend), fds: (6..).map(Fd).take(fds.len()).collect() };
        let described = VmConfig { control: Fd(3), console: Some(Fd(5)), networks: vec![network], ..config(Fd(4)) };
        let passed = [vec![theirs.into(), guest_file(), console_end.into()], fds].into_iter().flatten().collect();
        let vmm = guest::vmm(&described, passed).spawn().expect("the VMM starts");
        Self { vmm, control: BufReader::new(control), console: lines(console) }
    }

    /// Lets the guest attack while its link goes down and comes back, and looks at the VMM. Returns the cases that failed; `cases` is
    /// what SECURITY.md calls all of them.
    fn attacked_without_a_link(mut self, cases: &str) -> Vec<String> {
        let first = self.verdict("nothing");
        let descriptors_before = self.descriptor_count();
        for up in [false, true] {
            let link = Request::SetLink { name: "eth0".to_owned(), up };
            assert_eq!(self.ask(&link), Message::Reply(Reply::Done));
        }
        let mut verdicts = self.verdicts(first);
        // The last line is the end.
        assert_eq!(verdicts.len() - 1, told("hostile guest", cases));
        let descriptors = self.descriptor_count();
        assert!(descriptors <= descriptors_before + 8, "{descriptors_before} descriptors became {descriptors}");
        assert_eq!(self.ask(&Request::Shutdown), Message::Reply(Reply::Done));
        assert!(matches!(self.next(), Message::Exited(_)));
        assert!(self.vmm.wait().expect("waited").code().is_some());
        verdicts.retain(|line| line.starts_with("FAILED"));
        verdicts
    }

    /// The next line of the console.
    fn verdict(&mut self, last: &str) -> String {
        match self.console.recv_timeout(CASE_DEADLINE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("the guest is stuck after {last:?}"),
            Err(RecvTimeoutError::Disconnected) => panic!("the VM ended after {last:?}: {:?}", self.next()),
        }
    }

    /// The lines of the console behind `first`, until the guest says that it is done.
    fn verdicts(&mut self, first: String) -> Vec<String> {
        let mut verdicts = vec![first];
        while let Some(last) = verdicts.last().filter(|line| !line.starts_with("end: ")) {
            verdicts.push(self.verdict(last));
        }
        verdicts
    }

    fn ask(&mut self, request: &Request) -> Message {
        let line = serde_json::to_string(request).expect("JSON");
        writeln!(self.control.get_mut(), "{line}").expect("the VMM reads");
        self.next()
    }

    fn next(&mut self) -> Message {
        let mut line = String::new();
        self.control.read_line(&mut line).expect("a line");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// A line of /proc/PID/status, in KiB.
    fn memory_kib(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.vmm.id())).expect("the VMM runs");
        let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("the field");
        line.trim_matches([':', '\t', ' ']).trim_end_matches(" kB").trim().parse().expect("a number")
    }

    fn descriptor_count(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.vmm.id())).expect("the VMM runs").count()
    }
}

/// Takes the connections of the guest and keeps them, as a host that never reads does.
fn accept(port: &OwnedFd) {
    let mut kept = Vec::new();
    let mut payload = [0; 16];
    while let Ok((1.., fds)) = vmm_api::fds::recv(port.as_fd(), &mut payload) {
        kept.extend(fds);
        // What the guest has reset is closed on the VMM's side; a thousand are enough to know.
        if kept.len() > 1500 {
            kept.drain(..500);
        }
    }
}

fn lines(console: std::io::PipeReader) -> mpsc::Receiver<String> {
    let (told, heard) = mpsc::channel();
    thread::spawn(move || {
        let lines = BufReader::new(console).lines().map_while(Result::ok);
        lines.map(|line| told.send(line.trim_end().to_owned())).all(|sent| sent.is_ok())
    });
    heard
}

#[test]
fn no_case_of_the_hostile_guest_harms_the_vmm_or_the_host() {
    let story = Story::new();
    let outside = story.scratch().join("outside");
    fs::write(&outside, "untouched").expect("a file beside the share");
    let directory = Rootfs::Directory { path: story.volume(), read_only: false };
    let share = rootfs_tree(directory, &story.volume()).expect("the volume is shared");
    let root_image = story.scratch().join("root-image");
    fs::write(&root_image, &ROOT_IMAGE[..]).expect("an image");
    let mut hostile = Hostile::start(share, File::open(&root_image).expect("the image").into());

    let first = hostile.verdict("nothing");
    assert_eq!(hostile.ask(&Request::ReportFreePages), Message::Reply(Reply::Done));
    let descriptors_before = hostile.descriptor_count();
    let verdicts = hostile.verdicts(first);
    let failed: Vec<_> = verdicts.iter().filter(|line| line.starts_with("FAILED")).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let cases: BTreeSet<_> = verdicts.iter().filter_map(|line| line.strip_prefix("ok ")).collect();
    assert_eq!(cases.len(), told("hostile guest", "cases from ring 0"));
    assert_eq!(verdicts.last(), Some(&format!("end: {} cases, 0 failed", cases.len())));
    println!("{} cases", cases.len());

    assert_eq!(hostile.ask(&Request::State), Message::Reply(Reply::State(State::Running)));
    let own = hostile.memory_kib("VmHWM").saturating_sub(hostile.memory_kib("RssShmem"));
    assert!(own <= MOST_OWN_MEMORY_KIB, "the VMM used {own} KiB beside the guest's RAM");
    let descriptors = hostile.descriptor_count();
    assert!(descriptors <= descriptors_before + 32, "{descriptors_before} descriptors became {descriptors}");
    assert_eq!(hostile.ask(&Request::Shutdown), Message::Reply(Reply::Done));
    assert!(matches!(hostile.next(), Message::Exited(_)));
    assert!(hostile.vmm.wait().expect("waited").code().is_some());

    assert_eq!(fs::read_to_string(&outside).expect("still there"), "untouched");
    assert!(fs::read(&root_image).expect("still there")[..] == ROOT_IMAGE[..], "the root image was written");
    let mut left: Vec<_> =
        fs::read_dir(story.volume()).expect("the share").map(|entry| entry.expect("an entry").file_name()).collect();
    left.sort();
    assert_eq!(left, ["wrote"]);
    let mut rest = String::new();
    // The last message was the exit.
    assert_eq!(hostile.control.read_to_string(&mut rest).expect("the end"), 0, "{rest}");
}

#[test]
fn the_hostile_guest_does_not_harm_a_vmm_with_vhost_net() {
    let _lan = Lan::enter();
    let vhost = File::options().read(true).write(true).open("/dev/vhost-net").expect("the host has vhost-net");
    let hostile = Hostile::start_with_tap(Backend::Vhost, Some(vhost.into()));
    // vhost-net stops at them, until the next reset.
    let stopped = ["nothing", "half-a-header"].map(|case| format!("FAILED net/frame/{case}: a frame is kept for ever"));
    assert_eq!(hostile.attacked_without_a_link("cases with the host's vhost-net"), stopped);
}

#[test]
fn the_hostile_guest_does_not_harm_a_vmm_that_carries_the_frames_of_a_tap_interface() {
    let _lan = Lan::enter();
    let hostile = Hostile::start_with_tap(Backend::Tap, None);
    assert_eq!(hostile.attacked_without_a_link("cases with a TAP interface"), [""; 0]);
}
