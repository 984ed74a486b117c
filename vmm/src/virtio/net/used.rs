//! The used ring (VIRTIO 1.2, 2.7.8) of a queue whose chains are given back many at once.
//!
//! The buffers of one received frame must appear together: a driver that sees the first looks for the others at once. The
//! `virtio-queue` crate publishes each chain alone, so the index is written here, once for each group.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use crate::virtio::GuestMemory;

/// Flags and index come before the elements (VIRTIO 1.2, 2.7.6 and 2.7.8).
const RING_HEADER_LEN: u64 = 4;
const INDEX_OFFSET: u64 = 2;
const ELEMENT_LEN: u64 = 8;
const VIRTQ_AVAIL_F_NO_INTERRUPT: u16 = 1;

/// What the driver has been told of.
#[derive(Debug, Default)]
pub(super) struct Used {
    /// Index of the ring at the last look at what the driver wants to hear.
    seen: u16,
}

impl Used {
    /// Gives chains back, by head and length written, all at once.
    pub(super) fn put(&self, queue: &mut Queue, memory: &GuestMemory, chains: &[(u16, u32)]) -> Result<(), Error> {
        let mut index = queue.next_used();
        for (head, len) in chains {
            let at = queue.used_ring() + RING_HEADER_LEN + u64::from(index % queue.size()) * ELEMENT_LEN;
            let element = u64::from(*len) << 32 | u64::from(*head);
            memory.write_obj(element.to_le(), GuestAddress(at)).map_err(Error::GuestMemory)?;
            index = index.wrapping_add(1);
        }
        queue.set_next_used(index);
        let at = GuestAddress(queue.used_ring() + INDEX_OFFSET);
        memory.store(index.to_le(), at, Ordering::Release).map_err(Error::GuestMemory)
    }

    /// Whether the driver wants an interrupt for what was put since the last call.
    pub(super) fn wants_interrupt(&mut self, queue: &Queue, memory: &GuestMemory) -> Result<bool, Error> {
        let (before, now) = (self.seen, queue.next_used());
        self.seen = now;
        if before == now {
            return Ok(false);
        }
        // The index is visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let word = |offset: u64| -> Result<u16, Error> {
            let at = GuestAddress(queue.avail_ring() + offset);
            memory.load(at, Ordering::Relaxed).map(u16::from_le).map_err(Error::GuestMemory)
        };
        if !queue.event_idx_enabled() {
            return Ok(word(0)? & VIRTQ_AVAIL_F_NO_INTERRUPT == 0);
        }
        let used_event = word(RING_HEADER_LEN + u64::from(queue.size()) * 2)?;
        Ok(passes(before, now, used_event))
    }
}

/// Whether the index has passed the event on its way from `before` to `now` (VIRTIO 1.2, 2.7.7.2): the event lies in before..now.
fn passes(before: u16, now: u16, event: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver::DriverQueue;

    /// Every event, for every way of up to 16 chains from the places around which an index wraps.
    #[test]
    fn exhaustive_an_event_is_passed_when_its_index_was_used() {
        let starts = (0..20).chain(u16::MAX - 20..=u16::MAX).chain(32_750..32_790);
        for (before, count) in starts.flat_map(|before| (0..=16).map(move |count| (before, count))) {
            let now = before.wrapping_add(count);
            let used: Vec<u16> = (0..count).map(|offset| before.wrapping_add(offset)).collect();
            assert!((0..=u16::MAX).all(|event| passes(before, now, event) == used.contains(&event)), "{before} {now}");
        }
    }

    #[test]
    fn chains_appear_in_order_and_the_event_decides_about_the_interrupt() {
        let memory = crate::memory::create(64).expect("memory");
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 4);
        let mut queue = driver.activate().queue;
        let mut used = Used::default();
        assert!(!used.wants_interrupt(&queue, &memory).expect("in RAM"));
        used.put(&mut queue, &memory, &[(2, 7), (0, 9)]).expect("in RAM");
        assert!(used.wants_interrupt(&queue, &memory).expect("in RAM"));
        assert_eq!((driver.take_used(), driver.take_used(), driver.take_used()), (Some((2, 7)), Some((0, 9)), None));

        // used_event of a queue of four is behind its four elements.
        queue.set_event_idx(true);
        let event = |index: u16| memory.write_obj(index, GuestAddress(0x1_1000 + 4 + 8)).expect("in RAM");
        event(4);
        used.put(&mut queue, &memory, &[(1, 1)]).expect("in RAM");
        assert!(!used.wants_interrupt(&queue, &memory).expect("in RAM"));
        used.put(&mut queue, &memory, &[(1, 1), (2, 2)]).expect("in RAM");
        assert!(used.wants_interrupt(&queue, &memory).expect("in RAM"));

        queue.set_event_idx(false);
        memory.write_obj(1_u16, GuestAddress(0x1_1000)).expect("in RAM");
        used.put(&mut queue, &memory, &[(3, 3)]).expect("in RAM");
        assert!(!used.wants_interrupt(&queue, &memory).expect("in RAM"));
    }
}
