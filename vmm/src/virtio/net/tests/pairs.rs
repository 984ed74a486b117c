//! Several pairs, with a host that takes the headers as well, as a TAP interface does: offloads, the link, limits of all together.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::Receiver;

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::event_loop::EventSource as _;
use crate::virtio::net::backend::Frame;
use crate::virtio::net::header::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

const COMMAND: u64 = 0x30_0000;
const OFFLOADS: u64 = VIRTIO_NET_F_CSUM | VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6 | VIRTIO_NET_F_HOST_USO;
const NO_OFFLOAD: [u8; HEADER as usize] = [0; HEADER as usize];

/// A frame and its header in each datagram.
struct Datagrams(UnixDatagram);

impl Backend for Datagrams {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
    fn features(&self) -> u64 {
        OFFLOADS
    }
    fn set_features(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }
    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }
    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.0.recv(frame)
    }
    fn send(&mut self, frame: &Frame<'_>) -> io::Result<()> {
        let mut bytes = frame.head.to_vec();
        for (address, len) in frame.rest {
            let at = bytes.len();
            bytes.resize(at + *len as usize, 0);
            frame.memory.read_slice(&mut bytes[at..], *address).expect("in RAM");
        }
        self.0.send(&bytes).map(drop)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn is_behind(&self) -> bool {
        false
    }
}

/// A driver of all pairs, and the host's side of each.
struct Interface {
    net: Net,
    memory: Arc<GuestMemory>,
    pairs: Vec<DriverPair>,
    control: DriverQueue,
    config_changes: Receiver<(u64, u32)>,
    hosts: Vec<UnixDatagram>,
}

struct DriverPair {
    rx: DriverQueue,
    tx: DriverQueue,
    kicks: [EventFd; 2],
}

impl Interface {
    fn new(device: NetDevice, pair_count: usize) -> Self {
        let memory = crate::memory::create(64).expect("memory");
        let (mut backends, mut hosts) = (Vec::<Box<dyn Backend>>::new(), Vec::new());
        for _ in 0..pair_count {
            let (ours, host) = UnixDatagram::pair().expect("a socket pair");
            ours.set_nonblocking(true).expect("a socket");
            host.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
            backends.push(Box::new(Datagrams(ours)));
            hosts.push(host);
        }
        let net = Net::new(device, pair_count, backends, None, Registry::create().expect("epoll"));
        let control = DriverQueue::new(&memory, 0, 16);
        let (_, config_changes) = Interrupt::heard();
        let mut interface = Self { net, memory, pairs: Vec::new(), control, config_changes, hosts };
        interface.activate();
        interface
    }

    /// Starts the device with new rings, all features, and one pair in use.
    fn activate(&mut self) {
        let ring = |index: u64| DriverQueue::new(&self.memory, 0x1_0000 + index * 0x4000, 16);
        let count = u64::try_from(self.hosts.len()).expect("at most 8");
        self.memory.write_slice(&[0; 0x8_0000], GuestAddress(0x1_0000)).expect("in RAM");
        let mut queues = Vec::new();
        let mut pair = |index: u64| {
            let (rx, tx) = (ring(index * 2), ring(index * 2 + 1));
            let (rx_queue, tx_queue) = (rx.activate(), tx.activate());
            let kicks = [&rx_queue, &tx_queue].map(|queue| queue.kick.try_clone().expect("an eventfd"));
            queues.extend([rx_queue, tx_queue]);
            DriverPair { rx, tx, kicks }
        };
        self.pairs = (0..count).map(&mut pair).collect();
        self.control = ring(count * 2);
        queues.push(self.control.activate());
        let (config_changed, config_changes) = Interrupt::heard();
        self.config_changes = config_changes;
        let features = VIRTIO_F_VERSION_1 | self.net.features();
        let device_thread = DeviceThread::start(Jail::default()).expect("a thread");
        let memory = self.memory.clone();
        let activation = Activation { memory, features, queues, config_changed, device_thread };
        self.net.activate(activation).expect("activated");
    }

    /// Has the device use so many pairs (VIRTIO 1.2, 5.1.6.5.5); returns its answer.
    fn use_pairs(&mut self, count: u8) -> u8 {
        self.memory.write_slice(&[4, 0, count, 0, 0xff], GuestAddress(COMMAND)).expect("in RAM");
        self.control.put(&[(COMMAND, 4, false), (COMMAND + 4, 1, true)]);
        let control = self.net.control.clone().expect("a control queue");
        lock(&control).on_event(0, RING);
        self.memory.read_obj(GuestAddress(COMMAND + 4)).expect("in RAM")
    }

    fn transmit(&mut self, index: usize, header: [u8; HEADER as usize], frame: &[u8]) {
        let (bytes, address) = ([&header[..], frame].concat(), TX_BUFFER + index as u64 * 0x1_0000);
        self.memory.write_slice(&bytes, GuestAddress(address)).expect("in RAM");
        let pair = &mut self.pairs[index];
        pair.tx.put(&[(address, u32::try_from(bytes.len()).expect("short"), false)]);
        pair.kicks[1].write(1).expect("rung");
    }

    /// The next frame that the host gets, behind its header.
    fn host_receives(&self, index: usize) -> Vec<u8> {
        let mut bytes = vec![0; 0x1_0000];
        let len = self.hosts[index].recv(&mut bytes).expect("a frame");
        bytes.truncate(len);
        bytes
    }

    fn host_sends(&self, index: usize, frame: &[u8]) {
        self.hosts[index].send(&[&NO_OFFLOAD[..], frame].concat()).expect("sent");
    }

    fn offer(&mut self, index: usize, len: u32) {
        let pair = &mut self.pairs[index];
        pair.rx.put(&[(RX_BUFFER + index as u64 * 0x1_0000, len, true)]);
        pair.kicks[0].write(1).expect("rung");
    }

    /// The next frame that the guest gets, of one buffer.
    fn guest_receives(&mut self, index: usize) -> Vec<u8> {
        let until = Instant::now() + Duration::from_secs(10);
        let used = loop {
            if let Some(used) = self.pairs[index].rx.take_used() {
                break used;
            }
            assert!(Instant::now() < until, "the device gives nothing back");
            std::thread::yield_now();
        };
        let mut frame = vec![0; (used.1 - HEADER) as usize];
        let address = RX_BUFFER + index as u64 * 0x1_0000 + u64::from(HEADER);
        self.memory.read_slice(&mut frame, GuestAddress(address)).expect("in RAM");
        frame
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        self.net.reset();
    }
}

#[test]
fn each_of_eight_pairs_carries_frames_both_ways() {
    let mut interface = Interface::new(device(), 8);
    assert_eq!([8, 9, 0].map(|count| interface.use_pairs(count)), [0, 1, 1]);
    for index in 0..8 {
        interface.transmit(index, NO_OFFLOAD, &frame(60 + index));
        interface.offer(index, 200);
        interface.host_sends(index, &frame(100 + index));
    }
    for index in 0..8 {
        assert_eq!(interface.host_receives(index)[NO_OFFLOAD.len()..], frame(60 + index));
        assert_eq!(interface.guest_receives(index), frame(100 + index));
    }
    let stats = interface.net.handle().stats();
    assert_eq!((stats.tx_dropped, stats.tx_malformed, stats.rx_dropped), (0, 0, 0));
}

#[test]
fn a_pair_that_the_driver_does_not_use_gets_no_frames() {
    let mut interface = Interface::new(device(), 2);
    interface.offer(0, 200);
    interface.offer(1, 200);
    interface.host_sends(1, &frame(61));
    interface.host_sends(0, &frame(60));
    assert_eq!(interface.guest_receives(0), frame(60));
    assert_eq!(interface.pairs[1].rx.take_used(), None);
    assert_eq!(interface.use_pairs(2), 0);
    assert_eq!(interface.guest_receives(1), frame(61));
}

#[test]
fn frames_that_the_host_cuts_pass_with_their_headers() {
    // Flags, kind, length of the headers, size of a segment, start and offset of the checksum.
    const TCP_V4: [u8; 12] = [1, 1, 54, 0, 0xa8, 0x05, 34, 0, 16, 0, 0, 0];
    const TCP_V6: [u8; 12] = [1, 4, 74, 0, 0x94, 0x05, 54, 0, 16, 0, 0, 0];
    const UDP_V4: [u8; 12] = [1, 5, 42, 0, 0xc0, 0x05, 34, 0, 6, 0, 0, 0];
    let mut interface = Interface::new(device(), 1);
    for header in [TCP_V4, TCP_V6, UDP_V4] {
        interface.transmit(0, header, &frame(60_000));
        assert!(interface.host_receives(0) == [&header[..], &frame(60_000)].concat(), "{header:?}");
    }
    interface.transmit(0, NO_OFFLOAD, &frame(60_000));
    interface.transmit(0, NO_OFFLOAD, &frame(60));
    assert_eq!(interface.host_receives(0).len(), 72, "nobody cuts the one before");
    assert_eq!(interface.net.handle().stats().tx_malformed, 1);
}

#[test]
fn a_change_of_the_link_is_in_the_status_and_interrupts() {
    let interface = Interface::new(device(), 1);
    let status = || [interface.net.config()[6], interface.net.config()[7]];
    assert!(status() == [1, 0] && interface.config_changes.try_recv().is_err());
    interface.net.handle().set_link(false);
    interface.config_changes.try_recv().expect("an interrupt");
    assert_eq!(status(), [0, 0]);
    interface.net.handle().set_link(true);
    interface.config_changes.try_recv().expect("an interrupt");
    assert_eq!(status(), [1, 0]);
}

#[test]
fn pairs_share_a_limit_of_frames() {
    let tx_limit = RateLimit { bytes_per_s: 0, frames_per_s: 20 };
    let mut interface = Interface::new(NetDevice { tx_limit, ..device() }, 2);
    let start = Instant::now();
    for index in [0, 1, 0, 1, 0, 1, 0, 1] {
        interface.transmit(index, NO_OFFLOAD, &frame(60));
    }
    for index in [0, 1, 0, 1, 0, 1, 0, 1] {
        interface.host_receives(index);
    }
    // Two at once, one more when both look at the same time, then one each 50 ms. With a limit each it would take 100 ms.
    assert!(start.elapsed() >= Duration::from_millis(250), "{:?}", start.elapsed());
}

#[test]
fn pairs_share_a_limit_of_bytes_in_each_direction() {
    let limit = RateLimit { bytes_per_s: 10_000, frames_per_s: 0 };
    let mut interface = Interface::new(NetDevice { rx_limit: limit, tx_limit: limit, ..device() }, 2);
    assert_eq!(interface.use_pairs(2), 0);
    let least = Duration::from_millis(300);
    let start = Instant::now();
    for index in [0, 1, 0, 1, 0, 1] {
        interface.transmit(index, NO_OFFLOAD, &frame(1000));
    }
    for index in [0, 1, 0, 1, 0, 1] {
        interface.host_receives(index);
    }
    // 1000 bytes at once and a frame too many of each pair, then the debt of them all.
    assert!(start.elapsed() >= least, "the guest sends: {:?}", start.elapsed());

    let start = Instant::now();
    for index in [0, 1, 0, 1, 0, 1] {
        interface.offer(index, 1100);
        interface.host_sends(index, &frame(1000));
    }
    for index in [0, 1, 0, 1, 0, 1] {
        interface.guest_receives(index);
    }
    assert!(start.elapsed() >= least, "the guest receives: {:?}", start.elapsed());
}

#[test]
fn a_reset_forgives_no_debt() {
    let tx_limit = RateLimit { bytes_per_s: 5000, frames_per_s: 0 };
    let mut interface = Interface::new(NetDevice { tx_limit, ..device() }, 1);
    let start = Instant::now();
    interface.transmit(0, NO_OFFLOAD, &frame(1500));
    interface.host_receives(0);
    interface.net.reset();
    interface.activate();
    interface.transmit(0, NO_OFFLOAD, &frame(1500));
    interface.host_receives(0);
    // 500 bytes at once, a debt of 1000.
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
}
