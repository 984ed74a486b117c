//! Directories and links that change places while names below them are looked up: by the host, and by the guest on a queue of its own
//! (CVE-2026-93834). Beside the share lies a folder that a link of the share leads to. And requests that change while they are read.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::*;

/// Even, so that in the end everything is where it was.
const SWAP_COUNT: u32 = 2_000;
const RENAME_EXCHANGE: u32 = 2;
const FUSE_FORGET: u32 = 2;
const FUSE_RELEASE: u32 = 18;

impl Share {
    /// Another queue of the same device, with memory of its own.
    fn another_queue(&self) -> Self {
        let memory = crate::memory::create(64).expect("memory");
        let driver = DriverQueue::new(&memory, 0x1_0000, 16);
        let (server, stopping) = (self.serving.server.clone(), self.serving.stopping.clone());
        let spare = SpareRoom::create().expect("a page");
        let views = Arc::new(Views::of(memory.clone()).expect("two views"));
        let serving = Serving { queue: driver.activate(), memory: views, server, spare, stopping };
        Self { dir: tempfile::tempdir().expect("a temporary folder"), memory, driver, serving }
    }

    /// The first number of an answer, if there is one and it says no error.
    fn number_of(&mut self, node: u64, opcode: u32, body: &[u8]) -> Option<u64> {
        let (error, reply) = self.ask_of(node, opcode, body).expect("an answer");
        let number = u64::from_le_bytes(reply.get(..8)?.try_into().ok()?);
        (error == 0).then_some(number)
    }

    fn look_up(&mut self, node: u64, name: &str) -> Option<u64> {
        // Node 0 says that there is none.
        self.number_of(node, FUSE_LOOKUP, format!("{name}\0").as_bytes()).filter(|node| *node != 0)
    }

    /// Makes and removes a folder in `place`, and reads `place/file`.
    fn work_below(&mut self, place: &str) -> Option<Vec<u8>> {
        let place = self.look_up(ROOT, place)?;
        if let Some(made) = self.number_of(place, FUSE_MKDIR, b"\xed\x01\0\0\0\0\0\0made\0") {
            self.ask_of(place, FUSE_RMDIR, b"made\0");
            // Or else it holds a descriptor. There is no answer.
            self.ask_of(made, FUSE_FORGET, &1_u64.to_le_bytes());
        }
        let file = self.look_up(place, "file")?;
        let handle = self.number_of(file, FUSE_OPEN, &[0; 8])?;
        // fuse_read_in: the handle, an offset of 0, and a size.
        let read = [&handle.to_le_bytes()[..], &[0; 8], &64_u32.to_le_bytes(), &[0; 20]].concat();
        let (error, content) = self.ask_of(file, FUSE_READ, &read).expect("an answer");
        self.ask_of(file, FUSE_RELEASE, &[&handle.to_le_bytes()[..], &[0; 16]].concat());
        (error == 0).then_some(content)
    }

    /// What a guest's renameat2(2) with `RENAME_EXCHANGE` asks for.
    fn swap(&mut self) {
        let fixed = [&ROOT.to_le_bytes()[..], &RENAME_EXCHANGE.to_le_bytes(), &[0; 4]].concat();
        assert_eq!(self.error_of(FUSE_RENAME2, &fixed, &["place", "link"]), 0);
    }
}

/// Changes of an opcode while requests are read.
const OPCODE_CHANGES: u32 = 200_000;

#[test]
fn an_opcode_that_changes_while_it_is_read_does_no_harm() {
    let mut share = Share::new();
    let memory = share.memory.clone();
    share.write_request(80, FUSE_FORGET, ROOT, &[0; 40]);
    let change = |turn: u32| {
        let opcode = if turn.is_multiple_of(2) { FUSE_READ } else { FUSE_FORGET };
        memory.write_obj(opcode, GuestAddress(REQUEST + 4)).expect("in RAM");
    };
    thread::scope(|scope| {
        let other_cpu = scope.spawn(|| (0..OPCODE_CHANGES).for_each(change));
        while !other_cpu.is_finished() {
            // A FORGET needs no room for an answer.
            share.driver.put(&[(REQUEST, 80, false)]);
            share.serve();
            assert_eq!(share.driver.take_used().map(|(_, written)| written), Some(0));
        }
    });
}

fn swap_on_the_host(share: &Path) {
    let [place, link] = ["place", "link"].map(|name| share.join(name));
    renameat_with(CWD, place, CWD, link, RenameFlags::EXCHANGE).expect("swapped");
}

#[test]
fn directories_that_change_places_with_links_lead_nobody_out_of_the_share() {
    let mut share = Share::new();
    let (outside, shared) = (share.dir.path().join("beside"), share.dir.path().join("share"));
    fs::create_dir(&outside).expect("a folder");
    fs::create_dir(shared.join("place")).expect("a folder");
    fs::write(outside.join("file"), "secret").expect("a file");
    fs::write(shared.join("place/file"), "data").expect("a file");
    symlink("../beside", shared.join("link")).expect("a link");
    // Also when what is made there is removed again.
    let changed = || fs::metadata(&outside).and_then(|folder| folder.modified()).expect("a time");
    let before = changed();

    let mut other_queue = share.another_queue();
    thread::scope(|scope| {
        let host = scope.spawn(|| (0..SWAP_COUNT).for_each(|_| swap_on_the_host(&shared)));
        let guest = scope.spawn(|| (0..SWAP_COUNT).for_each(|_| other_queue.swap()));
        while !host.is_finished() || !guest.is_finished() {
            let content = share.work_below("place");
            assert!(content.as_ref().is_none_or(|content| content == b"data"), "{content:?}");
        }
    });
    assert_eq!(share.work_below("place").as_deref(), Some(&b"data"[..]));
    assert_eq!(share.work_below("link"), None);
    assert_eq!(changed(), before);
}
