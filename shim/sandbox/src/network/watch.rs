//! Tells that something in a network namespace has changed, by events of the kernel (rtnetlink(7)). What has, is for who looks:
//! an event is only counted for one, and under a flood some are lost.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

use super::{NetworkError, netns};

/// Groups of links, queues, addresses and routes (linux/rtnetlink.h: `RTMGRP_LINK`, `_TC`, `_IPV4_IFADDR`, `_IPV4_ROUTE`,
/// `_IPV6_IFADDR`, `_IPV6_ROUTE`).
const GROUPS: u32 = 0x1 | 0x8 | 0x10 | 0x40 | 0x100 | 0x400;
/// Events that come within this time of the first are one: a plugin makes an interface in several steps.
const SETTLE: Duration = Duration::from_millis(50);
/// Most events that are one.
const MAX_EVENTS: usize = 4096;

/// Events of one namespace.
pub(crate) struct Watch {
    // tokio has no type for netlink; of this one only readiness and the descriptor are used.
    socket: UnixDatagram,
}

/// A socket for the events of a namespace from now on. Blocks for a moment.
pub(crate) fn listen(namespace: &OwnedFd) -> Result<OwnedFd, NetworkError> {
    let open = || -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Without a protocol it is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(socket)
    };
    netns::enter(namespace, async |_| open().map_err(NetworkError::host("listen to events of the network namespace")))
}

impl Watch {
    /// Watches a socket of [`listen`].
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: UnixDatagram::from_std(socket.into())? })
    }

    /// Waits for an event, and takes those that follow at once with it.
    pub(crate) async fn changed(&self) -> io::Result<()> {
        self.socket.async_io(Interest::READABLE, || self.take()).await?;
        tokio::time::sleep(SETTLE).await;
        for _ in 0..MAX_EVENTS {
            match self.socket.try_io(Interest::READABLE, || self.take()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn take(&self) -> io::Result<()> {
        match recv(self.socket.as_fd(), &mut [0; 1], RecvFlags::TRUNC) {
            // Events were lost, so something happened.
            Ok(_) | Err(rustix::io::Errno::NOBUFS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
