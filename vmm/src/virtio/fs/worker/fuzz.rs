//! FUSE requests of a kernel without rules. The directory lies beside a file that must stay as it is.

use std::fs;

use arbitrary::Arbitrary;
use virtiofsd::passthrough::{self, PassthroughFs};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_api::CachePolicy;

use super::*;
use crate::virtio::driver::DriverQueue;
use crate::virtio::fs::Rules;
use crate::virtio::fuzz::{Move, memory, steps};

const REQUEST: u64 = 0x20_0000;
const REPLY: u64 = 0x30_0000;
const FUSE_INIT: u32 = 26;
/// The highest opcode is FUSE_STATX, 52.
const OPCODES: u8 = 54;
const NAMES: [&[u8]; 8] = [b"file", b"dir", b"link", b"new", b"..", b"dir/file", b"", b"../outside"];

#[derive(Arbitrary, Debug)]
enum Step {
    Request { opcode: u8, node: u8, caller: u8, body: Vec<Part>, reply_len: u16, wrong: Option<Wrong> },
    Ring(Move),
}

/// A piece of a request's body.
#[derive(Arbitrary, Debug)]
enum Part {
    Zeros(u8),
    /// An inode or a handle: they are small numbers.
    Small(u8),
    Word(u32),
    Long(u64),
    /// One of [`NAMES`], with its zero.
    Name(u8),
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Wrong {
    Len(u32),
    Opcode(u32),
    Node(u64),
}

/// Plays the steps that `data` spells. A request may ask for 2^63 bytes of disk: the process should have a limit of file sizes.
pub(crate) fn fuzz(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let share = dir.path().join("share");
    fs::create_dir_all(share.join("dir")).expect("a folder");
    fs::write(dir.path().join("outside"), "kept").expect("a file");
    fs::write(share.join("file"), "data").expect("a file");
    std::os::unix::fs::symlink("../outside", share.join("link")).expect("a link");

    let config = passthrough::Config { root_dir: share.display().to_string(), xattr: true, ..Default::default() };
    let passthrough = PassthroughFs::new(config).expect("a share");
    passthrough.open_root_node().expect("its root");
    let memory = memory();
    let mut driver = DriverQueue::fuzzed(&memory, 0);
    let server =
        Arc::new(Server::new(CheckedFs::new(passthrough, Rules { cache: CachePolicy::Always, read_only: false })));
    let queue = driver.activate_fuzzed(data.len().is_multiple_of(2));
    let spare = SpareRoom::create().expect("a page");
    let stopping = Arc::new(AtomicBool::new(false));
    let views = Arc::new(Views::of(memory.clone()).expect("two views"));
    let mut serving = Serving { queue, memory: views, server, spare, stopping };

    let init = Request {
        opcode: FUSE_INIT,
        node: 0,
        caller: 0,
        body: [7, 38, 0, 1 << 27].map(u32::to_le_bytes).as_flattened().to_vec(),
    };
    init.put(&mut driver, &memory, 4096, None);
    // A ring that is refused is an outcome like others.
    let _ = serving.serve_all();
    for step in steps(data) {
        match step {
            Step::Ring(step) => driver.make(&step, &memory),
            Step::Request { opcode, node, caller, body, reply_len, wrong } => {
                let body = body.iter().flat_map(Part::bytes).collect();
                let request = Request { opcode: (opcode % OPCODES).into(), node: node.into(), caller, body };
                request.put(&mut driver, &memory, reply_len, wrong);
            }
        }
        let _ = serving.serve_all();
    }
    assert_eq!(fs::read(dir.path().join("outside")).expect("it is there"), b"kept");
    assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 2);
}

struct Request {
    opcode: u32,
    node: u64,
    caller: u8,
    body: Vec<u8>,
}

impl Request {
    fn put(&self, driver: &mut DriverQueue, memory: &GuestMemory, reply_len: u16, wrong: Option<Wrong>) {
        let len = 40 + u32::try_from(self.body.len()).expect("short");
        let (mut told_len, mut opcode, mut node) = (len, self.opcode, self.node);
        match wrong {
            Some(Wrong::Len(other)) => told_len = other,
            Some(Wrong::Opcode(other)) => opcode = other,
            Some(Wrong::Node(other)) => node = other,
            None => {}
        }
        let mut bytes = [told_len.to_le_bytes(), opcode.to_le_bytes()].concat();
        bytes.extend(7_u64.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        let caller = u32::from(self.caller);
        bytes.extend([caller, caller, 1, 0].map(u32::to_le_bytes).as_flattened());
        bytes.extend(&self.body);
        // A request that reaches into the place of the answer is the guest's affair.
        let _ = memory.write_slice(&bytes, GuestAddress(REQUEST));
        driver.put(&[(REQUEST, len, false), (REPLY, reply_len.into(), true)]);
    }
}

impl Part {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Zeros(count) => vec![0; usize::from(*count)],
            Self::Small(number) => u64::from(*number).to_le_bytes().to_vec(),
            Self::Word(word) => word.to_le_bytes().to_vec(),
            Self::Long(long) => long.to_le_bytes().to_vec(),
            Self::Name(index) => [NAMES[usize::from(*index) % NAMES.len()], &[0]].concat(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}
