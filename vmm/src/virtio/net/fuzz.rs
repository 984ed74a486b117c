//! The network device between a driver and a host, both without rules. Works on the queues without their threads.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;

use super::backend::{Frame, MAX_FRAME_LEN};
use super::header::HEADER_LEN;
use super::*;
use crate::virtio::driver::DriverQueue;
use crate::virtio::fuzz::{Move, memory, steps};
use crate::virtio::{GuestMemory, Interrupt};

const MTU: u16 = 1500;

#[derive(Arbitrary, Debug)]
enum TxStep {
    Ring(Move),
    Features(u64),
    HostReads(u16),
}

/// Frames of a guest, for a host that reads now and then.
pub(crate) fn tx(data: &[u8]) {
    let memory = memory();
    let mut driver = DriverQueue::fuzzed(&memory, 0);
    let (ours, mut host) = UnixStream::pair().expect("a socket pair");
    host.set_nonblocking(true).expect("a socket");
    let mut stream = Stream::open(ours.into()).expect("a stream");
    let only_from = vec!["10.0.0.2".parse().expect("an address")];
    let guard = data.len().is_multiple_of(4).then(|| SpoofGuard::new(vmm_api::net::MacAddress([2; 6]), only_from));
    let mut tx = Tx::new(driver.activate_fuzzed(data.len().is_multiple_of(2)), u64::MAX, MTU, guard);
    for step in steps(data) {
        match step {
            TxStep::Ring(step) => driver.make(&step, &memory),
            TxStep::Features(features) => tx.features = features,
            TxStep::HostReads(len) => drop(host.read(&mut vec![0; len.into()])),
        }
        let mut checked = Checked { stream: &mut stream, features: tx.features };
        // A ring that is refused is an outcome like others.
        let _ = tx.send_next(&memory, &mut checked, true);
        let _ = tx.notify(&memory);
    }
}

/// A back end that looks at what it is given.
struct Checked<'a> {
    stream: &'a mut Stream,
    features: u64,
}

impl Backend for Checked<'_> {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.stream.fd()
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn set_features(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }
    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }
    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.stream.receive(frame)
    }
    fn send(&mut self, frame: &Frame<'_>) -> io::Result<()> {
        let word = |at: usize| usize::from(u16::from_le_bytes([frame.head[at], frame.head[at + 1]]));
        let (needs_csum, gso_type, frame_len) = (frame.head[0], frame.head[1], frame.len() - HEADER_LEN);
        assert!(frame.len() <= MAX_FRAME_LEN && needs_csum <= 1);
        assert!(needs_csum == 0 || word(6) + word(8) + 2 <= frame_len, "the checksum lies in the frame");
        assert!(gso_type != 0 || frame_len <= usize::from(MTU) + 18, "the host cuts nothing that was not asked for");
        self.stream.send(frame)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
    fn is_behind(&self) -> bool {
        self.stream.is_behind()
    }
}

#[derive(Arbitrary, Debug)]
enum RxStep {
    Ring(Move),
    Frame(u16),
    AskForBuffers,
}

/// Frames of a host, for a guest whose buffers may be anything.
pub(crate) fn rx(data: &[u8]) {
    let memory = memory();
    let mut driver = DriverQueue::fuzzed(&memory, 0);
    let mut rx = Rx::new(driver.activate_fuzzed(data.len().is_multiple_of(2)), data.len() % 4 < 2);
    for step in steps(data) {
        match step {
            RxStep::Ring(step) => driver.make(&step, &memory),
            RxStep::Frame(len) => {
                let len = usize::from(len).max(HEADER_LEN + 14);
                rx.frame_buffer()[..len].fill(0x5a);
                rx.set_frame(len);
            }
            RxStep::AskForBuffers => drop(rx.ask_for_buffers(&memory)),
        }
        if rx.has_frame() {
            // A ring that is refused is an outcome like others.
            let _ = rx.deliver(&memory);
            let _ = rx.notify(&memory);
        }
    }
}

/// What a host's program writes to the stream: lengths and frames.
pub(crate) fn stream(data: &[u8]) {
    let (ours, mut host) = UnixStream::pair().expect("a socket pair");
    let mut stream = Stream::open(ours.into()).expect("a stream");
    let mut frame = vec![0; MAX_FRAME_LEN];
    // In pieces, so that frames come in parts too.
    for piece in data.chunks(usize::from(data.first().copied().unwrap_or(0)) + 1) {
        host.write_all(piece).expect("it is read at once");
        loop {
            match stream.receive(&mut frame) {
                Ok(len) => assert!((HEADER_LEN..=MAX_FRAME_LEN).contains(&len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // A worker gives the stream up then.
                Err(_) => return,
            }
        }
    }
}

/// Commands of a driver.
pub(crate) fn control(data: &[u8]) {
    let memory: Arc<GuestMemory> = memory();
    let mut driver = DriverQueue::fuzzed(&memory, 0);
    let (queue, shared) = (driver.activate_fuzzed(data.len().is_multiple_of(2)), Arc::new(Shared::default()));
    shared.connect(Interrupt::unheard());
    let mut control = ControlQueue { memory: memory.clone(), queue, shared: shared.clone(), max_pairs: 4 };
    for step in steps(data) {
        let step: Move = step;
        driver.make(&step, &memory);
        crate::event_loop::EventSource::on_event(&mut control, 0, RING);
        assert!(shared.active_pairs() <= 4);
    }
}
