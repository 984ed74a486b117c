//! What a driver without rules does to a device's rings, made from a fuzzer's bytes; and what every fuzz target of a device needs.

use std::sync::{Arc, LazyLock};

use arbitrary::{Arbitrary, Unstructured};
use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryRegion as _};

use super::driver::DriverQueue;
use super::{ActiveQueue, GuestMemory};
use crate::device_thread::DeviceThread;
use crate::jail::Jail;

/// Guest RAM, in MiB.
const RAM_MIB: u32 = 4;
/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 16;
/// Most steps of one input.
const MAX_STEPS: usize = 100;
/// Where the rings of the first queue are; those of the others follow.
const RINGS: u64 = 0x1_0000;
const RINGS_LEN: u64 = 0x1_0000;
/// Where buffers are that the driver means as such.
const BUFFERS: u64 = 0x10_0000;

/// Where devices are started and reset; one for all inputs.
pub(crate) static DEVICE_THREAD: LazyLock<DeviceThread> =
    LazyLock::new(|| DeviceThread::start(Jail::default()).expect("a thread"));

/// A guest-physical address.
#[derive(Arbitrary, Debug)]
pub(crate) enum Place {
    /// In a buffer.
    Buffer(u16),
    /// In the rings of some queue.
    Rings(u16),
    /// Around the end of RAM.
    End(i8),
    /// Anywhere.
    Any(u64),
}

impl Place {
    pub(crate) fn address(&self) -> u64 {
        match *self {
            Self::Buffer(offset) => BUFFERS + u64::from(offset),
            Self::Rings(offset) => RINGS + u64::from(offset),
            Self::End(offset) => (u64::from(RAM_MIB) << 20).wrapping_add_signed(offset.into()),
            Self::Any(address) => address,
        }
    }
}

/// One thing that a driver does with a queue.
#[derive(Arbitrary, Debug)]
pub(crate) enum Move {
    /// Offers a chain that follows the rules: place, length, whether the device writes.
    Put(Vec<(Place, u16, bool)>),
    /// Writes a descriptor.
    Describe { index: u8, place: Place, len: u32, flags: u16, next: u16 },
    /// Offers a chain that begins anywhere.
    Offer(u16),
    /// Says how many chains it has offered.
    Claim(u16),
    /// Writes anywhere.
    Write { place: Place, bytes: Vec<u8> },
}

impl DriverQueue {
    /// Queue `index` of a fuzzed device.
    pub(crate) fn fuzzed(memory: &Arc<GuestMemory>, index: u64) -> Self {
        Self::new(memory, RINGS + index * RINGS_LEN, QUEUE_SIZE)
    }

    /// The device's side, with event indices or without.
    pub(crate) fn activate_fuzzed(&self, event_idx: bool) -> ActiveQueue {
        let mut active = self.activate();
        virtio_queue::QueueT::set_event_idx(&mut active.queue, event_idx);
        active
    }

    pub(crate) fn make(&mut self, step: &Move, memory: &GuestMemory) {
        match step {
            Move::Put(buffers) => {
                let buffers: Vec<_> = buffers.iter().map(|(at, len, w)| (at.address(), u32::from(*len), *w)).collect();
                self.put(&buffers);
            }
            Move::Describe { index, place, len, flags, next } => {
                self.describe(u16::from(*index) % QUEUE_SIZE, place.address(), *len, *flags, *next);
            }
            Move::Offer(head) => self.offer(*head),
            Move::Claim(index) => self.claim(*index),
            Move::Write { place, bytes } => {
                // Outside of RAM there is nothing to write to.
                let _ = memory.write_slice(bytes, GuestAddress(place.address()));
            }
        }
    }
}

/// Guest RAM of one input, all zeros. It is mapped once in each thread, for it stays mapped as long as the process lives.
pub(crate) fn memory() -> Arc<GuestMemory> {
    thread_local! {
        static RAM: Arc<GuestMemory> = crate::memory::create(RAM_MIB).expect("memory");
    }
    let ram = RAM.with(Arc::clone);
    for region in ram.iter() {
        let file = region.file_offset().expect("a file").file();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, 0, region.len()).expect("a file of memory");
    }
    ram
}

/// Reads one step after another until the bytes are used up.
pub(crate) fn steps<'a, S: Arbitrary<'a> + 'a>(data: &'a [u8]) -> impl Iterator<Item = S> + 'a {
    let mut unread = Unstructured::new(data);
    let next = move || if unread.is_empty() { None } else { unread.arbitrary().ok() };
    std::iter::from_fn(next).take(MAX_STEPS)
}
