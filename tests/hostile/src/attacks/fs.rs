//! FUSE requests that no kernel would send (linux/fuse.h), raw.

use super::exchange::works;
use crate::machine::{read, write};
use crate::virtio::{Device, NEXT, Queue, WRITE};
use crate::{Report, Verdict};

/// Starts a session.
pub const FUSE_INIT: u32 = 26;
const FUSE_LOOKUP: u32 = 1;
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
const FUSE_GETXATTR: u32 = 22;
const FUSE_REMOVEXATTR: u32 = 24;
const FUSE_OPENDIR: u32 = 27;
const FUSE_READDIR: u32 = 28;
const FUSE_CREATE: u32 = 35;
const FUSE_IOCTL: u32 = 39;
const FUSE_FALLOCATE: u32 = 43;
const FUSE_RENAME2: u32 = 45;
const FUSE_COPY_FILE_RANGE: u32 = 47;

const ROOT: u64 = 1;
const HEADER_LEN: u32 = 40;
const OUT_HEADER_LEN: u32 = 16;
const REQUEST_QUEUE: u16 = 1;
/// Where the answer is, from the request's buffer.
const ANSWER_OFFSET: u64 = 0x8_0000;

/// An answer's header.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    len: u32,
    /// 0, or a negative errno.
    pub error: i32,
    used: u32,
}

/// `fuse_init_in` of protocol 7.38 that asks for submounts alone.
pub fn init_body() -> [u8; 64] {
    const FUSE_SUBMOUNTS: u32 = 1 << 27;
    let mut body = [0; 64];
    (body[0], body[4]) = (7, 38);
    body[12..16].copy_from_slice(&FUSE_SUBMOUNTS.to_le_bytes());
    body
}

/// Sends a request by the rules; returns the head of its answer.
pub fn call(device: &Device, opcode: u32, node: u64, body: &[u8], answer_len: u32) -> Option<Answer> {
    raw(device, HEADER_LEN + body.len() as u32, opcode, node, body, answer_len)
}

/// The same, with a length in the header that may be a lie.
fn raw(device: &Device, len: u32, opcode: u32, node: u64, body: &[u8], answer_len: u32) -> Option<Answer> {
    let queue = Queue::of_device(device, REQUEST_QUEUE);
    let (at, answer, count) = (queue.buffer, queue.buffer + ANSWER_OFFSET, queue.used_index());
    write(at, len);
    write(at + 4, opcode);
    write(at + 8, 1_u64);
    write(at + 16, node);
    write(at + 24, 0_u64);
    write(at + 32, 1_u64);
    for (to, byte) in (at + u64::from(HEADER_LEN)..).zip(body) {
        write(to, *byte);
    }
    write(answer, 0_u64);
    queue.describe(0, at, HEADER_LEN + body.len() as u32, NEXT, 1);
    queue.describe(1, answer, answer_len, WRITE, 0);
    queue.offer(0);
    device.kick(REQUEST_QUEUE);
    let answered = crate::virtio::wait(|| queue.used_index() != count);
    answered.then(|| Answer { len: read(answer), error: read(answer + 4), used: queue.used_len(count) })
}

/// A session of the file system.
fn session(device: &Device) -> Verdict {
    if !device.start(0) {
        return Err("it does not start");
    }
    match call(device, FUSE_INIT, ROOT, &init_body(), 256) {
        Some(Answer { error: 0, .. }) => Ok(()),
        _ => Err("no session"),
    }
}

/// Names that are not one component of a path.
const NAMES: [(&str, &[u8]); 8] = [
    ("empty", b"\0"),
    ("dot", b".\0"),
    ("dot-dot", b"..\0"),
    ("with-a-slash", b"../outside\0"),
    ("absolute", b"/etc/passwd\0"),
    ("deep", b"a/b\0"),
    ("without-an-end", b"name"),
    ("with-a-trailing-slash", b"a/\0"),
];

/// Operations on a name in the root directory, with the length of what comes before the name.
const NAMING: [(&str, u32, usize); 9] = [
    ("lookup", FUSE_LOOKUP, 0),
    ("unlink", FUSE_UNLINK, 0),
    ("rmdir", FUSE_RMDIR, 0),
    ("mkdir", FUSE_MKDIR, 8),
    ("mknod", FUSE_MKNOD, 16),
    ("create", FUSE_CREATE, 16),
    ("symlink", FUSE_SYMLINK, 0),
    ("rename", FUSE_RENAME, 8),
    ("link", FUSE_LINK, 8),
];

/// Runs the cases.
pub fn attack(report: &mut Report, device: &Device) {
    for (operation, opcode, before) in NAMING {
        for (name, bytes) in NAMES {
            let verdict = named(device, opcode, before, bytes).and_then(|()| works(device));
            report.tell(format_args!("fs/name/{operation}/{name}"), verdict);
        }
    }
    for opcode in (0..=56).chain([4096, u32::MAX]) {
        let verdict = session(device).and_then(|()| garbage(device, opcode)).and_then(|()| works(device));
        report.tell(format_args!("fs/opcode/{opcode}/body-all-ones"), verdict);
        let verdict = session(device).and_then(|()| no_body(device, opcode)).and_then(|()| works(device));
        report.tell(format_args!("fs/opcode/{opcode}/no-body"), verdict);
    }
    for (name, len) in [("zero", 0), ("short", 39), ("long", 4096), ("4-gib", u32::MAX)] {
        let verdict = lying_length(device, len).and_then(|()| works(device));
        report.tell(format_args!("fs/length/{name}"), verdict);
    }
    for (name, mode) in [("block", 0o060_666_u32), ("character", 0o020_666)] {
        let verdict = device_node(device, mode).and_then(|()| works(device));
        report.tell(format_args!("fs/mknod/{name}"), verdict);
    }
    for (name, opcode) in ON_HANDLES {
        for (handle_name, handle) in [("zero", 0), ("unknown", 12_345), ("all-ones", u64::MAX)] {
            let verdict = on_handle(device, opcode, handle).and_then(|()| works(device));
            report.tell(format_args!("fs/handle/{name}/{handle_name}"), verdict);
        }
    }
    report.tell(format_args!("fs/read/4-gib"), huge_read(device).and_then(|()| works(device)));
    report.tell(format_args!("fs/write/more-than-was-sent"), lying_write(device).and_then(|()| works(device)));
    report.tell(format_args!("fs/answer/no-room"), no_room(device).and_then(|()| works(device)));
    report.tell(
        format_args!("fs/init/twice"),
        session(device).and_then(|()| {
            let _ = call(device, FUSE_INIT, ROOT, &init_body(), 256);
            works(device)
        }),
    );
    let verdict = init_without_submounts(device).and_then(|()| works(device));
    report.tell(format_args!("fs/init/without-submounts"), verdict);
    report.tell(format_args!("fs/init/of-another-version"), {
        let mut body = init_body();
        body[0] = 99;
        let started = if device.start(0) { Ok(()) } else { Err("it does not start") };
        started.and_then(|()| {
            let _ = call(device, FUSE_INIT, ROOT, &body, 256);
            works(device)
        })
    });
}

/// Refused, because the host's library would write a line to the log each time.
fn init_without_submounts(device: &Device) -> Verdict {
    if !device.start(0) {
        return Err("it does not start");
    }
    let mut body = init_body();
    body[12..16].fill(0);
    match call(device, FUSE_INIT, ROOT, &body, 256) {
        Some(answer) if answer.error != 0 => Ok(()),
        Some(_) => Err("a session without submounts"),
        None => Err("no answer"),
    }
}

/// A name that is none is refused, whatever is to be done with it.
fn named(device: &Device, opcode: u32, before: usize, name: &[u8]) -> Verdict {
    session(device)?;
    let mut body = [0_u8; 64];
    body[..4].copy_from_slice(&0o100_644_u32.to_le_bytes());
    if before == 8 && opcode != FUSE_MKDIR {
        // A rename's new directory, a link's old node.
        body[..8].copy_from_slice(&ROOT.to_le_bytes());
    }
    body[before..before + name.len()].copy_from_slice(name);
    let mut len = before + name.len();
    if matches!(opcode, FUSE_SYMLINK | FUSE_RENAME) {
        body[len..len + 6].copy_from_slice(b"other\0");
        len += 6;
    }
    match call(device, opcode, ROOT, &body[..len], 256) {
        // A request that cannot be decoded is given back without an answer.
        Some(answer) if answer.len > 0 && answer.error == 0 => Err("a name that is none was accepted"),
        Some(_) => Ok(()),
        None => Err("no answer"),
    }
}

fn garbage(device: &Device, opcode: u32) -> Verdict {
    answered(device, opcode, &[0xff; 160])
}

fn no_body(device: &Device, opcode: u32) -> Verdict {
    answered(device, opcode, &[])
}

/// FORGET, BATCH_FORGET and INTERRUPT have no answer; their chains come back all the same.
fn answered(device: &Device, opcode: u32, body: &[u8]) -> Verdict {
    match call(device, opcode, ROOT, body, 4096) {
        Some(answer) if answer.len > 4096 || answer.used > 4096 => Err("an answer is longer than its buffer"),
        Some(_) => Ok(()),
        None => Err("no answer"),
    }
}

fn lying_length(device: &Device, len: u32) -> Verdict {
    session(device)?;
    match raw(device, len, FUSE_LOOKUP, ROOT, b"name\0", 256) {
        Some(_) => Ok(()),
        None => Err("no answer"),
    }
}

fn device_node(device: &Device, mode: u32) -> Verdict {
    session(device)?;
    let mut body = [0; 21];
    body[..4].copy_from_slice(&mode.to_le_bytes());
    body[4..8].copy_from_slice(&0x0801_u32.to_le_bytes());
    body[16..].copy_from_slice(b"node\0");
    match call(device, FUSE_MKNOD, ROOT, &body, 256) {
        Some(answer) if answer.error != 0 => Ok(()),
        Some(_) => Err("a device of the host was made"),
        None => Err("no answer"),
    }
}

const ON_HANDLES: [(&str, u32); 6] = [
    ("read", FUSE_READ),
    ("write", FUSE_WRITE),
    ("readdir", FUSE_READDIR),
    ("fallocate", FUSE_FALLOCATE),
    ("ioctl", FUSE_IOCTL),
    ("copy-file-range", FUSE_COPY_FILE_RANGE),
];

/// Each of these has the handle first.
fn on_handle(device: &Device, opcode: u32, handle: u64) -> Verdict {
    session(device)?;
    let mut body = [0; 64];
    body[..8].copy_from_slice(&handle.to_le_bytes());
    body[16] = 64;
    match call(device, opcode, ROOT, &body, 4096) {
        Some(answer) if answer.error == 0 => Err("a handle that is none was accepted"),
        Some(_) => Ok(()),
        None => Err("no answer"),
    }
}

/// Opens the root directory; its handle.
fn open_root(device: &Device) -> Option<u64> {
    let answer = call(device, FUSE_OPENDIR, ROOT, &[0; 8], 64)?;
    let at = Queue::of_device(device, REQUEST_QUEUE).buffer + ANSWER_OFFSET + u64::from(OUT_HEADER_LEN);
    (answer.error == 0).then(|| read(at))
}

fn huge_read(device: &Device) -> Verdict {
    session(device)?;
    let Some(handle) = open_root(device) else { return Err("the root directory does not open") };
    let mut body = [0; 40];
    body[..8].copy_from_slice(&handle.to_le_bytes());
    body[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    answered(device, FUSE_READDIR, &body)?;
    answered(device, FUSE_READ, &body)
}

fn lying_write(device: &Device) -> Verdict {
    session(device)?;
    let mut body = [0; 48];
    body[..6].copy_from_slice(b"\x41\x02\0\0\xa4\x81");
    body[16..22].copy_from_slice(b"wrote\0");
    // O_RDWR | O_CREAT, mode 0100644.
    if call(device, FUSE_CREATE, ROOT, &body[..22], 256).is_none_or(|answer| answer.error != 0) {
        return Err("a file cannot be made");
    }
    // The handle is behind the entry.
    let at = Queue::of_device(device, REQUEST_QUEUE).buffer + ANSWER_OFFSET + u64::from(OUT_HEADER_LEN) + 128;
    let handle: u64 = read(at);
    let mut body = [0; 56];
    body[..8].copy_from_slice(&handle.to_le_bytes());
    body[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    answered(device, FUSE_WRITE, &body)?;
    answered(device, FUSE_OPEN, &[0xff; 8])?;
    for opcode in [FUSE_SETXATTR, FUSE_GETXATTR, FUSE_REMOVEXATTR, FUSE_RENAME2] {
        answered(device, opcode, b"\xff\xff\xff\xff\0\0\0\0security.capability\0\xff\xff")?;
    }
    Ok(())
}

/// An answer that does not fit is the guest's own loss.
fn no_room(device: &Device) -> Verdict {
    session(device)?;
    for len in [0, 1, 15, 16, 17, 100] {
        let _ = call(device, FUSE_LOOKUP, ROOT, b"name\0", len);
        session(device)?;
    }
    Ok(())
}
