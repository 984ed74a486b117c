//! Makes TAP interfaces (tun(4)) in the network namespace of the calling thread. An interface is gone when the last of its
//! descriptors is closed.
#![expect(unsafe_code, reason = "an ioctl of tun(4) makes the interface")]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// Names of our interfaces; the kernel puts a number behind it.
pub(super) const PREFIX: &str = "vmtap";

// linux/if_tun.h
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);
const IFNAMSIZ: usize = 16;

/// `struct ifreq` of linux/if.h as TUNSETIFF uses it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40, "struct ifreq of x86-64");

/// Makes an interface with `queue_count` queues; returns its name and their descriptors.
///
/// # Errors
/// What open(2) and `TUNSETIFF` say.
pub fn create(queue_count: u8) -> io::Result<(String, Vec<OwnedFd>)> {
    let several = if queue_count > 1 { IFF_MULTI_QUEUE } else { 0 };
    let mut name = format!("{PREFIX}%d");
    let mut fds = Vec::new();
    for _ in 0..queue_count {
        let mut request = InterfaceRequest { name: [0; IFNAMSIZ], flags: 0, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request.flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | several;
        let fd = OwnedFd::from(File::options().read(true).write(true).open("/dev/net/tun")?);
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whose layout the type has.
        let updater = unsafe { Updater::<TUNSETIFF, InterfaceRequest>::new(&mut request) };
        // SAFETY: the operation is meant for a descriptor of /dev/net/tun, and any other refuses it.
        unsafe { ioctl(&fd, updater) }?;
        let len = request.name.iter().position(|byte| *byte == 0).unwrap_or(IFNAMSIZ);
        // The first queue gives the interface its name.
        name = String::from_utf8_lossy(&request.name[..len]).into_owned();
        fds.push(fd);
    }
    Ok((name, fds))
}
