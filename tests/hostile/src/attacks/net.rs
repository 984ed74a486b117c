//! Headers of frames (VIRTIO 1.2, 5.1.6) and the control queue that no driver would send.

use super::exchange::works;
use crate::machine::write;
use crate::virtio::{Device, NEXT, Queue, WRITE};
use crate::{Report, Verdict};

/// Flags, segmentation, header length, segment size, start and offset of the checksum.
const HEADERS: [(&str, [u16; 5]); 14] = [
    ("checksum-not-negotiated", [0x0001, 0, 0, 34, 16]),
    ("checksum-behind-the-frame", [0x0001, 0, 0, u16::MAX, 0]),
    ("checksum-offset-behind-the-frame", [0x0001, 0, 0, 0, u16::MAX]),
    ("checksum-that-wraps", [0x0001, 0, 0, u16::MAX, u16::MAX]),
    ("checksum-at-the-last-byte", [0x0001, 0, 0, 59, 0]),
    ("segments-of-no-byte", [0x0101, 54, 0, 34, 16]),
    ("segments-not-negotiated", [0x0101, 54, 1448, 34, 16]),
    ("segments-with-a-long-header", [0x0101, u16::MAX, 1448, 34, 16]),
    ("segments-without-checksum", [0x0100, 54, 1448, 0, 0]),
    ("segments-of-udp", [0x0301, 42, 1400, 34, 6]),
    ("segments-of-ipv6", [0x0401, 74, 1400, 54, 16]),
    ("segments-of-an-unknown-kind", [0x7f01, 54, 1448, 34, 16]),
    ("segments-with-congestion-bit", [0x8101, 54, 1448, 34, 16]),
    ("all-ones", [u16::MAX; 5]),
];

/// What the device can leave to the host: checksums, segments of TCP and UDP (VIRTIO 1.2, 5.1.3).
const OFFLOADS: u64 = 1 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 56;

/// Headers that lie where offloads were negotiated, and the length of the frame with its header.
const LIES: [(&str, [u16; 5], u32); 16] = [
    ("segments-larger-than-the-frame", [0x0101, 54, 60_000, 34, 16], 72),
    ("segments-of-the-largest-size", [0x0101, 54, u16::MAX, 34, 16], 4012),
    ("segments-of-a-byte", [0x0101, 54, 1, 34, 16], 4012),
    ("thousands-of-segments", [0x0101, 54, 8, 34, 16], 65_000),
    ("segments-of-a-frame-that-is-too-long", [0x0101, 54, 1448, 34, 16], 65_600),
    ("segments-of-headers-alone", [0x0101, 54, 1448, 34, 16], 66),
    ("segments-of-half-an-ip-header", [0x0101, 54, 1448, 34, 16], 40),
    ("segments-without-headers", [0x0101, 0, 1448, 34, 16], 4012),
    ("segments-that-are-headers", [0x0101, 4000, 1448, 34, 16], 4012),
    ("segments-of-ipv6-that-are-of-ipv4", [0x0401, 74, 1400, 54, 16], 4012),
    ("segments-of-udp-that-are-of-tcp", [0x0501, 42, 1400, 34, 6], 4012),
    ("segments-of-udp-larger-than-the-frame", [0x0501, 42, 60_000, 34, 6], 72),
    ("segments-with-the-checksum-before-them", [0x0101, 54, 1448, 0, 0], 4012),
    ("segments-with-the-checksum-in-their-bytes", [0x0101, 54, 1448, 2000, 16], 4012),
    ("segments-with-the-checksum-at-their-end", [0x0101, 54, 1448, 3998, 0], 4012),
    ("segments-with-a-checksum-that-wraps", [0x0101, 54, 1448, u16::MAX, u16::MAX], 4012),
];

/// Ethernet, IPv4 and TCP, so that the host believes the headers as far as it can.
const TCP_FRAME: [u8; 54] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0, 0x0f, 0x92, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0,
    0, 2, 10, 0, 0, 1, 0x10, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
];

const LENGTHS: [(&str, u32); 9] = [
    ("nothing", 0),
    ("half-a-header", 6),
    ("a-header-alone", 12),
    ("a-byte", 13),
    ("half-an-ethernet-header", 20),
    ("an-ethernet-header", 26),
    ("longer-than-the-mtu", 3000),
    ("as-long-as-a-frame-can-be", 65_563),
    ("longer-than-a-frame-can-be", 1 << 20),
];

/// Runs the cases.
pub fn attack(report: &mut Report, device: &Device) {
    for (name, header) in HEADERS {
        let verdict = transmit(device, 0, header, 72).and_then(|()| works(device));
        report.tell(format_args!("net/header/{name}"), verdict);
    }
    // A stream has none.
    let offloads = device.offered() & OFFLOADS;
    if offloads != 0 {
        for (name, header, len) in HEADERS.map(|(name, header)| (name, header, 72)).into_iter().chain(LIES) {
            let verdict = transmit(device, offloads, header, len).and_then(|()| works(device));
            report.tell(format_args!("net/offload/{name}"), verdict);
        }
    }
    for (name, len) in LENGTHS {
        let verdict = transmit(device, 0, [0; 5], len).and_then(|()| works(device));
        report.tell(format_args!("net/frame/{name}"), verdict);
    }
    for class in [0_u8, 1, 4, 5, 0x7f, 0xff] {
        let verdict = control(device, class).and_then(|()| works(device));
        report.tell(format_args!("net/control/class-{class}"), verdict);
    }
}

/// What is wrong with a frame is the guest's loss: it is given back.
fn transmit(device: &Device, features: u64, header: [u16; 5], len: u32) -> Verdict {
    if !device.start(features) {
        return Err("it does not start");
    }
    let queue = Queue::of_device(device, 1);
    for (at, half) in (0..).step_by(2).zip(header) {
        write(queue.buffer + at, half);
    }
    // Behind the number of buffers.
    for (at, byte) in (12..).zip(TCP_FRAME) {
        write(queue.buffer + at, byte);
    }
    queue.describe(0, queue.buffer, len, 0, 0);
    queue.offer(0);
    device.kick(1);
    if queue.wait(1) { Ok(()) } else { Err("a frame is kept for ever") }
}

/// Commands with every length of their data.
fn control(device: &Device, class: u8) -> Verdict {
    const CTRL_VQ: u64 = 1 << 17;
    if !device.start(CTRL_VQ) {
        return Err("it does not start");
    }
    let queue = Queue::of_device(device, device.queue_count() - 1);
    for (count, len) in (1..).zip([0, 1, 2, 3, 4, 6, 64, 4096_u32]) {
        write(queue.buffer, u64::from(class) | 0xffff_ff00);
        queue.describe(0, queue.buffer, len, NEXT, 1);
        queue.describe(1, queue.buffer + 0x2000, 1, WRITE, 0);
        queue.offer(0);
        device.kick(queue.index);
        if !queue.wait(count) {
            return Err("no answer to a command");
        }
    }
    Ok(())
}
