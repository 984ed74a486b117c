//! Conversations over a network, by one program at both ends:
//!
//! ```text
//!   echo serve                        answers at port 7 of TCP and UDP (RFC 862), and as a name server, until it is killed
//!   echo call PORT SIZE ADDRESS...    asks there: `ADDRESS tcp FROM`, and `ADDRESS udp` for a datagram of SIZE bytes
//! ```
//! The server begins each answer of TCP with the address that it was asked from. What goes wrong is told in place of the rest of a line.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::dns::Dns;

/// What the server says once it listens.
pub const READY: &str = "ready\n";
const PORT: u16 = 7;
const DNS_PORT: u16 = 53;
/// Two addresses that every name has there.
const NAMED: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(192, 0, 2, 1), Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1));
/// Bytes that a connection carries in each direction: more than a segment, and less than what its ends hold.
const STREAM_LEN: usize = 32 << 10;
const DEADLINE: Duration = Duration::from_secs(60);
/// Datagrams may be lost, but not this many.
const ATTEMPTS: u32 = 12;

/// The running server; killed when dropped.
pub struct Echo(Child);

impl Echo {
    /// Starts it with a command of the program, and waits until it listens.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn serve(mut program: Command) -> Self {
        let mut child = program.arg("serve").stdout(Stdio::piped()).spawn().expect("the program starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        assert_eq!(line, READY);
        Self(child)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // It has not ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program.
///
/// # Panics
/// When its arguments are others, or a port is taken.
pub fn run() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["serve"] => serve().expect("the ports are free"),
        ["call", port, size, addresses @ ..] => {
            let (port, size) = (port.parse().expect("a port"), size.parse().expect("a size"));
            for address in addresses {
                call(SocketAddr::new(address.parse().expect("an address"), port), size);
            }
        }
        _ => panic!("usage: echo serve | call PORT SIZE ADDRESS..., and not {words:?}"),
    }
}

fn serve() -> io::Result<()> {
    let any = Ipv6Addr::UNSPECIFIED;
    let (listener, socket) = (TcpListener::bind((any, PORT))?, UdpSocket::bind((any, PORT))?);
    let _dns = Dns::serve(UdpSocket::bind((any, DNS_PORT))?, NAMED.0, NAMED.1);
    print!("{READY}");
    io::stdout().flush()?;
    thread::spawn(move || send_back(&socket));
    for connection in listener.incoming() {
        let connection = connection?;
        thread::spawn(move || answer(connection));
    }
    Ok(())
}

fn send_back(socket: &UdpSocket) -> io::Result<()> {
    let mut datagram = [0; 1 << 16];
    loop {
        let (len, from) = socket.recv_from(&mut datagram)?;
        // Whoever asked may be gone.
        let _ = socket.send_to(&datagram[..len], from);
    }
}

fn answer(mut connection: TcpStream) -> io::Result<()> {
    writeln!(connection, "{}", connection.peer_addr()?.ip().to_canonical())?;
    io::copy(&mut connection.try_clone()?, &mut connection).map(drop)
}

fn call(at: SocketAddr, size: usize) {
    let asked_from = ask_by_tcp(at).unwrap_or_else(|error| error.to_string());
    println!("{} tcp {asked_from}", at.ip());
    match ask_by_udp(at, size) {
        Ok(()) => println!("{} udp", at.ip()),
        Err(error) => println!("{} udp {error}", at.ip()),
    }
}

/// Returns the address that the server was asked from.
fn ask_by_tcp(at: SocketAddr) -> io::Result<String> {
    let mut connection = TcpStream::connect_timeout(&at, DEADLINE)?;
    connection.set_read_timeout(Some(DEADLINE))?;
    let question = pattern(STREAM_LEN);
    connection.write_all(&question)?;
    connection.shutdown(Shutdown::Write)?;
    let mut reader = BufReader::new(connection);
    let (mut asked_from, mut answer) = (String::new(), Vec::new());
    reader.read_line(&mut asked_from)?;
    reader.read_to_end(&mut answer)?;
    if answer != question {
        return Err(io::Error::other(format!("{} other bytes came back", answer.len())));
    }
    Ok(asked_from.trim_end().to_owned())
}

/// Asks again when no answer comes.
fn ask_by_udp(at: SocketAddr, size: usize) -> io::Result<()> {
    let any: IpAddr = if at.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(at)?;
    socket.set_read_timeout(Some(DEADLINE / ATTEMPTS))?;
    let (question, mut answer) = (pattern(size), vec![0; size + 1]);
    let mut received = Ok(0);
    for _ in 0..ATTEMPTS {
        socket.send(&question)?;
        received = socket.recv(&mut answer);
        if received.is_ok() {
            break;
        }
    }
    if answer[..received?] != question {
        return Err(io::Error::other("another datagram came back"));
    }
    Ok(())
}

/// Bytes without a period that a protocol has.
fn pattern(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_comes_back() {
        let any = Ipv4Addr::LOCALHOST;
        let (listener, socket) =
            (TcpListener::bind((any, 0)).expect("bound"), UdpSocket::bind((any, 0)).expect("bound"));
        let [tcp, udp] = [listener.local_addr(), socket.local_addr()].map(|at| at.expect("bound"));
        thread::spawn(move || answer(listener.accept().expect("a connection").0));
        thread::spawn(move || send_back(&socket));
        assert_eq!(ask_by_tcp(tcp).expect("answered"), "127.0.0.1");
        ask_by_udp(udp, 8972).expect("answered");
    }
}
