//! A guest's driver and a host's port owner at the two sides of the muxer.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::sync::mpsc::Receiver;

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes as _, GuestAddress};

use super::super::packet::{VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE, VIRTIO_VSOCK_SHUTDOWN_F_SEND as F_SEND};
use super::*;
use crate::event_loop::lock;
use crate::jail::Jail;
use crate::virtio::Interrupt;
use crate::virtio::driver::DriverQueue;

const GUEST_CID: u64 = 3;
const PORT: u32 = 1024;
const PORTS: Ports = Ports { host: PORT, guest: 5000 };
const QUEUE_SIZE: u16 = 64;
const BUFFER_LEN: u32 = 8192;
const TX_BUFFER: u64 = 0x10_0000;
const RX_BUFFERS: u64 = 0x20_0000;

struct Guest {
    memory: Arc<GuestMemory>,
    rx: DriverQueue,
    tx: DriverQueue,
    muxer: Arc<Mutex<Muxer>>,
    registry: Registry,
    owner: OwnedFd,
    interrupts: Receiver<(u64, u32)>,
}

impl Guest {
    fn new() -> Self {
        let memory = crate::memory::create(64).expect("memory");
        let (rx, tx) =
            (DriverQueue::new(&memory, 0x1_0000, QUEUE_SIZE), DriverQueue::new(&memory, 0x2_0000, QUEUE_SIZE));
        let (owner, ours) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).expect("a socket pair");
        let (interrupt, interrupts) = Interrupt::heard();
        let queues =
            [rx.activate(), tx.activate()].map(|queue| ActiveQueue { interrupt: interrupt.clone(), ..queue }).into();
        let config_changed = Interrupt::unheard();
        let device_thread = DeviceThread::start(Jail::default()).expect("a thread");
        let activation = Activation { memory: memory.clone(), features: 0, queues, config_changed, device_thread };
        let registry = Registry::create().expect("epoll");
        let muxer = Muxer::start(activation, GUEST_CID, Arc::new(vec![(PORT, ours)]), registry.clone());
        Self { memory, rx, tx, muxer: muxer.expect("a muxer"), registry, owner, interrupts }
    }

    fn offer_buffers(&mut self, count: u64, len: u32) {
        (0..count).for_each(|_| {
            let address = rx_buffer(self.rx.next_head());
            self.rx.put(&[(address, len, true)]);
        });
        lock(&self.muxer).on_event(TOKEN_RX, EventSet::IN);
    }

    /// What the header leaves at 0 is what a working driver says.
    fn send(&mut self, op: u16, header: Header, payload: &[u8]) {
        let len = u32::try_from(payload.len()).expect("short");
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: PORTS.guest,
            dst_port: if header.dst_port == 0 { PORTS.host } else { header.dst_port },
            buf_alloc: if header.buf_alloc == 0 { 64 << 10 } else { header.buf_alloc },
            len,
            typ: VIRTIO_VSOCK_TYPE_STREAM,
            op,
            ..header
        };
        self.memory.write_slice(&header.encode(), GuestAddress(TX_BUFFER)).expect("in RAM");
        self.memory.write_slice(payload, GuestAddress(TX_BUFFER + u64::from(HEADER_LEN))).expect("in RAM");
        self.tx.put(&[(TX_BUFFER, HEADER_LEN + len, false)]);
        lock(&self.muxer).on_event(TOKEN_TX, EventSet::IN);
        assert!(self.tx.take_used().is_some(), "the packet is given back");
    }

    /// Packets that have arrived: operation, flags, credit told, payload.
    fn received(&mut self) -> Vec<(u16, Header, Vec<u8>)> {
        let mut packets = Vec::new();
        while let Some((head, len)) = self.rx.take_used() {
            if len == 0 {
                continue;
            }
            let at = rx_buffer(head);
            let mut bytes: HeaderBytes = [0; HEADER_LEN as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(at)).expect("in RAM");
            let header = Header::decode(&bytes);
            assert_eq!((header.src_cid, header.dst_cid, len), (HOST_CID, GUEST_CID, HEADER_LEN + header.len));
            let mut payload = vec![0; header.len as usize];
            self.memory.read_slice(&mut payload, GuestAddress(at + u64::from(HEADER_LEN))).expect("in RAM");
            packets.push((header.op, header, payload));
        }
        packets
    }

    fn operations(&mut self) -> Vec<u16> {
        self.received().into_iter().map(|(op, ..)| op).collect()
    }

    /// Connects; returns the host's end.
    fn connect(&mut self, buf_alloc: u32) -> UnixStream {
        self.send(VIRTIO_VSOCK_OP_REQUEST, Header { buf_alloc, ..Header::default() }, &[]);
        assert_eq!(self.operations(), [VIRTIO_VSOCK_OP_RESPONSE]);
        let mut port = [0; 4];
        let (_, mut fds) = vmm_api::fds::recv(self.owner.as_fd(), &mut port).expect("a connection");
        assert_eq!(u32::from_le_bytes(port), PORTS.guest);
        UnixStream::from(fds.pop().expect("its descriptor"))
    }

    /// Serves what the event loop tells of next.
    fn next_events(&mut self) {
        let mut turns = 0;
        let served = self.registry.run(|| {
            turns += 1;
            turns > 1
        });
        served.expect("events");
    }

    fn socket_ready(&mut self, ready: EventSet) {
        lock(&self.muxer).on_event(PORTS.token(), ready);
    }

    /// How often it was interrupted since it was asked last.
    fn interrupts(&self) -> usize {
        self.interrupts.try_iter().count()
    }
}

/// Each descriptor has a buffer of its own.
fn rx_buffer(head: u16) -> u64 {
    RX_BUFFERS + u64::from(head) * 0x1_0000
}

fn connected() -> (Guest, UnixStream) {
    let mut guest = Guest::new();
    guest.offer_buffers(u64::from(QUEUE_SIZE), BUFFER_LEN);
    let host = guest.connect(64 << 10);
    (guest, host)
}

#[test]
fn bytes_flow_both_ways() {
    let (mut guest, mut host) = connected();
    guest.send(VIRTIO_VSOCK_OP_RW, Header { buf_alloc: 64 << 10, ..Header::default() }, b"to the host");
    let mut text = [0; 11];
    host.read_exact(&mut text).expect("read");
    assert_eq!(&text, b"to the host");
    host.write_all(b"to the guest").expect("write");
    guest.socket_ready(EventSet::IN);
    let packets = guest.received();
    assert_eq!((packets.len(), packets[0].0, packets[0].2.as_slice()), (1, VIRTIO_VSOCK_OP_RW, &b"to the guest"[..]));
    assert_eq!(packets[0].1.fwd_cnt, 11);
}

#[test]
fn what_was_sent_and_what_is_received_are_told_by_one_interrupt() {
    let (mut guest, mut host) = connected();
    guest.interrupts();
    guest.send(VIRTIO_VSOCK_OP_RW, Header::default(), b"sent");
    assert_eq!(guest.interrupts(), 1);
    guest.send(VIRTIO_VSOCK_OP_CREDIT_REQUEST, Header::default(), &[]);
    assert_eq!((guest.operations().len(), guest.interrupts()), (1, 1));
    host.write_all(b"received").expect("write");
    guest.socket_ready(EventSet::IN);
    assert_eq!((guest.operations().len(), guest.interrupts()), (1, 1));
}

#[test]
fn a_payload_in_many_buffers_comes_whole() {
    let (mut guest, mut host) = connected();
    let header = Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: PORTS.guest,
        dst_port: PORTS.host,
        len: 6,
        ..Header::default()
    };
    let header = Header { typ: VIRTIO_VSOCK_TYPE_STREAM, op: VIRTIO_VSOCK_OP_RW, buf_alloc: 64 << 10, ..header };
    let bytes = [&header.encode()[..], b"abcdef"].concat();
    guest.memory.write_slice(&bytes, GuestAddress(TX_BUFFER)).expect("in RAM");
    let payload = TX_BUFFER + u64::from(HEADER_LEN);
    guest.tx.put(&[
        (TX_BUFFER, 20, false),
        (TX_BUFFER + 20, HEADER_LEN - 20 + 1, false),
        (payload + 1, 2, false),
        (payload + 3, 90, false),
    ]);
    lock(&guest.muxer).on_event(TOKEN_TX, EventSet::IN);
    let mut text = [0; 6];
    host.read_exact(&mut text).expect("read");
    assert_eq!(&text, b"abcdef");
}

#[test]
fn a_port_that_nobody_declared_is_reset() {
    let mut guest = Guest::new();
    guest.offer_buffers(4, BUFFER_LEN);
    guest.send(VIRTIO_VSOCK_OP_REQUEST, Header { dst_port: 9, ..Header::default() }, &[]);
    assert_eq!(guest.operations(), [VIRTIO_VSOCK_OP_RST]);
}

#[test]
fn packets_of_no_connection_are_answered_with_a_reset_and_resets_are_not() {
    let mut guest = Guest::new();
    guest.offer_buffers(16, BUFFER_LEN);
    for op in
        [VIRTIO_VSOCK_OP_RW, VIRTIO_VSOCK_OP_SHUTDOWN, VIRTIO_VSOCK_OP_CREDIT_REQUEST, VIRTIO_VSOCK_OP_RESPONSE, 99]
    {
        guest.send(op, Header::default(), b"x");
        assert_eq!(guest.operations(), [VIRTIO_VSOCK_OP_RST], "operation {op}");
    }
    guest.send(VIRTIO_VSOCK_OP_RST, Header::default(), &[]);
    assert!(guest.operations().is_empty());
}

#[test]
fn a_guest_that_sends_more_than_it_may_is_reset() {
    let (mut guest, _host) = connected();
    let chunk = vec![7; 64 << 10];
    let reset = (0..64).position(|_| {
        guest.send(VIRTIO_VSOCK_OP_RW, Header::default(), &chunk);
        guest.operations().contains(&VIRTIO_VSOCK_OP_RST)
    });
    assert!(reset.is_some());
    assert!(lock(&guest.muxer).connections.is_empty());
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for_and_the_rest_when_it_says_so() {
    let mut guest = Guest::new();
    guest.offer_buffers(16, BUFFER_LEN);
    let mut host = guest.connect(10);
    host.write_all(b"0123456789abcdef").expect("write");
    guest.socket_ready(EventSet::IN);
    assert_eq!(guest.received()[0].2, b"0123456789");
    guest.socket_ready(EventSet::IN);
    assert!(guest.operations().is_empty());
    guest.send(VIRTIO_VSOCK_OP_CREDIT_UPDATE, Header { buf_alloc: 10, fwd_cnt: 10, ..Header::default() }, &[]);
    assert_eq!(guest.received()[0].2, b"abcdef");
}

#[test]
fn the_guest_is_told_of_new_room_once_per_quarter() {
    let (mut guest, mut host) = connected();
    let chunk = vec![7; 32 << 10];
    guest.send(VIRTIO_VSOCK_OP_RW, Header::default(), &chunk);
    assert!(guest.operations().is_empty());
    host.read_exact(&mut vec![0; 32 << 10]).expect("read");
    guest.send(VIRTIO_VSOCK_OP_RW, Header::default(), &chunk);
    let packets = guest.received();
    assert_eq!((packets.len(), packets[0].0, packets[0].1.fwd_cnt), (1, VIRTIO_VSOCK_OP_CREDIT_UPDATE, 64 << 10));
    guest.send(VIRTIO_VSOCK_OP_CREDIT_REQUEST, Header::default(), &[]);
    assert_eq!(guest.operations(), [VIRTIO_VSOCK_OP_CREDIT_UPDATE]);
}

#[test]
fn the_end_of_the_host_is_told_behind_its_last_byte_and_closing_both_ways_ends_with_a_reset() {
    let (mut guest, mut host) = connected();
    host.write_all(b"last").expect("write");
    drop(host);
    guest.socket_ready(EventSet::IN | EventSet::HANG_UP);
    let packets = guest.received();
    assert_eq!((packets[0].0, packets[0].2.as_slice()), (VIRTIO_VSOCK_OP_RW, &b"last"[..]));
    assert_eq!((packets[1].0, packets[1].1.flags, packets.len()), (VIRTIO_VSOCK_OP_SHUTDOWN, F_SEND, 2));
    let both = Header { flags: F_SEND | VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE, ..Header::default() };
    guest.send(VIRTIO_VSOCK_OP_SHUTDOWN, both, &[]);
    assert_eq!(guest.operations(), [VIRTIO_VSOCK_OP_RST]);
}

#[test]
fn the_end_is_seen_whether_it_comes_with_the_last_byte_or_behind_it() {
    let (mut guest, mut host) = connected();
    host.write_all(b"last").expect("write");
    drop(host);
    guest.next_events();
    assert_eq!(guest.operations(), [VIRTIO_VSOCK_OP_RW, VIRTIO_VSOCK_OP_SHUTDOWN]);

    let (mut guest, mut host) = connected();
    host.write_all(b"last").expect("write");
    guest.next_events();
    assert_eq!(guest.operations(), [VIRTIO_VSOCK_OP_RW]);
    host.shutdown(Shutdown::Write).expect("shut down");
    guest.next_events();
    assert_eq!(guest.operations(), [VIRTIO_VSOCK_OP_SHUTDOWN]);
}

#[test]
fn a_reader_that_waits_gets_what_was_kept_for_it() {
    let (mut guest, mut host) = connected();
    let chunk = [7; 4096];
    let mut sent = 0;
    // Until the socket is full and something is kept.
    while !lock(&guest.muxer).connections[&PORTS].has_output() {
        guest.send(VIRTIO_VSOCK_OP_RW, Header::default(), &chunk);
        sent += chunk.len();
    }
    host.set_nonblocking(true).expect("a socket");
    let mut received = 0;
    while received < sent {
        match host.read(&mut [0; 1 << 16]) {
            Ok(count) => received += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => guest.next_events(),
            Err(error) => panic!("{error}"),
        }
    }
    assert!(!lock(&guest.muxer).connections[&PORTS].waits_for_room);
}

#[test]
fn half_a_close_lets_the_other_half_flow() {
    let (mut guest, mut host) = connected();
    guest.send(VIRTIO_VSOCK_OP_RW, Header::default(), b"question");
    guest.send(VIRTIO_VSOCK_OP_SHUTDOWN, Header { flags: F_SEND, ..Header::default() }, &[]);
    let mut question = String::new();
    host.read_to_string(&mut question).expect("read to the end");
    assert_eq!(question, "question");
    host.write_all(b"answer").expect("write");
    guest.socket_ready(EventSet::IN);
    assert_eq!(guest.received()[0].2, b"answer");
    drop(host);
    guest.socket_ready(EventSet::IN | EventSet::HANG_UP);
    assert_eq!(guest.operations(), [VIRTIO_VSOCK_OP_RST]);
}

#[test]
fn a_guest_that_receives_nothing_more_breaks_the_hosts_pipe() {
    let (mut guest, mut host) = connected();
    let flags = VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE;
    guest.send(VIRTIO_VSOCK_OP_SHUTDOWN, Header { flags, ..Header::default() }, &[]);
    assert_eq!(host.write(b"x").expect_err("no reader").kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_reader() {
    let (mut guest, mut host) = connected();
    let chunk = vec![7; 64 << 10];
    (0..4).for_each(|_| guest.send(VIRTIO_VSOCK_OP_RW, Header::default(), &chunk));
    assert!(lock(&guest.muxer).connections.values().next().expect("connected").has_output());
    guest.send(VIRTIO_VSOCK_OP_RST, Header::default(), &[]);
    let mut received = Vec::new();
    host.read_to_end(&mut received).expect("read");
    assert_eq!(received.len(), 256 << 10);
}

#[test]
fn a_reset_drops_what_the_host_has_sent() {
    let mut guest = Guest::new();
    guest.offer_buffers(1, BUFFER_LEN);
    let mut host = guest.connect(1000);
    host.write_all(b"too late").expect("write");
    guest.socket_ready(EventSet::IN);
    guest.send(VIRTIO_VSOCK_OP_RST, Header::default(), &[]);
    assert!(lock(&guest.muxer).readable.is_empty());
    guest.offer_buffers(4, BUFFER_LEN);
    assert!(guest.operations().is_empty());
    assert!(host.read(&mut [0; 1]).is_ok_and(|len| len == 0) || host.write(b"x").is_err());
}

#[test]
fn buffers_that_are_too_small_are_given_back_empty() {
    let mut guest = Guest::new();
    guest.offer_buffers(1, BUFFER_LEN);
    let mut host = guest.connect(1000);
    host.write_all(b"data").expect("write");
    guest.offer_buffers(3, 20);
    guest.socket_ready(EventSet::IN);
    let given_back: Vec<_> = std::iter::from_fn(|| guest.rx.take_used()).map(|(_, len)| len).collect();
    assert_eq!(given_back, [0, 0, 0]);
    guest.offer_buffers(1, BUFFER_LEN);
    assert_eq!(guest.rx.take_used(), Some((4, HEADER_LEN + 4)));
}

#[test]
fn answers_that_nobody_takes_are_bounded() {
    let mut guest = Guest::new();
    (0..MAX_PENDING + 100).for_each(|_| guest.send(VIRTIO_VSOCK_OP_RW, Header::default(), &[]));
    assert_eq!(lock(&guest.muxer).pending.len(), MAX_PENDING);
}

#[test]
fn a_ring_that_lies_stops_the_device_until_its_reset() {
    let guest = Guest::new();
    guest.tx.claim(QUEUE_SIZE + 1);
    lock(&guest.muxer).on_event(TOKEN_TX, EventSet::IN);
    guest.rx.claim(0x8000);
    lock(&guest.muxer).on_event(TOKEN_RX, EventSet::IN);
    lock(&guest.muxer).stop();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_packet_panics(packets in prop::collection::vec((0_u16..9, any::<[u32; 4]>(), 0_usize..200), 1..40)) {
        let (mut guest, _host) = connected();
        for (op, [flags, buf_alloc, fwd_cnt, _], len) in packets {
            guest.send(op, Header { flags, buf_alloc, fwd_cnt, ..Header::default() }, &vec![1; len]);
            guest.socket_ready(EventSet::IN | EventSet::OUT);
            guest.received();
        }
        prop_assert!(lock(&guest.muxer).connections.len() <= 1);
    }

    #[test]
    fn no_chain_panics(
        descriptors in prop::collection::vec((any::<u64>(), any::<u32>(), 0_u16..8, 0_u16..80), 1..16),
        heads in prop::collection::vec(any::<u16>(), 1..8),
        into_rx in any::<bool>(),
    ) {
        let (mut guest, mut host) = connected();
        host.write_all(b"data").expect("write");
        let queue = if into_rx { &mut guest.rx } else { &mut guest.tx };
        for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
            // Half of the addresses lie in RAM.
            let address = if address % 2 == 0 { address % (64 << 20) } else { address };
            queue.describe(index, address, len, flags, next);
        }
        heads.into_iter().for_each(|head| queue.offer(head % 80));
        lock(&guest.muxer).on_event(TOKEN_TX, EventSet::IN);
        guest.socket_ready(EventSet::IN);
    }

    #[test]
    fn no_more_is_ever_in_flight_than_the_guest_has_room_for(
        steps in prop::collection::vec((1_usize..5000, 0_u32..5000), 1..30),
    ) {
        let mut guest = Guest::new();
        guest.offer_buffers(u64::from(QUEUE_SIZE), BUFFER_LEN);
        let buf_alloc = 4096;
        let mut host = guest.connect(buf_alloc);
        host.set_nonblocking(true).expect("non-blocking");
        let (mut received, mut read) = (0_u32, 0_u32);
        for (write_len, read_len) in steps {
            // What the socket does not take is not sent.
            let _ = host.write(&vec![1; write_len]);
            guest.socket_ready(EventSet::IN);
            received += guest.received().iter().map(|(.., payload)| u32::try_from(payload.len()).expect("short")).sum::<u32>();
            prop_assert!(received - read <= buf_alloc, "{} in flight", received - read);
            read += read_len.min(received - read);
            guest.send(VIRTIO_VSOCK_OP_CREDIT_UPDATE, Header { buf_alloc, fwd_cnt: read, ..Header::default() }, &[]);
        }
    }
}
