//! Packets that no driver would send (VIRTIO 1.2, 5.10.6).

use super::exchange::works;
use crate::machine::{read, write};
use crate::virtio::{DEVICE_CONFIG, Device, Queue, WRITE, pause_long, wait};
use crate::{Report, Verdict};

/// Operations.
const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
/// Ends a connection.
pub const OP_RST: u16 = 3;
const OP_SHUTDOWN: u16 = 4;
/// Carries data.
pub const OP_RW: u16 = 5;
const OP_CREDIT_UPDATE: u16 = 6;
const OP_CREDIT_REQUEST: u16 = 7;

const HEADER_LEN: u32 = 44;
/// Declared by the story.
const OPEN_PORT: u32 = 1024;
const HOST_CID: u64 = 2;

/// A header.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    /// What it asks for.
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Packet {
    /// A stream packet of this guest to the port that is open.
    pub fn of(device: &Device) -> Self {
        let src_cid = device.get(DEVICE_CONFIG);
        let (src_port, dst_port, buf_alloc) = (4000, OPEN_PORT, 1 << 16);
        Self {
            src_cid,
            dst_cid: HOST_CID,
            src_port,
            dst_port,
            len: 0,
            kind: 1,
            op: OP_REQUEST,
            flags: 0,
            buf_alloc,
            fwd_cnt: 0,
        }
    }

    fn write(&self, at: u64) {
        write(at, self.src_cid);
        write(at + 8, self.dst_cid);
        write(at + 16, self.src_port);
        write(at + 20, self.dst_port);
        write(at + 24, self.len);
        write(at + 28, self.kind);
        write(at + 30, self.op);
        write(at + 32, self.flags);
        write(at + 36, self.buf_alloc);
        write(at + 40, self.fwd_cnt);
    }

    fn read(at: u64) -> Self {
        Self {
            src_cid: read(at),
            dst_cid: read(at + 8),
            src_port: read(at + 16),
            dst_port: read(at + 20),
            len: read(at + 24),
            kind: read(at + 28),
            op: read(at + 30),
            flags: read(at + 32),
            buf_alloc: read(at + 36),
            fwd_cnt: read(at + 40),
        }
    }
}

/// Sends a packet; returns the first answer.
pub fn send(device: &Device, packet: &Packet, payload: &[u8]) -> Option<Packet> {
    put(device, packet, payload);
    let received = Queue::of_device(device, 0);
    let count = received.used_index();
    wait(|| received.used_index() > 0 || count > 0).then(|| Packet::read(received.buffer))
}

/// Sends a packet, with a buffer for an answer; waits until the device has taken it.
fn put(device: &Device, packet: &Packet, payload: &[u8]) -> bool {
    let (received, sent) = (Queue::of_device(device, 0), Queue::of_device(device, 1));
    received.describe(0, received.buffer, 4096, WRITE, 0);
    received.offer(0);
    device.kick(0);
    let count = sent.used_index();
    packet.write(sent.buffer);
    for (at, byte) in (sent.buffer + u64::from(HEADER_LEN)..).zip(payload) {
        write(at, *byte);
    }
    sent.describe(0, sent.buffer, HEADER_LEN + payload.len() as u32, 0, 0);
    sent.offer(0);
    device.kick(1);
    wait(|| sent.used_index() != count)
}

/// Changes a packet.
type Change = fn(&mut Packet);

const PACKETS: [(&str, Change); 20] = [
    ("of-another-guest", |packet| packet.src_cid = 77),
    ("of-the-host", |packet| packet.src_cid = HOST_CID),
    ("to-another-guest", |packet| packet.dst_cid = 77),
    ("to-itself", |packet| packet.dst_cid = packet.src_cid),
    ("to-nobody", |packet| packet.dst_cid = u64::MAX),
    ("to-a-closed-port", |packet| packet.dst_port = 1),
    ("to-port-zero", |packet| packet.dst_port = 0),
    ("to-the-last-port", |packet| packet.dst_port = u32::MAX),
    ("of-an-unknown-type", |packet| packet.kind = 9),
    ("of-type-seqpacket", |packet| packet.kind = 2),
    ("with-an-unknown-operation", |packet| packet.op = 99),
    ("with-no-operation", |packet| packet.op = 0),
    ("response-to-nothing", |packet| packet.op = OP_RESPONSE),
    ("reset-of-nothing", |packet| packet.op = OP_RST),
    ("shutdown-of-nothing", |packet| (packet.op, packet.flags) = (OP_SHUTDOWN, 3)),
    ("shutdown-with-wild-flags", |packet| (packet.op, packet.flags) = (OP_SHUTDOWN, u32::MAX)),
    ("credit-for-nothing", |packet| packet.op = OP_CREDIT_UPDATE),
    ("credit-asked-for-nothing", |packet| packet.op = OP_CREDIT_REQUEST),
    ("longer-than-its-buffer", |packet| (packet.op, packet.len) = (OP_RW, u32::MAX)),
    ("request-with-a-length", |packet| packet.len = 1 << 20),
];

/// What is sent on a connection that is open.
const ON_CONNECTION: [(&str, Change); 12] = [
    ("a-second-request", |_| ()),
    ("no-room-at-all", |packet| (packet.op, packet.buf_alloc) = (OP_CREDIT_UPDATE, 0)),
    ("room-without-end", |packet| (packet.op, packet.buf_alloc) = (OP_CREDIT_UPDATE, u32::MAX)),
    ("more-taken-than-was-sent", |packet| (packet.op, packet.fwd_cnt) = (OP_CREDIT_UPDATE, u32::MAX)),
    ("data-longer-than-its-buffer", |packet| (packet.op, packet.len) = (OP_RW, 4096)),
    ("data-of-4-gib", |packet| (packet.op, packet.len) = (OP_RW, u32::MAX)),
    ("data-of-nothing", |packet| packet.op = OP_RW),
    ("response-again", |packet| packet.op = OP_RESPONSE),
    ("shutdown-with-wild-flags", |packet| (packet.op, packet.flags) = (OP_SHUTDOWN, u32::MAX)),
    ("shutdown-with-no-flags", |packet| packet.op = OP_SHUTDOWN),
    ("another-type", |packet| (packet.op, packet.kind) = (OP_RW, 2)),
    ("an-unknown-operation", |packet| packet.op = 0x1234),
];

/// Runs the cases.
pub fn attack(report: &mut Report, device: &Device) {
    for (name, change) in PACKETS {
        let verdict = alone(device, change).and_then(|()| works(device));
        report.tell(format_args!("vsock/packet/{name}"), verdict);
    }
    for (name, change) in ON_CONNECTION {
        let verdict = connected(device, change).and_then(|()| works(device));
        report.tell(format_args!("vsock/connection/{name}"), verdict);
    }
    report.tell(
        format_args!("vsock/connection/data-beyond-the-credit"),
        beyond_credit(device).and_then(|()| works(device)),
    );
    report
        .tell(format_args!("vsock/connection/a-thousand-requests"), many_requests(device).and_then(|()| works(device)));
}

fn alone(device: &Device, change: Change) -> Verdict {
    start(device)?;
    let mut packet = Packet::of(device);
    change(&mut packet);
    if put(device, &packet, &[1; 16]) { Ok(()) } else { Err("a packet is kept for ever") }
}

fn connected(device: &Device, change: Change) -> Verdict {
    connect(device)?;
    let mut packet = Packet::of(device);
    change(&mut packet);
    if put(device, &packet, &[1; 16]) { Ok(()) } else { Err("a packet is kept for ever") }
}

fn start(device: &Device) -> Verdict {
    if device.start(0) { Ok(()) } else { Err("it does not start") }
}

fn connect(device: &Device) -> Verdict {
    start(device)?;
    match send(device, &Packet::of(device), &[]) {
        Some(packet) if packet.op == OP_RESPONSE => Ok(()),
        _ => Err("no connection to the open port"),
    }
}

/// The host's reader may be slow: what it has no room for is not taken, or ends the connection.
fn beyond_credit(device: &Device) -> Verdict {
    connect(device)?;
    let packet = Packet { op: OP_RW, len: 4000, ..Packet::of(device) };
    for _ in 0..200 {
        if !put(device, &packet, &[7; 4000]) {
            break;
        }
    }
    Ok(())
}

/// Each from another port: there are fewer connections than that.
fn many_requests(device: &Device) -> Verdict {
    start(device)?;
    for port in 0..1000 {
        if !put(device, &Packet { src_port: 5000 + port, ..Packet::of(device) }, &[]) {
            break;
        }
    }
    pause_long();
    Ok(())
}
