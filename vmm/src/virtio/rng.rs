//! Entropy device (VIRTIO 1.2, 5.4): fills buffers with random bytes of the host.

use std::borrow::Cow;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex};

use vm_memory::{Address as _, Bytes as _, GuestAddress};

use super::{ActivateError, Activation, ActiveQueue, GuestMemory, RING, VirtioDevice};
use crate::event_loop::{EventSet, EventSource, Registry, lock};

const VIRTIO_ID_RNG: u16 = 4;
const QUEUE_SIZE: u16 = 64;
/// Most bytes for one buffer; the driver asks for 64.
const MAX_BYTES: usize = 64 << 10;

/// The device; works on the event loop.
pub struct Rng {
    registry: Registry,
    active: Option<Arc<Mutex<ActiveRng>>>,
}

struct ActiveRng {
    memory: Arc<GuestMemory>,
    queue: ActiveQueue,
}

impl Rng {
    /// Makes the device.
    #[must_use]
    pub fn new(registry: Registry) -> Self {
        Self { registry, active: None }
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&[])
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.queues.into_iter().next().ok_or(ActivateError::QueueMissing { index: 0 })?;
        let fd = queue.kick.as_raw_fd();
        let active = Arc::new(Mutex::new(ActiveRng { memory: activation.memory, queue }));
        self.registry
            .add(fd, RING, 0, active.clone())
            .map_err(|source| ActivateError::Host { action: "watch the queue", source })?;
        self.active = Some(active);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            self.registry.remove(lock(&active).queue.kick.as_raw_fd());
        }
    }
}

impl EventSource for ActiveRng {
    fn on_event(&mut self, _token: u64, _ready: EventSet) {
        let Self { memory, queue } = self;
        queue.serve(memory, |chain| {
            chain.writable().next().map_or(0, |buffer| fill(memory, buffer.addr(), buffer.len()))
        });
    }
}

fn fill(memory: &GuestMemory, address: GuestAddress, len: u32) -> u32 {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(MAX_BYTES).min(MAX_BYTES)];
    let Ok(count) = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) else { return 0 };
    let written = memory.write_slice(&bytes[..count], address).is_ok();
    tracing::trace!(address = address.raw_value(), count, "entropy");
    if written { u32::try_from(count).unwrap_or(0) } else { 0 }
}

#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    use super::{driver::DriverQueue, fuzz};

    let memory = fuzz::memory();
    let mut driver = DriverQueue::fuzzed(&memory, 0);
    let mut device = ActiveRng { memory: memory.clone(), queue: driver.activate_fuzzed(data.len().is_multiple_of(2)) };
    for step in fuzz::steps(data) {
        driver.make(&step, &memory);
        device.on_event(0, EventSet::IN);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::driver::{DriverQueue, NEXT, WRITE};
    use super::*;

    fn device() -> (ActiveRng, DriverQueue) {
        let memory = crate::memory::create(64).expect("memory");
        let driver = DriverQueue::new(&memory, 0x1_0000, 16);
        (ActiveRng { memory, queue: driver.activate() }, driver)
    }

    #[test]
    fn a_buffer_is_filled() {
        let (mut device, mut driver) = device();
        let head = driver.put(&[(0x10_0000, 64, true)]);
        device.on_event(0, EventSet::IN);
        assert_eq!(driver.take_used(), Some((head, 64)));
        let mut bytes = [0; 64];
        device.memory.read_slice(&mut bytes, GuestAddress(0x10_0000)).expect("in RAM");
        assert_ne!(bytes, [0; 64]);
    }

    #[test]
    fn a_buffer_that_cannot_be_written_is_given_back_empty_and_a_huge_one_is_filled_in_part() {
        let (mut device, mut driver) = device();
        driver.put(&[(0xd000_0000, 64, true)]);
        driver.put(&[(0x10_0000, 64, false)]);
        driver.put(&[(0x10_0000, 1 << 20, true)]);
        device.on_event(0, EventSet::IN);
        let lens: Vec<_> = std::iter::from_fn(|| driver.take_used()).map(|(_, len)| len).collect();
        assert_eq!(lens, [0, 0, 64 << 10]);
    }

    #[test]
    fn a_chain_without_an_end_ends() {
        let (mut device, mut driver) = device();
        driver.describe(0, 0x10_0000, 8, NEXT, 1);
        driver.describe(1, 0x10_0000, 8, NEXT, 0);
        driver.offer(0);
        driver.describe(2, 0x10_0000, 8, NEXT | WRITE, 2);
        driver.offer(2);
        device.on_event(0, EventSet::IN);
        assert_eq!((driver.take_used(), driver.take_used()), (Some((0, 0)), Some((2, 8))));
    }

    /// Each flag with each successor, in three descriptors of four: every chain that there is.
    #[test]
    fn exhaustive_every_chain_of_three_descriptors_is_given_back_once() {
        let (mut device, mut driver) = device();
        let shapes: Vec<(u16, u16)> = (0..8).flat_map(|flags| (0..5).map(move |next| (flags, next))).collect();
        // A length of its own for each, so that what is filled tells which.
        let describe = |driver: &DriverQueue, index: u16, (flags, next): (u16, u16)| {
            driver.describe(index, 0x10_0000, 16 << index, flags, next);
        };
        for first in &shapes {
            describe(&driver, 0, *first);
            for second in &shapes {
                describe(&driver, 1, *second);
                for third in &shapes {
                    describe(&driver, 2, *third);
                    driver.offer(0);
                    device.on_event(0, EventSet::IN);
                    let (head, len) = driver.take_used().expect("given back");
                    assert!(head == 0 && [0, 16, 32, 64].contains(&len), "{first:?} {second:?} {third:?}: {len}");
                    assert_eq!(driver.take_used(), None);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn no_ring_panics(
            descriptors in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>()), 0..16),
            heads in prop::collection::vec(any::<u16>(), 0..20),
            claimed in any::<Option<u16>>(),
        ) {
            let (mut device, mut driver) = device();
            for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
                driver.describe(index, address % (128 << 20), len, flags, next);
            }
            heads.into_iter().for_each(|head| driver.offer(head));
            claimed.into_iter().for_each(|index| driver.claim(index));
            device.on_event(0, EventSet::IN);
        }
    }
}
