//! A name server for stories: every name has the same two addresses.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::thread::{self, JoinHandle};

const HEADER_LEN: usize = 12;
const TYPE_A: [u8; 2] = [0, 1];
const TYPE_AAAA: [u8; 2] = [0, 28];

/// The server; ends when dropped.
pub struct Dns {
    socket: UdpSocket,
    thread: Option<JoinHandle<()>>,
}

impl Dns {
    /// Answers at a socket until the value is dropped.
    ///
    /// # Panics
    /// When the socket cannot be shared.
    #[must_use]
    pub fn serve(socket: UdpSocket, v4: Ipv4Addr, v6: Ipv6Addr) -> Self {
        let ours = socket.try_clone().expect("a socket");
        let thread = thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((len, from)) = socket.recv_from(&mut query) {
                if len == 0 {
                    return;
                }
                answer(&socket, &query[..len], from, v4, v6);
            }
        });
        Self { socket: ours, thread: Some(thread) }
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        let address = self.socket.local_addr().expect("bound");
        // An empty datagram is the order to end.
        self.socket.send_to(&[], address).expect("sent");
        self.thread.take().expect("running").join().expect("it does not panic");
    }
}

/// Answers the first question (RFC 1035, 4.1).
fn answer(socket: &UdpSocket, query: &[u8], from: SocketAddr, v4: Ipv4Addr, v6: Ipv6Addr) {
    let name_len = query[HEADER_LEN..].iter().position(|byte| *byte == 0).expect("a name") + 1;
    let question = &query[HEADER_LEN..HEADER_LEN + name_len + 4];
    let typ = [question[name_len], question[name_len + 1]];
    let data = match typ {
        TYPE_A => v4.octets().to_vec(),
        TYPE_AAAA => v6.octets().to_vec(),
        _ => Vec::new(),
    };
    let count = u8::from(!data.is_empty());
    let mut reply = [&query[..2], &[0x81, 0x80, 0, 1, 0, count, 0, 0, 0, 0], question].concat();
    if count == 1 {
        // The name of the question, its type and class, a minute.
        reply.extend([0xc0, 0x0c, typ[0], typ[1], 0, 1, 0, 0, 0, 60, 0, u8::try_from(data.len()).expect("short")]);
        reply.extend(data);
    }
    socket.send_to(&reply, from).expect("sent");
}
