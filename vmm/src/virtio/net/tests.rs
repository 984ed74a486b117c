//! The device as its driver sees it, with a socket as the host's side: frames, hostile rings, limits, the link.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};
use vmm_api::net::{MacAddress, RateLimit};

use super::*;
use crate::device_thread::DeviceThread;
use crate::jail::Jail;
use crate::virtio::driver::{DriverQueue, NEXT, WRITE};
use crate::virtio::{GuestMemory, Interrupt};

mod pairs;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const TX_BUFFER: u64 = 0x10_0000;
const RX_BUFFER: u64 = 0x20_0000;
const TABLE: u64 = 0x30_0000;
const MTU: u16 = 1500;
const HEADER: u32 = 12;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// A driver with its device and the host's side.
struct Driver {
    net: Net,
    memory: Arc<GuestMemory>,
    rx: DriverQueue,
    tx: DriverQueue,
    kicks: [vmm_sys_util::eventfd::EventFd; 2],
    host: UnixStream,
}

fn device() -> NetDevice {
    NetDevice {
        name: "eth0".to_owned(),
        mac: MacAddress(MAC),
        mtu: MTU,
        backend: BackendKind::Stream,
        rx_limit: RateLimit::default(),
        tx_limit: RateLimit::default(),
        only_from: None,
    }
}

impl Driver {
    fn new(device: NetDevice) -> Self {
        Self::with_rings(device, |_, _, _| ())
    }

    /// `prepare` sees the rings before the device does.
    fn with_rings(device: NetDevice, prepare: impl FnOnce(&GuestMemory, &mut DriverQueue, &mut DriverQueue)) -> Self {
        let memory = crate::memory::create(64).expect("memory");
        let (ours, host) = UnixStream::pair().expect("a socket pair");
        host.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let registry = Registry::create().expect("epoll");
        let mut net = Net::open(device, vec![ours.into()], registry).expect("a device");
        let mut rx = DriverQueue::new(&memory, 0x1_0000, 16);
        let mut tx = DriverQueue::new(&memory, 0x2_0000, 16);
        prepare(&memory, &mut rx, &mut tx);
        let queues = vec![rx.activate(), tx.activate()];
        let kicks = [0, 1].map(|index: usize| queues[index].kick.try_clone().expect("an eventfd"));
        let features = VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF | VIRTIO_NET_F_STATUS;
        let config_changed = Interrupt::unheard();
        let device_thread = DeviceThread::start(Jail::default()).expect("a thread");
        net.activate(Activation { memory: memory.clone(), features, queues, config_changed, device_thread })
            .expect("activated");
        Self { net, memory, rx, tx, kicks, host }
    }

    /// Puts a frame out, behind a header of zeros.
    fn transmit(&mut self, frame: &[u8]) {
        self.transmit_with([0; HEADER as usize], frame);
    }

    fn transmit_with(&mut self, header: [u8; HEADER as usize], frame: &[u8]) {
        let bytes = [&header[..], frame].concat();
        self.memory.write_slice(&bytes, GuestAddress(TX_BUFFER)).expect("in RAM");
        self.tx.put(&[(TX_BUFFER, u32::try_from(bytes.len()).expect("short"), false)]);
        self.kicks[1].write(1).expect("rung");
    }

    /// Offers a buffer for frames.
    fn offer(&mut self, address: u64, len: u32) {
        self.rx.put(&[(address, len, true)]);
        self.kicks[0].write(1).expect("rung");
    }

    /// The next frame that the host gets.
    fn host_receives(&mut self) -> Vec<u8> {
        let mut prefix = [0; 4];
        self.host.read_exact(&mut prefix).expect("a length");
        let mut frame = vec![0; u32::from_be_bytes(prefix) as usize];
        self.host.read_exact(&mut frame).expect("a frame");
        frame
    }

    fn host_sends(&mut self, frame: &[u8]) {
        let len = u32::try_from(frame.len()).expect("short").to_be_bytes();
        self.host.write_all(&[&len, frame].concat()).expect("sent");
    }

    fn wait_used(&mut self, queue: impl Fn(&mut Self) -> &mut DriverQueue) -> (u16, u32) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = queue(self).take_used() {
                return used;
            }
            assert!(Instant::now() < until, "the device gives nothing back");
            std::thread::yield_now();
        }
    }

    fn wait_stats(&self, holds: impl Fn(&NetStats) -> bool) -> NetStats {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let stats = self.net.handle().stats();
            if holds(&stats) {
                return stats;
            }
            assert!(Instant::now() < until, "{stats:?}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.net.reset();
    }
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &MAC, &[0x08, 0x00]].concat();
    frame.resize(len, 0x5a);
    frame
}

#[test]
fn a_frame_of_the_guest_reaches_the_host_whatever_its_descriptors() {
    let mut driver = Driver::new(device());
    driver.transmit(&frame(60));
    assert_eq!(driver.host_receives(), frame(60));
    let long = frame(1514);
    driver.memory.write_slice(&[0; 12], GuestAddress(TX_BUFFER)).expect("in RAM");
    driver.memory.write_slice(&long, GuestAddress(TX_BUFFER + 0x1000)).expect("in RAM");
    let base = TX_BUFFER + 0x1000;
    driver.tx.put(&[(TX_BUFFER, 5, false), (TX_BUFFER, 7, false), (base, 3, false), (base + 3, 1511, false)]);
    driver.kicks[1].write(1).expect("rung");
    assert_eq!(driver.host_receives(), long);
    let stats = driver.wait_stats(|stats| stats.tx_frames == 2);
    assert_eq!(stats.tx_bytes, 60 + 1514);
}

#[test]
fn a_chain_may_be_a_table_in_both_directions() {
    let mut driver = Driver::new(device());
    driver.memory.write_slice(&[&[0; 12][..], &frame(60)].concat(), GuestAddress(TX_BUFFER)).expect("in RAM");
    let buffers = [(TX_BUFFER, 12, false), (TX_BUFFER + 12, 20, false), (TX_BUFFER + 32, 40, false)];
    driver.tx.put_indirect(TABLE, &buffers);
    driver.kicks[1].write(1).expect("rung");
    assert_eq!(driver.host_receives(), frame(60));
    assert_eq!(driver.wait_used(|driver| &mut driver.tx), (0, 0));

    driver
        .rx
        .put_indirect(TABLE, &[(RX_BUFFER, 12, true), (RX_BUFFER + 0x1000, 40, true), (RX_BUFFER + 0x1028, 40, true)]);
    driver.kicks[0].write(1).expect("rung");
    driver.host_sends(&frame(70));
    assert_eq!(driver.wait_used(|driver| &mut driver.rx), (0, 82));
    let mut received = [0; 70];
    driver.memory.read_slice(&mut received, GuestAddress(RX_BUFFER + 0x1000)).expect("in RAM");
    assert_eq!(received[..], frame(70));
}

#[test]
fn a_frame_of_the_host_fills_as_many_buffers_as_it_needs() {
    let mut driver = Driver::new(device());
    for index in 0..3 {
        driver.offer(RX_BUFFER + index * 0x1000, 100);
    }
    driver.host_sends(&frame(200));
    let used: Vec<(u16, u32)> = (0..3).map(|_| driver.wait_used(|driver| &mut driver.rx)).collect();
    assert_eq!(used, [(0, 100), (1, 100), (2, 12)]);
    let mut header = [0; 12];
    driver.memory.read_slice(&mut header, GuestAddress(RX_BUFFER)).expect("in RAM");
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
}

#[test]
fn a_frame_waits_for_buffers_and_comes_whole_when_they_do() {
    let mut driver = Driver::new(device());
    driver.offer(RX_BUFFER, 100);
    driver.host_sends(&frame(150));
    driver.host_sends(&frame(60));
    driver.offer(RX_BUFFER + 0x1000, 100);
    assert_eq!(driver.wait_used(|driver| &mut driver.rx), (0, 100));
    assert_eq!(driver.wait_used(|driver| &mut driver.rx), (1, 62));
    driver.offer(RX_BUFFER, 100);
    assert_eq!(driver.wait_used(|driver| &mut driver.rx), (2, 72));
    assert_eq!(driver.net.handle().stats().rx_dropped, 0);
}

#[test]
fn what_breaks_the_standard_is_given_back_and_counted() {
    let mut driver = Driver::new(device());
    driver.transmit(&frame(13));
    driver.transmit(&frame(usize::from(MTU) + 19));
    let mut segmented = [0; 12];
    segmented[1] = 1;
    driver.transmit_with(segmented, &frame(60));
    let many: Vec<(u64, u32, bool)> = (0..16).map(|_| (TX_BUFFER, 0, false)).collect();
    driver.wait_stats(|stats| stats.tx_malformed == 3);
    driver.tx.put(&many);
    driver.tx.put(&[(TX_BUFFER, 100, true)]);
    driver.tx.put(&[(0xd000_0000, 100, false)]);
    driver.tx.put(&[(TX_BUFFER, u32::MAX, false)]);
    driver.kicks[1].write(1).expect("rung");
    let stats = driver.wait_stats(|stats| stats.tx_malformed == 7);
    assert_eq!(stats.tx_frames, 0);
    driver.transmit(&frame(60));
    assert_eq!(driver.host_receives(), frame(60));
}

#[test]
fn a_chain_without_an_end_ends() {
    let mut driver = Driver::new(device());
    driver.tx.describe(0, TX_BUFFER, 8, NEXT, 1);
    driver.tx.describe(1, TX_BUFFER, 8, NEXT, 0);
    driver.tx.offer(0);
    driver.rx.describe(0, RX_BUFFER, 1, NEXT | WRITE, 0);
    driver.rx.offer(0);
    driver.kicks[1].write(1).expect("rung");
    driver.host_sends(&frame(60));
    assert_eq!(driver.wait_used(|driver| &mut driver.tx).0, 0);
    driver.net.reset();
}

#[test]
fn a_spoofed_frame_is_counted_and_goes_nowhere() {
    let mut driver = Driver::new(NetDevice { only_from: Some(vec!["10.0.0.2".parse().expect("v4")]), ..device() });
    let mut own = frame(60);
    own[14 + 12..14 + 16].copy_from_slice(&[10, 0, 0, 2]);
    driver.transmit(&frame(60));
    driver.wait_stats(|stats| stats.tx_spoofed == 1);
    driver.transmit(&own);
    assert_eq!(driver.host_receives(), own);
}

#[test]
fn without_a_link_frames_are_dropped_and_the_status_says_so() {
    let mut driver = Driver::new(device());
    assert_eq!(driver.net.config()[6], 1);
    driver.net.handle().set_link(false);
    assert_eq!(driver.net.config()[6], 0);
    driver.transmit(&frame(60));
    driver.wait_stats(|stats| stats.tx_dropped == 1 && !stats.link_up);
    driver.net.handle().set_link(true);
    driver.transmit(&frame(61));
    assert_eq!(driver.host_receives(), frame(61));
}

#[test]
fn the_link_is_down_for_good_when_the_host_s_side_is_gone() {
    let mut driver = Driver::new(device());
    let (other, _) = UnixStream::pair().expect("a socket pair");
    drop(std::mem::replace(&mut driver.host, other));
    driver.wait_stats(|stats| !stats.link_up);
    driver.transmit(&frame(60));
    assert_eq!(driver.wait_used(|driver| &mut driver.tx).0, 0);
    driver.net.handle().set_link(true);
    assert!(!driver.net.handle().stats().link_up);
}

#[test]
fn a_limit_makes_the_guest_wait_and_loses_nothing() {
    let tx_limit = RateLimit { bytes_per_s: 0, frames_per_s: 20 };
    let mut driver = Driver::new(NetDevice { tx_limit, ..device() });
    let start = Instant::now();
    for len in 60..66 {
        driver.transmit(&frame(len));
        driver.host_receives();
    }
    // Two at once, then one each 50 ms.
    assert!(start.elapsed() >= Duration::from_millis(190), "{:?}", start.elapsed());
    assert!(driver.net.handle().stats().throttled > 0);
}

#[test]
fn a_peer_that_never_reads_holds_frames_in_the_ring_until_it_does() {
    let mut driver = Driver::new(NetDevice { mtu: u16::MAX - 100, ..device() });
    let long = frame(60_000);
    let mut given_back = 0;
    for _ in 0..16 {
        driver.transmit(&long);
    }
    while driver.tx.take_used().is_some() {
        given_back += 1;
    }
    let before = driver.wait_stats(|stats| stats.tx_frames > 0).tx_frames;
    assert!(before < 16 && given_back < 16);
    for _ in 0..16 {
        assert_eq!(driver.host_receives().len(), long.len());
    }
    driver.wait_stats(|stats| stats.tx_frames == 16);
}

#[test]
fn a_reset_gives_the_device_back_as_it_was() {
    let mut driver = Driver::new(device());
    driver.transmit(&frame(60));
    assert_eq!(driver.host_receives(), frame(60));
    driver.net.reset();
    let mut tx = DriverQueue::new(&driver.memory, 0x4_0000, 16);
    let rx = DriverQueue::new(&driver.memory, 0x3_0000, 16);
    driver.memory.write_slice(&[&[0; 12][..], &frame(70)].concat(), GuestAddress(TX_BUFFER)).expect("in RAM");
    tx.put(&[(TX_BUFFER, 82, false)]);
    let queues = vec![rx.activate(), tx.activate()];
    let kick = queues[1].kick.try_clone().expect("an eventfd");
    let (memory, config_changed) = (driver.memory.clone(), Interrupt::unheard());
    let device_thread = DeviceThread::start(Jail::default()).expect("a thread");
    let activation = Activation { memory, features: VIRTIO_F_VERSION_1, queues, config_changed, device_thread };
    driver.net.activate(activation).expect("activated again");
    kick.write(1).expect("rung");
    assert_eq!(driver.host_receives(), frame(70));
}

#[test]
fn descriptors_that_cannot_carry_frames_are_refused() {
    let registry = || Registry::create().expect("epoll");
    let file = || std::fs::File::open("/dev/null").expect("a file").into();
    let none = Net::open(device(), Vec::new(), registry()).err().expect("refused");
    assert!(matches!(none, NetError::DescriptorCount { count: 0 }), "{none}");
    let two = Net::open(device(), vec![file(), file()], registry()).err().expect("refused");
    assert!(matches!(two, NetError::DescriptorCount { count: 2 }), "{two}");
    let tap = NetDevice { backend: BackendKind::Tap, ..device() };
    let not_a_tap = Net::open(tap, vec![file()], registry()).err().expect("refused");
    assert!(matches!(not_a_tap, NetError::Backend(_)), "{not_a_tap}");
    let small = Net::open(NetDevice { mtu: 67, ..device() }, vec![file()], registry()).err().expect("refused");
    assert!(matches!(small, NetError::Mtu { mtu: 67 }), "{small}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn no_ring_panics_or_hangs(
        descriptors in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>()), 0..32),
        heads in prop::collection::vec(any::<u16>(), 0..20),
        claimed in any::<Option<u16>>(),
    ) {
        let mut driver = Driver::with_rings(device(), |_, rx, tx| {
            for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
                let queue = if index % 2 == 0 { &mut *rx } else { &mut *tx };
                queue.describe(index / 2, address % (80 << 20), len % 100_000, flags, next);
            }
            heads.iter().for_each(|head| rx.offer(*head));
            heads.iter().for_each(|head| tx.offer(*head));
            claimed.into_iter().for_each(|index| tx.claim(index));
        });
        driver.host_sends(&frame(1500));
        driver.host_sends(&frame(60));
        driver.kicks.iter().for_each(|kick| kick.write(1).expect("rung"));
        driver.net.reset();
    }
}

#[test]
fn vhost_net_takes_no_interface_that_somebody_must_look_at() {
    let limit = RateLimit { bytes_per_s: 1, frames_per_s: 0 };
    let vhost = || NetDevice { backend: BackendKind::Vhost, ..device() };
    let refusal = |device| {
        let fds = <[UnixStream; 2]>::from(UnixStream::pair().expect("a socket pair")).map(OwnedFd::from);
        Net::open(device, fds.into(), Registry::create().expect("epoll")).err().expect("refused")
    };
    for device in [
        NetDevice { rx_limit: limit, ..vhost() },
        NetDevice { tx_limit: limit, ..vhost() },
        NetDevice { only_from: Some(Vec::new()), ..vhost() },
    ] {
        assert!(matches!(refusal(device), NetError::Unchecked));
    }
    assert!(matches!(refusal(vhost()), NetError::Backend(_)), "a socket is no TAP interface");
}

#[test]
fn descriptors_are_counted_for_each_kind_of_interface() {
    assert_eq!(check_count(BackendKind::Tap, 8).ok(), Some(8));
    assert_eq!(check_count(BackendKind::Vhost, 16).ok(), Some(8));
    assert_eq!(check_count(BackendKind::Stream, 1).ok(), Some(1));
    for (backend, count) in [
        (BackendKind::Tap, 0),
        (BackendKind::Tap, 9),
        (BackendKind::Vhost, 0),
        (BackendKind::Vhost, 3),
        (BackendKind::Vhost, 18),
        (BackendKind::Stream, 2),
    ] {
        assert!(matches!(check_count(backend, count), Err(NetError::DescriptorCount { .. })), "{backend:?} {count}");
    }
}
