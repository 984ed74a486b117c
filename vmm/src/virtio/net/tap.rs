//! One queue of a TAP interface (tun(4), Documentation/networking/tuntap.rst): the descriptor was opened by our caller, so
//! nothing here names an interface or needs a capability.
#![expect(unsafe_code, reason = "ioctls of tun(4)")]

use std::ffi::c_ulong;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use libc::{IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, ifreq};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};

use super::backend::{Backend, Frame};
use super::header::{
    HEADER_LEN, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO,
};
use crate::virtio::spans::Spans;

pub(super) const VIRTIO_NET_F_GUEST_CSUM: u64 = 1 << 1;
pub(super) const VIRTIO_NET_F_GUEST_TSO4: u64 = 1 << 7;
pub(super) const VIRTIO_NET_F_GUEST_TSO6: u64 = 1 << 8;
pub(super) const VIRTIO_NET_F_GUEST_ECN: u64 = 1 << 9;
pub(super) const VIRTIO_NET_F_GUEST_USO4: u64 = 1 << 54;
pub(super) const VIRTIO_NET_F_GUEST_USO6: u64 = 1 << 55;

/// What every kernel since 2.6.27 can do.
const OFFLOADS: u64 = VIRTIO_NET_F_CSUM
    | VIRTIO_NET_F_HOST_TSO4
    | VIRTIO_NET_F_HOST_TSO6
    | VIRTIO_NET_F_HOST_ECN
    | VIRTIO_NET_F_GUEST_CSUM
    | VIRTIO_NET_F_GUEST_TSO4
    | VIRTIO_NET_F_GUEST_TSO6
    | VIRTIO_NET_F_GUEST_ECN;
/// What Linux 6.2 and later can do as well.
const UDP_OFFLOADS: u64 = VIRTIO_NET_F_HOST_USO | VIRTIO_NET_F_GUEST_USO4 | VIRTIO_NET_F_GUEST_USO6;

// include/uapi/linux/if_tun.h
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;
/// The feature that lets the host hand over such frames, and the interface's flag for it.
const RECEIVED: [(u64, u32); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6),
];

/// The queue.
pub(super) struct Tap {
    fd: OwnedFd,
    features: u64,
    /// Whether the interface has several queues, which can be taken out of use.
    multi_queue: bool,
}

impl Tap {
    /// Takes an open queue of an interface.
    pub(super) fn open(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: all zeros are an interface request without name and flags.
        let mut request: ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes one `ifreq`, which `request` is.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as c_ulong, &raw mut request) })?;
        // SAFETY: TUNGETIFF has set the flags.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the interface was made without IFF_TAP, IFF_NO_PI or IFF_VNET_HDR",
            ));
        }
        let header_len = i32::try_from(HEADER_LEN).expect("12");
        // SAFETY: TUNSETVNETHDRSZ reads one `int`, which `header_len` is.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ as c_ulong, &raw const header_len) })?;
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        let multi_queue = flags & libc::IFF_MULTI_QUEUE != 0;
        let mut tap = Self { fd, features: OFFLOADS | UDP_OFFLOADS, multi_queue };
        if tap.set_features(tap.features).is_err() {
            tap.features = OFFLOADS;
        }
        tap.set_features(0)?;
        Ok(tap)
    }

    /// Whether the interface has several queues.
    pub(super) fn is_multi_queue(&self) -> bool {
        self.multi_queue
    }
}

impl Backend for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn set_features(&self, features: u64) -> io::Result<()> {
        let accepted = RECEIVED.iter().filter(|(feature, _)| features & feature != 0);
        let flags = accepted.fold(0, |flags, (_, flag)| flags | flag);
        // SAFETY: TUNSETOFFLOAD takes its flags as the argument itself and touches no memory.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD as c_ulong, c_ulong::from(flags)) })
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        if !self.multi_queue {
            return Ok(());
        }
        // SAFETY: all zeros are an interface request without name and flags.
        let mut request: ifreq = unsafe { std::mem::zeroed() };
        let flag = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = i16::try_from(flag).expect("0x200 or 0x400");
        // SAFETY: TUNSETQUEUE reads one `ifreq`, which `request` is.
        let set = check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETQUEUE as c_ulong, &raw const request) });
        match set {
            // It is so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(&self.fd, &mut *frame) {
                Err(rustix::io::Errno::INTR) => {}
                // A frame that the header cannot describe was dropped by the kernel.
                Err(rustix::io::Errno::INVAL) => {}
                other => return other.map_err(Into::into),
            }
        }
    }

    fn send(&mut self, frame: &Frame<'_>) -> io::Result<()> {
        let mut spans = Spans::default();
        spans.add_slice(frame.head);
        for (address, len) in frame.rest {
            spans.add(frame.memory, *address, *len)?;
        }
        spans.write_to(self.fd.as_fd()).map(drop).map_err(|error| match error.raw_os_error() {
            // EIO: the interface is down. The others: this frame does not please the kernel.
            Some(libc::EIO | libc::EINVAL | libc::ENOMEM | libc::ENOBUFS | libc::EFAULT | libc::E2BIG) => {
                io::ErrorKind::InvalidInput.into()
            }
            _ => error,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn is_behind(&self) -> bool {
        false
    }
}

/// Has vhost-net carry frames between one of its rings and a queue, or between that ring and nothing (linux/vhost.h).
pub(super) fn set_backend(vhost: BorrowedFd<'_>, ring: u32, tap: Option<&Tap>) -> io::Result<()> {
    let file = vhost_vring_file { index: ring, fd: tap.map_or(-1, |tap| tap.fd.as_raw_fd()) };
    // SAFETY: VHOST_NET_SET_BACKEND reads one `vhost_vring_file`, which `file` is.
    check(unsafe { libc::ioctl(vhost.as_raw_fd(), VHOST_NET_SET_BACKEND(), &raw const file) })
}

fn check(returned: i32) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
