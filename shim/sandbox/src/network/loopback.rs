//! Ports of a pod's loopback interface on the host, where the CRI plugin dials for `kubectl port-forward`: no process of the pod
//! listens there, since they are all in the guest. A program of the namespace hands every connection to one listener of ours.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen as listen_at, socket_with, sockopt};

use super::{NetworkError, netns};

mod steer;

/// Connections that wait until they are accepted.
const BACKLOG: i32 = 128;

/// Takes the connections to every TCP port of 127.0.0.0/8 and `::1` of a namespace.
pub(crate) struct Loopback {
    /// The local address of an accepted connection is what was dialled.
    pub(crate) listener: TcpListener,
    /// Without it a dial is refused, as before.
    _steering: OwnedFd,
}

/// Begins to take them. Blocks for a moment.
pub(crate) fn listen(namespace: &OwnedFd) -> Result<Loopback, NetworkError> {
    let open = || -> io::Result<Loopback> {
        let listener = listener()?;
        let steering = steer::attach(namespace, &listener)?;
        Ok(Loopback { listener, _steering: steering })
    };
    netns::enter(namespace, async |_| open().map_err(NetworkError::host("take the ports of the loopback interface")))
}

/// Listens at whatever port is free, for both families where the kernel has both.
fn listener() -> io::Result<TcpListener> {
    let open = |family| socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None);
    let (socket, address) = match open(AddressFamily::INET6) {
        Ok(socket) => {
            sockopt::set_ipv6_v6only(&socket, false)?;
            (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)))
        }
        Err(Errno::AFNOSUPPORT) => (open(AddressFamily::INET)?, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
        Err(error) => return Err(error.into()),
    };
    bind(&socket, &address)?;
    listen_at(&socket, BACKLOG)?;
    Ok(socket.into())
}
