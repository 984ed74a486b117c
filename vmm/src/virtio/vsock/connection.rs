//! One stream between a guest port and a host socket, with the credit of both sides (VIRTIO 1.2, 5.10.6.3).
//!
//! ```text
//!   guest ──► to_host (at most BUF_ALLOC bytes) ──► socket ──► guest   (only as far as the guest has room)
//! ```

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::packet::{Header, VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE, VIRTIO_VSOCK_SHUTDOWN_F_SEND};
use crate::device_thread::DeviceThread;
use crate::jail::ThreadKind;

/// What we let the guest send ahead, in bytes; also the most that is kept for a slow reader on the host.
pub(super) const BUF_ALLOC: u32 = 256 << 10;
/// The guest is told of new room after this many bytes.
const CREDIT_UPDATE_AFTER: u32 = BUF_ALLOC / 4;

/// Connections that the guest has left and whose last bytes are still being read; each has a thread.
static FINISHING: AtomicUsize = AtomicUsize::new(0);
const MAX_FINISHING: usize = 64;

/// A connection; `Wrapping` counters as the standard has them.
pub(super) struct Connection {
    pub(super) socket: UnixStream,
    to_host: VecDeque<u8>,
    /// Bytes passed on to the host, and what of it the guest knows.
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    /// Bytes sent to the guest, and what it said of its buffer.
    sent: Wrapping<u32>,
    peer_buf_alloc: u32,
    peer_forwarded: Wrapping<u32>,
    /// The host has ended its half and the guest was told.
    pub(super) host_ended: bool,
    /// The guest has ended its half.
    guest_ended: bool,
    host_told_of_end: bool,
    /// The muxer will read from the socket when its turn comes.
    pub(super) in_turn: bool,
    /// The socket may have bytes for which the guest had no room; nothing tells of them again.
    pub(super) starved: bool,
    /// The host's end was closed: what a read leaves may be the end, which is not told again.
    pub(super) hung_up: bool,
    /// The socket is watched for room.
    pub(super) waits_for_room: bool,
    /// A credit update waits to be sent.
    pub(super) update_queued: bool,
}

/// The guest sent more than it may, or the host end is gone.
#[derive(Debug)]
pub(super) struct Broken;

impl Connection {
    pub(super) fn new(socket: UnixStream, request: &Header) -> Self {
        let mut connection = Self {
            socket,
            to_host: VecDeque::new(),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            sent: Wrapping(0),
            peer_buf_alloc: 0,
            peer_forwarded: Wrapping(0),
            host_ended: false,
            guest_ended: false,
            host_told_of_end: false,
            in_turn: false,
            starved: false,
            hung_up: false,
            waits_for_room: false,
            update_queued: false,
        };
        connection.learn_credit(request);
        connection
    }

    /// Each packet of the guest says what room it has.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
    }

    /// Bytes that may be sent to the guest now.
    pub(super) fn peer_room(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    pub(super) fn count_sent(&mut self, len: u32) {
        self.sent += len;
    }

    /// Puts our side of the credit into a packet that is about to be sent.
    pub(super) fn tell_credit(&mut self, header: &mut Header) {
        header.buf_alloc = BUF_ALLOC;
        header.fwd_cnt = self.forwarded.0;
        self.forwarded_told = self.forwarded;
        self.update_queued = false;
    }

    /// Whether the guest should be told that there is room again.
    pub(super) fn credit_update_due(&self) -> bool {
        (self.forwarded - self.forwarded_told).0 >= CREDIT_UPDATE_AFTER
    }

    /// Keeps bytes of the guest until the socket takes them.
    pub(super) fn keep(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        if self.to_host.len() + bytes.len() > BUF_ALLOC as usize {
            return Err(Broken);
        }
        self.to_host.extend(bytes);
        Ok(())
    }

    /// The socket takes bytes again.
    pub(super) fn flush(&mut self) -> Result<(), Broken> {
        while !self.to_host.is_empty() {
            match self.socket.write(self.to_host.as_slices().0) {
                Ok(written) => {
                    self.to_host.drain(..written);
                    self.count_forwarded(written);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Err(Broken),
            }
        }
        self.tell_host_of_end();
        Ok(())
    }

    /// The guest sends nothing more, which the host learns behind the last byte; or it receives nothing more.
    pub(super) fn end_guest(&mut self, flags: u32) {
        if flags & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE != 0 && !self.host_ended {
            self.host_ended = true;
            // Whatever the host still writes has no reader; it gets EPIPE. A host end that is closed needs no telling.
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        self.guest_ended |= flags & VIRTIO_VSOCK_SHUTDOWN_F_SEND != 0;
        if self.to_host.is_empty() {
            self.tell_host_of_end();
        }
    }

    fn tell_host_of_end(&mut self) {
        if self.guest_ended && !self.host_told_of_end {
            self.host_told_of_end = true;
            // A host end that is closed already needs no telling.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    pub(super) fn has_output(&self) -> bool {
        !self.to_host.is_empty()
    }

    /// Both halves have ended and every byte has been passed on.
    pub(super) fn finished(&self) -> bool {
        self.host_told_of_end && self.host_ended
    }

    /// The guest has closed: every byte has been passed on and nothing more will be read.
    pub(super) fn guest_side_finished(&self) -> bool {
        self.host_told_of_end
    }

    /// The guest is gone from this connection, but a slow reader on the host still gets every byte.
    pub(super) fn finish_in_background(mut self, device_thread: &DeviceThread) {
        if FINISHING.fetch_add(1, Ordering::Relaxed) >= MAX_FINISHING {
            FINISHING.fetch_sub(1, Ordering::Relaxed);
            // Once, for a guest can bring it about again and again.
            static TOLD: Once = Once::new();
            TOLD.call_once(|| tracing::warn!("too many slow readers; the last bytes of a stream are dropped"));
            return;
        }
        let finish = move || {
            let rest: Vec<u8> = self.to_host.drain(..).collect();
            // A reader that has gone meanwhile wants nothing.
            let _ = self.socket.set_nonblocking(false).and_then(|()| self.socket.write_all(&rest));
            FINISHING.fetch_sub(1, Ordering::Relaxed);
        };
        let builder = std::thread::Builder::new().name("vsock-finish".to_owned()).stack_size(64 << 10);
        let starter = device_thread.clone();
        // Not waited for: a reset, which that thread may be at, waits for us.
        device_thread.post(move || {
            if starter.spawn(builder, ThreadKind::VsockFinish, finish).is_err() {
                FINISHING.fetch_sub(1, Ordering::Relaxed);
            }
        });
    }

    /// Bytes have been passed on to the host.
    pub(super) fn count_forwarded(&mut self, len: usize) {
        // At most BUF_ALLOC or one payload.
        self.forwarded += u32::try_from(len).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::{BUF_ALLOC, Connection};
    use crate::virtio::vsock::packet::{Header, VIRTIO_VSOCK_SHUTDOWN_F_SEND};

    fn connection() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        ours.set_nonblocking(true).expect("non-blocking");
        (Connection::new(ours, &Header { buf_alloc: 1000, ..Header::default() }), theirs)
    }

    #[test]
    fn the_guests_room_shrinks_as_we_send_and_grows_as_it_reads() {
        let (mut connection, _host) = connection();
        connection.count_sent(600);
        assert_eq!(connection.peer_room(), 400);
        connection.learn_credit(&Header { buf_alloc: 1000, fwd_cnt: 600, ..Header::default() });
        assert_eq!(connection.peer_room(), 1000);
        connection.learn_credit(&Header { buf_alloc: 10, fwd_cnt: 0, ..Header::default() });
        assert_eq!(connection.peer_room(), 0);
    }

    /// Counters at every distance around their wrap, against the same sum in numbers that do not wrap.
    #[test]
    fn exhaustive_the_guests_room_is_what_it_has_less_what_is_on_the_way() {
        let (mut connection, _host) = connection();
        let edges = || (0..6_u32).chain(u32::MAX - 5..=u32::MAX);
        for (sent, forwarded) in edges().flat_map(|sent| edges().map(move |forwarded| (sent, forwarded))) {
            connection.sent = std::num::Wrapping(sent);
            let on_the_way = (i64::from(sent) - i64::from(forwarded)).rem_euclid(1 << 32);
            for buf_alloc in edges().chain([1 << 31]) {
                connection.learn_credit(&Header { buf_alloc, fwd_cnt: forwarded, ..Header::default() });
                let room = (i64::from(buf_alloc) - on_the_way).max(0);
                assert_eq!(i64::from(connection.peer_room()), room, "{sent} {forwarded} {buf_alloc}");
            }
        }
    }

    #[test]
    fn a_reader_that_never_reads_costs_a_bounded_buffer() {
        let (mut connection, _host) = connection();
        let chunk = vec![0; 64 << 10];
        let accepted = (0..1000).take_while(|_| connection.keep(&chunk).is_ok()).count();
        assert!(accepted < 100, "{accepted} chunks were taken");
        assert!(connection.to_host.len() <= BUF_ALLOC as usize);
    }

    #[test]
    fn the_end_comes_behind_the_last_byte() {
        let (mut connection, mut host) = connection();
        let sent = vec![7; 200 << 10];
        connection.keep(&sent).expect("accepted");
        connection.end_guest(VIRTIO_VSOCK_SHUTDOWN_F_SEND);
        let reader = std::thread::spawn(move || {
            let mut received = Vec::new();
            host.read_to_end(&mut received).map(|_| received)
        });
        while !connection.guest_side_finished() {
            connection.flush().expect("flush");
        }
        assert_eq!(reader.join().expect("reader").expect("read"), sent);
    }
}
