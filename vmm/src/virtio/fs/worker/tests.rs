//! FUSE requests as a guest's kernel sends them, or a hostile one.

mod race;

use std::fs::{self, File};

use proptest::prelude::*;
use tempfile::TempDir;
use virtiofsd::passthrough::{self, PassthroughFs};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_api::CachePolicy;

use super::*;
use crate::jail::Jail;
use crate::virtio::VirtioDevice as _;
use crate::virtio::driver::DriverQueue;
use crate::virtio::fs::{ALWAYS_TIMEOUT, Fs, FsError, Rules};

const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x20_0000;
const REPLY_LEN: u32 = 64 << 10;
const ROOT: u64 = 1;
const FUSE_LOOKUP: u32 = 1;
const FUSE_SETATTR: u32 = 4;
const FUSE_SYMLINK: u32 = 6;
const FUSE_MKNOD: u32 = 8;
const FUSE_MKDIR: u32 = 9;
const FUSE_UNLINK: u32 = 10;
const FUSE_RMDIR: u32 = 11;
const FUSE_RENAME: u32 = 12;
const FUSE_LINK: u32 = 13;
const FUSE_OPEN: u32 = 14;
const FUSE_READ: u32 = 15;
const FUSE_WRITE: u32 = 16;
const FUSE_SETXATTR: u32 = 21;
const FUSE_REMOVEXATTR: u32 = 24;
const FUSE_INIT: u32 = 26;
const FUSE_SUBMOUNTS: u32 = 1 << 27;
const FUSE_OPENDIR: u32 = 27;
const FUSE_READDIR: u32 = 28;
const FUSE_CREATE: u32 = 35;
const FUSE_FALLOCATE: u32 = 43;
const FUSE_READDIRPLUS: u32 = 44;
const FUSE_RENAME2: u32 = 45;
const FUSE_COPY_FILE_RANGE: u32 = 47;

/// A directory `dir/share` behind a worker; `dir` is what a guest must not reach.
struct Share {
    dir: TempDir,
    memory: Arc<GuestMemory>,
    driver: DriverQueue,
    serving: Serving,
}

impl Share {
    fn new() -> Self {
        Self::with(Rules { cache: CachePolicy::Always, read_only: false })
    }

    fn with(rules: Rules) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(dir.path().join("share")).expect("a folder");
        fs::write(dir.path().join("outside"), "kept").expect("a file");
        fs::write(dir.path().join("share/file"), "data").expect("a file");
        let root_dir = dir.path().join("share").display().to_string();
        let fs =
            PassthroughFs::new(passthrough::Config { root_dir, xattr: true, ..Default::default() }).expect("a share");
        fs.open_root_node().expect("its root");
        let memory = crate::memory::create(64).expect("memory");
        let driver = DriverQueue::new(&memory, 0x1_0000, 16);
        let server = Arc::new(Server::new(CheckedFs::new(fs, rules)));
        let stopping = Arc::new(AtomicBool::new(false));
        let spare = SpareRoom::create().expect("a page");
        let views = Arc::new(Views::of(memory.clone()).expect("two views"));
        let serving = Serving { queue: driver.activate(), memory: views, server, spare, stopping };
        let mut share = Self { dir, memory, driver, serving };
        let words = [7, 38, 0, FUSE_SUBMOUNTS].map(u32::to_le_bytes);
        let init = [words.as_flattened(), &[0; 48]].concat();
        assert_eq!(share.ask(FUSE_INIT, &init).expect("an answer").0, 0);
        share
    }

    fn write_request(&self, header_len: u32, opcode: u32, node: u64, body: &[u8]) -> u32 {
        let mut request = header_len.to_le_bytes().to_vec();
        request.extend(opcode.to_le_bytes());
        request.extend(7_u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(body);
        self.memory.write_slice(&request, GuestAddress(REQUEST)).expect("in RAM");
        u32::try_from(request.len()).expect("short")
    }

    /// The error (0 for none) and the rest of the reply, if there is one.
    fn ask(&mut self, opcode: u32, body: &[u8]) -> Option<(i32, Vec<u8>)> {
        self.ask_of(ROOT, opcode, body)
    }

    fn ask_of(&mut self, node: u64, opcode: u32, body: &[u8]) -> Option<(i32, Vec<u8>)> {
        let len = 40 + u32::try_from(body.len()).expect("short");
        self.write_request(len, opcode, node, body);
        self.driver.put(&[(REQUEST, len, false), (REPLY, REPLY_LEN, true)]);
        self.serve();
        let (_, written) = self.driver.take_used().expect("given back");
        let mut reply = vec![0; written as usize];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).expect("in RAM");
        let error = reply.get(4..8)?.try_into().ok()?;
        Some((i32::from_le_bytes(error), reply.split_off(16)))
    }

    fn serve(&mut self) {
        // A ring that is refused is an outcome like others.
        let _ = self.serving.serve_all();
    }

    /// The error of a request whose body ends with these names.
    fn error_of(&mut self, opcode: u32, fixed: &[u8], names: &[&str]) -> i32 {
        let mut body = fixed.to_vec();
        for name in names {
            body.extend(name.as_bytes());
            body.push(0);
        }
        self.ask(opcode, &body).expect("an answer").0
    }
}

/// Numbers of Linux (`include/uapi/linux/fuse.h`).
#[test]
fn what_a_share_does_not_need_is_refused_by_its_number() {
    const LOCKS: [u32; 3] = [31, 32, 33];
    const BMAP: u32 = 37;
    const IOCTL: u32 = 39;
    const POLL: u32 = 40;
    const NOTIFY_REPLY: u32 = 41;
    const MAPPINGS: [u32; 2] = [48, 49];
    const TMPFILE: u32 = 51;
    let mut refused = [&LOCKS[..], &[BMAP, IOCTL, POLL, NOTIFY_REPLY], &MAPPINGS, &[TMPFILE]].concat();
    // No later kernel's either.
    refused.extend((52..64).chain([4096, u32::MAX]));
    for opcode in refused {
        let mut share = Share::new();
        assert_eq!(share.ask(opcode, &[0; 128]).expect("an answer").0, -libc::ENOSYS, "{opcode}");
    }
}

#[test]
fn a_name_that_leads_out_of_the_share_is_refused_by_every_request_that_has_one() {
    let mut share = Share::new();
    let outside = share.dir.path().join("outside").display().to_string();
    for name in ["../outside", "..", ".", "", outside.as_str(), "file/../../outside"] {
        let refused = [
            share.error_of(FUSE_LOOKUP, &[], &[name]),
            share.error_of(FUSE_SYMLINK, &[], &[name, "target"]),
            share.error_of(FUSE_MKNOD, &[0; 16], &[name]),
            share.error_of(FUSE_MKDIR, &[0; 8], &[name]),
            share.error_of(FUSE_UNLINK, &[], &[name]),
            share.error_of(FUSE_RENAME, &ROOT.to_le_bytes(), &["file", name]),
            share.error_of(FUSE_RENAME, &ROOT.to_le_bytes(), &[name, "file"]),
            share.error_of(FUSE_LINK, &ROOT.to_le_bytes(), &[name]),
            share.error_of(FUSE_CREATE, &[0; 16], &[name]),
        ];
        assert_eq!(refused, [-libc::EINVAL; 9], "{name:?}");
    }
    assert_eq!(fs::read_to_string(share.dir.path().join("outside")).expect("a file"), "kept");
    assert_eq!(fs::read_dir(share.dir.path().join("share")).expect("a folder").count(), 1);
}

#[test]
fn a_missing_name_may_be_remembered() {
    let mut share = Share::new();
    let (error, entry) = share.ask(FUSE_LOOKUP, b"missing\0").expect("an answer");
    // fuse_entry_out: node, generation, and for how many seconds the name is valid.
    assert_eq!((error, &entry[..8], &entry[16..24]), (0, &[0; 8][..], &ALWAYS_TIMEOUT.as_secs().to_le_bytes()[..]));
    let (_, entry) = share.ask(FUSE_LOOKUP, b"file\0").expect("an answer");
    assert_ne!(&entry[..8], &[0; 8]);
}

#[test]
fn a_device_node_is_not_made() {
    let mut share = Share::new();
    let fixed = [&(libc::S_IFBLK | 0o666).to_le_bytes()[..], &0x800_u32.to_le_bytes(), &[0; 8]].concat();
    assert_eq!(share.error_of(FUSE_MKNOD, &fixed, &["disk"]), -libc::EPERM);
}

#[test]
fn a_read_only_share_refuses_whatever_writes_although_its_mount_does_not() {
    let mut share = Share::with(Rules { cache: CachePolicy::InUse, read_only: true });
    let root = ROOT.to_le_bytes();
    let rename2 = [&root[..], &[0; 8]].concat();
    let refused = [
        share.error_of(FUSE_SETATTR, &[0; 88], &[]),
        share.error_of(FUSE_SYMLINK, &[], &["new", "target"]),
        share.error_of(FUSE_MKNOD, &[0; 16], &["new"]),
        share.error_of(FUSE_MKDIR, &[0; 8], &["new"]),
        share.error_of(FUSE_UNLINK, &[], &["file"]),
        share.error_of(FUSE_RMDIR, &[], &["file"]),
        share.error_of(FUSE_RENAME, &root, &["file", "new"]),
        share.error_of(FUSE_RENAME2, &rename2, &["file", "new"]),
        share.error_of(FUSE_LINK, &root, &["new"]),
        share.error_of(FUSE_CREATE, &[0; 16], &["new"]),
        share.error_of(FUSE_WRITE, &[0; 40], &[]),
        // A value of two bytes.
        share.error_of(FUSE_SETXATTR, &[2, 0, 0, 0, 0, 0, 0, 0], &["user.a", "v"]),
        share.error_of(FUSE_REMOVEXATTR, &[], &["user.a"]),
        share.error_of(FUSE_FALLOCATE, &[0; 32], &[]),
        share.error_of(FUSE_COPY_FILE_RANGE, &[0; 56], &[]),
    ];
    assert_eq!(refused, [-libc::EROFS; 15]);
    assert_eq!(share.error_of(FUSE_LOOKUP, &[], &["file"]), 0);
    assert_eq!(fs::read_to_string(share.dir.path().join("share/file")).expect("a file"), "data");
    assert_eq!(fs::read_dir(share.dir.path().join("share")).expect("a folder").count(), 1);
}

#[test]
fn a_read_only_share_opens_for_reading_only() {
    let mut share = Share::with(Rules { cache: CachePolicy::InUse, read_only: true });
    let with = |flags: i32| [flags.to_le_bytes(), [0; 4]].concat();
    let writes = [libc::O_WRONLY, libc::O_RDWR, libc::O_ACCMODE, libc::O_TRUNC, libc::O_CREAT, libc::O_TMPFILE];
    for flags in writes {
        let refused = [FUSE_OPEN, FUSE_OPENDIR].map(|opcode| share.error_of(opcode, &with(flags), &[]));
        assert_eq!(refused, [-libc::EROFS; 2], "{flags:o}");
    }
    assert_eq!(share.error_of(FUSE_OPENDIR, &with(libc::O_RDONLY | libc::O_DIRECTORY), &[]), 0);
}

#[test]
fn only_a_file_that_was_written_to_is_flushed_when_it_is_closed() {
    const FOPEN_NOFLUSH: u32 = 1 << 5;
    let mut share = Share::new();
    let (_, entry) = share.ask(FUSE_LOOKUP, b"file\0").expect("an answer");
    let node = u64::from_le_bytes(entry[..8].try_into().expect("a node"));
    for (flags, flushed) in [(libc::O_RDONLY, false), (libc::O_WRONLY, true), (libc::O_RDWR, true)] {
        let (_, opened) = share.ask_of(node, FUSE_OPEN, &[flags.to_le_bytes(), [0; 4]].concat()).expect("an answer");
        let options = u32::from_le_bytes(opened[8..12].try_into().expect("options"));
        assert_eq!(options & FOPEN_NOFLUSH == 0, flushed, "{flags:o}");
    }
}

#[test]
fn a_request_without_room_for_an_answer_is_given_back() {
    let mut share = Share::new();
    share.write_request(48, FUSE_LOOKUP, ROOT, b"missing\0");
    share.driver.put(&[(REQUEST, 48, false)]);
    share.driver.put(&[(REQUEST, 48, false), (REPLY, 15, true)]);
    share.driver.put(&[(REQUEST, 20, false), (REPLY, 4096, true)]);
    share.serve();
    let lens: Vec<_> = std::iter::from_fn(|| share.driver.take_used()).map(|(_, len)| len).collect();
    assert_eq!(lens, [0, 0, 0]);
}

#[test]
fn a_request_without_room_for_an_answer_is_served_all_the_same() {
    let mut share = Share::new();
    let made = b"\xed\x01\0\0\0\0\0\0made\0";
    for (opcode, body) in
        [(FUSE_READ, &[0; 40][..]), (FUSE_READDIR, &[0; 40]), (FUSE_READDIRPLUS, &[0; 40]), (FUSE_MKDIR, made)]
    {
        let len = 40 + u32::try_from(body.len()).expect("short");
        share.write_request(len, opcode, ROOT, body);
        for room in [0, 1, 15] {
            share.driver.put(&[(REQUEST, len, false), (REPLY, room, true)]);
            share.serve();
            assert_eq!(share.driver.take_used().map(|(_, written)| written), Some(0), "{opcode} {room}");
        }
    }
    assert!(share.dir.path().join("share/made").is_dir());
}

#[test]
fn a_ring_that_promises_requests_and_has_none_is_left() {
    let mut share = Share::new();
    share.driver.claim(0x4000);
    share.serve();
}

#[test]
fn a_worker_that_is_dropped_ends() {
    let Share { driver, serving, .. } = Share::new();
    let device_thread = DeviceThread::start(Jail::default()).expect("a thread");
    let queues = vec![driver.activate()];
    let worker = Worker::spawn(1, queues, &serving.memory, &serving.server, &device_thread).expect("a worker");
    drop(worker);
}

#[test]
fn a_directory_that_is_not_there_is_refused() {
    let file = tempfile::tempfile().expect("a temporary file");
    let long = Fs::open(&"t".repeat(37), file.into(), Rules::default(), 1);
    assert!(matches!(long, Err(FsError::Tag)));
    let dir = tempfile::tempdir().expect("a temporary folder");
    let below = File::open(dir.path()).expect("a folder");
    let below = Fs::open("tag", below.into(), Rules::default(), 1);
    assert!(matches!(below, Err(FsError::Parent)));
}

#[test]
fn queues_share_a_vector_unless_there_are_several_for_requests() {
    let counts = |request_queues| {
        let root = File::open("/").expect("a folder");
        let fs = Fs::open("tag", root.into(), Rules::default(), request_queues).expect("a share");
        (fs.queue_sizes().len(), fs.vectors())
    };
    assert_eq!([counts(1), counts(2), counts(200)], [(2, 2), (3, 4), (5, 6)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_request_panics(
        requests in prop::collection::vec(
            (0_u32..60, 0_u64..4, prop::collection::vec(any::<u8>(), 0..128), any::<Option<u32>>(), 0_u32..300),
            1..8,
        ),
    ) {
        let mut share = Share::new();
        for (opcode, node, body, claimed_len, reply_len) in requests {
            let true_len = 40 + u32::try_from(body.len()).expect("short");
            share.write_request(claimed_len.unwrap_or(true_len), opcode, node, &body);
            share.driver.put(&[(REQUEST, true_len, false), (REPLY, reply_len, true)]);
            share.serve();
            share.driver.take_used();
        }
        prop_assert_eq!(fs::read_to_string(share.dir.path().join("outside")).expect("a file"), "kept");
    }
}
