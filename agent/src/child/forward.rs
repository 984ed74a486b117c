//! The step that connects a stream of the host with a TCP port of a loopback interface, of a container or of the VM.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpStream};
use std::os::fd::AsFd as _;
use std::thread;

use anyhow::{Context as _, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::FIRST_FD;
use crate::sys;

/// Carries bytes both ways until both have ended.
pub(super) fn forward(pid: &str, port: &str) -> Result<()> {
    let stream = File::from(sys::take_fd(FIRST_FD));
    let port: u16 = port.parse().with_context(|| format!("{port} is not a port"))?;
    let network = File::open(format!("/proc/{pid}/ns/net")).context("cannot enter the container")?;
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
        .context("cannot enter the container")?;
    let server = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .or_else(|error| TcpStream::connect((Ipv6Addr::LOCALHOST, port)).map_err(|_| error))
        .with_context(|| format!("cannot connect to port {port} of the container"))?;
    thread::scope(|scope| {
        scope.spawn(|| {
            // Whoever closes first ends this direction; that the other side sees it is all that is left to do.
            let _ = io::copy(&mut &stream, &mut &server);
            let _ = server.shutdown(Shutdown::Write);
        });
        let _ = io::copy(&mut &server, &mut &stream);
        let _ = rustix::net::shutdown(&stream, rustix::net::Shutdown::Write);
    });
    Ok(())
}
