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

/// Groups of links, neighbours, queues, addresses and routes (linux/rtnetlink.h: `RTMGRP_LINK`, `_NEIGH`, `_TC`, `_IPV4_IFADDR`,
/// `_IPV4_ROUTE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`).
const GROUPS: u32 = 0x1 | 0x4 | 0x8 | 0x10 | 0x40 | 0x100 | 0x400;
/// linux/rtnetlink.h
const RTM_NEWNEIGH: u16 = 28;
/// linux/neighbour.h
const NUD_PERMANENT: u16 = 0x80;
/// Length of `nlmsghdr` and the start of `ndmsg` up to the neighbour's state.
const EVENT_LEN: usize = 16 + 10;
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
        while !self.socket.async_io(Interest::READABLE, || self.take()).await? {}
        tokio::time::sleep(SETTLE).await;
        for _ in 0..MAX_EVENTS {
            match self.socket.try_io(Interest::READABLE, || self.take()) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether the event is one to look for.
    fn take(&self) -> io::Result<bool> {
        let mut event = [0; EVENT_LEN];
        match recv(self.socket.as_fd(), &mut event, RecvFlags::TRUNC) {
            Ok(_) => Ok(matters(&event)),
            // Events were lost, so something happened.
            Err(rustix::io::Errno::NOBUFS) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

/// All but what the kernel learns of its neighbours by itself, which it does all the time. One that is gone does not tell whether
/// somebody had set it.
fn matters(event: &[u8; EVENT_LEN]) -> bool {
    let field = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    let (kind, state) = (field(4), field(EVENT_LEN - 2));
    kind != RTM_NEWNEIGH || state & NUD_PERMANENT != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, state: u16) -> [u8; EVENT_LEN] {
        let mut event = [0; EVENT_LEN];
        event[4..6].copy_from_slice(&kind.to_ne_bytes());
        event[24..].copy_from_slice(&state.to_ne_bytes());
        event
    }

    #[test]
    fn neighbours_matter_that_somebody_has_set() {
        let (rtm_newlink, rtm_delneigh, nud_reachable) = (16, 29, 0x02);
        assert!(matters(&event(RTM_NEWNEIGH, NUD_PERMANENT)));
        assert!(!matters(&event(RTM_NEWNEIGH, nud_reachable)));
        assert!(matters(&event(rtm_delneigh, 0)) && matters(&event(rtm_newlink, 0)));
    }
}
