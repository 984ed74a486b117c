//! One exchange by the rules with each kind of device: what must still work after an attack.

use super::fs::{self, FUSE_INIT};
use super::vsock::{self, Packet};
use crate::Verdict;
use crate::machine::{read, write};
use crate::virtio::{Device, Kind, Queue, WRITE};

/// Resets the device, starts it and has it answer.
pub fn works(device: &Device) -> Verdict {
    if !device.start(0) {
        return Err("it does not start");
    }
    answers(device)
}

/// Has a device that was just started answer.
pub fn answers(device: &Device) -> Verdict {
    match device.kind {
        Kind::Rng => rng(device),
        Kind::Vsock => vsock(device),
        Kind::Fs => fs(device),
        Kind::Net => net(device),
        Kind::Balloon => balloon(device),
    }
}

fn rng(device: &Device) -> Verdict {
    let queue = Queue::of_device(device, 0);
    queue.describe(0, queue.buffer, 16, WRITE, 0);
    queue.offer(0);
    device.kick(0);
    if !queue.wait(1) {
        return Err("no random bytes");
    }
    if queue.used_len(0) == 16 { Ok(()) } else { Err("not 16 random bytes") }
}

/// A packet of no connection is answered with a reset.
fn vsock(device: &Device) -> Verdict {
    let answer = vsock::send(device, &Packet { op: vsock::OP_RW, ..Packet::of(device) }, &[]);
    match answer {
        Some(packet) if packet.op == vsock::OP_RST => Ok(()),
        Some(_) => Err("a packet of no connection is not reset"),
        None => Err("no answer to a packet"),
    }
}

fn fs(device: &Device) -> Verdict {
    match fs::call(device, FUSE_INIT, 1, &fs::init_body(), 256) {
        Some(answer) if answer.error == 0 => Ok(()),
        Some(_) => Err("the file system refuses to start"),
        None => Err("no answer to a FUSE request"),
    }
}

fn net(device: &Device) -> Verdict {
    let queue = Queue::of_device(device, 1);
    for at in (0..72).step_by(8) {
        write(queue.buffer + at, 0_u64);
    }
    queue.describe(0, queue.buffer, 72, 0, 0);
    queue.offer(0);
    device.kick(1);
    let taken = queue.wait(1);
    let _: u64 = read(queue.buffer);
    if taken { Ok(()) } else { Err("a frame is not taken") }
}

/// A balloon that nobody asked for is given back.
fn balloon(device: &Device) -> Verdict {
    let queue = Queue::of_device(device, 0);
    write(queue.buffer, 0_u32);
    queue.describe(0, queue.buffer, 4, 0, 0);
    queue.offer(0);
    device.kick(0);
    if queue.wait(1) { Ok(()) } else { Err("a page is not taken") }
}
