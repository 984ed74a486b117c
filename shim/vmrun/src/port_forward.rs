//! `vmrun port-forward`: ports of this host that lead to ports of a container's loopback interface, as kubectl's do. The bytes go through
//! the VM's vsock, so the container needs no network, and its firewall is not asked.

use std::io::{self, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::client::Client;
use crate::complain;
use crate::control::Request;

/// Pause after a connection could not be taken: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A port here, 0 for any that is free, and one of the container.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Ports {
    local: u16,
    remote: u16,
}

/// `PORT`, `LOCAL:REMOTE`, or `:REMOTE` for any port here.
pub(crate) fn parse_ports(text: &str) -> Result<Ports, String> {
    let port = |text: &str| match text.parse() {
        Ok(port @ 1..) if !text.starts_with('+') => Ok(port),
        _ => Err(format!("{text:?} is not a port from 1 to 65535")),
    };
    match text.split_once(':') {
        None => port(text).map(|port| Ports { local: port, remote: port }),
        Some(("", remote)) => Ok(Ports { local: 0, remote: port(remote)? }),
        Some((local, remote)) => Ok(Ports { local: port(local)?, remote: port(remote)? }),
    }
}

/// Serves until the container ends, which is a failure as with kubectl.
pub(crate) fn port_forward(root: &Path, name: &str, address: IpAddr, ports: &[Ports]) -> Result<u8> {
    let mut client = Client::connect(root, name)?;
    let bind = |pair: &Ports| {
        let at = SocketAddr::new(address, pair.local);
        let listener = TcpListener::bind(at).with_context(|| format!("cannot listen at {at}"))?;
        Ok((listener, pair.remote))
    };
    let listeners = ports.iter().map(bind).collect::<Result<Vec<_>>>()?;
    for (listener, remote) in listeners {
        writeln!(io::stdout(), "Forwarding from {} -> {remote}", listener.local_addr()?)?;
        let (root, name) = (root.to_owned(), name.to_owned());
        thread::spawn(move || serve(&root, &name, &listener, remote));
    }
    client.send(&Request::Wait)?;
    client.receive()?;
    bail!("container {name} has ended")
}

fn serve(root: &Path, name: &str, listener: &TcpListener, remote: u16) {
    loop {
        let Ok((connection, from)) = listener.accept() else {
            thread::sleep(ACCEPT_PAUSE);
            continue;
        };
        tracing::info!(%from, port = remote, "a connection");
        let (root, name) = (root.to_owned(), name.to_owned());
        thread::spawn(move || {
            if let Err(error) = carry(&root, &name, &connection, remote) {
                complain(&format!("{error:#}"));
            }
        });
    }
}

/// Carries the bytes of one connection until both sides have ended theirs, or the container's is gone.
fn carry(root: &Path, name: &str, connection: &TcpStream, remote: u16) -> Result<()> {
    let (mut client, stream) = Client::open_stream(root, name, &Request::Forward { port: remote })?;
    thread::scope(|scope| {
        // Whoever closes first ends one direction; that the other side sees it is all that is left to do.
        scope.spawn(|| {
            let _ = io::copy(&mut &*connection, &mut &stream);
            let _ = stream.shutdown(Shutdown::Write);
        });
        let down = scope.spawn(|| {
            let _ = io::copy(&mut &stream, &mut &*connection);
            let _ = connection.shutdown(Shutdown::Write);
        });
        let outcome = client.outcome();
        // The last bytes arrive, then there is nobody left to send to.
        let _ = down.join();
        let _ = connection.shutdown(Shutdown::Both);
        outcome
    })
}

#[cfg(test)]
mod tests {
    use super::{Ports, parse_ports};

    #[test]
    fn ports_are_kubectls() {
        assert_eq!(parse_ports("80"), Ok(Ports { local: 80, remote: 80 }));
        assert_eq!(parse_ports("8080:80"), Ok(Ports { local: 8080, remote: 80 }));
        assert_eq!(parse_ports(":80"), Ok(Ports { local: 0, remote: 80 }));
        for wrong in ["", ":", "0", "80:", "80:0", "0:80", "65536", "a:b", "1:2:3", "+80", "-1"] {
            assert!(parse_ports(wrong).is_err(), "{wrong}");
        }
    }
}
