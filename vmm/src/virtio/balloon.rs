//! Memory balloon (VIRTIO 1.2, 5.5), for free page reporting only: the guest says which of its pages are free, and the host takes them
//! back until they are touched again. The balloon itself stays empty: what its two queues are given is given back.

use std::borrow::Cow;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex};

use virtio_queue::QueueT as _;

use super::{ActivateError, Activation, ActiveQueue, GuestMemory, RING, SHARED_VECTORS, VirtioDevice};
use crate::event_loop::{EventSet, EventSource, Registry, lock};
use crate::memory::take_back;

const VIRTIO_ID_BALLOON: u16 = 5;
const VIRTIO_BALLOON_F_PAGE_REPORTING: u64 = 1 << 5;
/// To inflate, to deflate, and to report. Linux numbers the queues that there are, so no queue of statistics or hints lies between.
const QUEUE_SIZES: [u16; 3] = [16, 16, 64];
const REPORTING_QUEUE: usize = 2;
/// Most runs of pages of one report, as many as Linux has in one (`PAGE_REPORTING_CAPACITY`); the rest stays the guest's.
const MAX_RUNS: usize = 32;
/// `virtio_balloon_config` (VIRTIO 1.2, 5.5.4): the host wants no page, and has none.
const CONFIG: [u8; 8] = [0; 8];

/// The device; works on the event loop.
pub struct Balloon {
    registry: Registry,
    active: Vec<Arc<Mutex<ActiveBalloonQueue>>>,
}

struct ActiveBalloonQueue {
    memory: Arc<GuestMemory>,
    queue: ActiveQueue,
    reports: bool,
}

impl Balloon {
    /// Makes the device.
    #[must_use]
    pub fn new(registry: Registry) -> Self {
        Self { registry, active: Vec::new() }
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn vectors(&self) -> usize {
        SHARED_VECTORS
    }

    fn features(&self) -> u64 {
        VIRTIO_BALLOON_F_PAGE_REPORTING
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&CONFIG)
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, .. } = activation;
        for (index, queue) in queues.into_iter().enumerate().filter(|(_, queue)| queue.queue.ready()) {
            let reports = index == REPORTING_QUEUE && features & VIRTIO_BALLOON_F_PAGE_REPORTING != 0;
            let fd = queue.kick.as_raw_fd();
            let active = Arc::new(Mutex::new(ActiveBalloonQueue { memory: memory.clone(), queue, reports }));
            self.registry
                .add(fd, RING, 0, active.clone())
                .map_err(|source| ActivateError::Host { action: "watch a queue", source })?;
            self.active.push(active);
        }
        Ok(())
    }

    fn reset(&mut self) {
        for active in self.active.drain(..) {
            self.registry.remove(lock(&active).queue.kick.as_raw_fd());
        }
    }
}

impl EventSource for ActiveBalloonQueue {
    fn on_event(&mut self, _token: u64, _ready: EventSet) {
        let Self { memory, queue, reports } = self;
        queue.serve(memory, |chain| {
            if *reports {
                // Each is a run of free pages (VIRTIO 1.2, 5.5.6.7). What is no page of RAM is nobody's to take.
                chain.writable().take(MAX_RUNS).for_each(|pages| take_back(memory, pages.addr(), pages.len()));
            }
            0
        });
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    use super::{driver::DriverQueue, fuzz};

    let memory = fuzz::memory();
    let mut driver = DriverQueue::fuzzed(&memory, 0);
    let queue = driver.activate_fuzzed(data.len().is_multiple_of(2));
    let mut device = ActiveBalloonQueue { memory: memory.clone(), queue, reports: true };
    for step in fuzz::steps(data) {
        driver.make(&step, &memory);
        device.on_event(0, EventSet::IN);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes as _, GuestAddress};

    use super::super::driver::DriverQueue;
    use super::*;
    use crate::memory::create;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 0x10_0000;

    fn device(reports: bool) -> (ActiveBalloonQueue, DriverQueue) {
        let memory = create(64).expect("memory");
        // Four pages that are in use.
        memory.write_slice(&[7; 4 * 4096], GuestAddress(PAGES)).expect("in RAM");
        let driver = DriverQueue::new(&memory, 0x1_0000, 16);
        (ActiveBalloonQueue { memory, queue: driver.activate(), reports }, driver)
    }

    /// Which of the four pages have still what was written to them.
    fn kept(device: &ActiveBalloonQueue) -> [bool; 4] {
        [0, 1, 2, 3].map(|page| {
            let byte: u8 = device.memory.read_obj(GuestAddress(PAGES + page * PAGE + 1)).expect("in RAM");
            byte == 7
        })
    }

    #[test]
    fn reported_pages_are_taken_back_and_no_others() {
        let (mut device, mut driver) = device(true);
        let head = driver.put(&[(PAGES + PAGE, 4096, true), (PAGES + 3 * PAGE, 4096, true)]);
        device.on_event(0, EventSet::IN);
        assert_eq!((driver.take_used(), kept(&device)), (Some((head, 0)), [true, false, true, false]));
    }

    #[test]
    fn parts_of_pages_and_what_is_not_reported_stay() {
        let (mut device, mut driver) = device(true);
        // Only the third page lies in it as a whole.
        driver.put(&[(PAGES + PAGE + 8, 2 * 4096, true)]);
        // Not for us to write to, not RAM, beyond its end, and nothing at all.
        for (address, len, writable) in
            [(PAGES, 4096, false), (0xd000_0000, 4096, true), (63 << 20, 2 << 20, true), (PAGES, 0, true)]
        {
            driver.put(&[(address, len, writable)]);
        }
        device.on_event(0, EventSet::IN);
        assert_eq!(std::iter::from_fn(|| driver.take_used()).count(), 5);
        assert_eq!(kept(&device), [true, true, false, true]);
    }

    #[test]
    fn a_report_without_an_end_is_not_followed() {
        let (mut device, mut driver) = device(true);
        let many = vec![(0xd000_0000, 4096, true); MAX_RUNS - 1];
        let last = [(PAGES, 4096, true), (PAGES + PAGE, 4096, true)];
        driver.put_indirect(0x20_0000, &[&many[..], &last].concat());
        device.on_event(0, EventSet::IN);
        assert_eq!((driver.take_used(), kept(&device)), (Some((0, 0)), [false, true, true, true]));
    }

    #[test]
    fn a_balloon_that_is_filled_takes_nothing() {
        let (mut device, mut driver) = device(false);
        driver.put(&[(PAGES, 4096, true)]);
        device.on_event(0, EventSet::IN);
        assert_eq!((driver.take_used(), kept(&device)), (Some((0, 0)), [true; 4]));
    }
}
