//! The driver's side of a queue, for tests: rings and descriptors in guest RAM, as a guest lays them out or breaks them.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ActiveQueue, GuestMemory, Interrupt};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
const DESCRIPTOR_LEN: u64 = 16;

/// A queue of `size` descriptors at `base`: table, available ring and used ring, a page each.
pub(crate) struct DriverQueue {
    memory: Arc<GuestMemory>,
    base: u64,
    size: u16,
    next_descriptor: u16,
    offered: u16,
    seen: u16,
}

impl DriverQueue {
    pub(crate) fn new(memory: &Arc<GuestMemory>, base: u64, size: u16) -> Self {
        Self { memory: memory.clone(), base, size, next_descriptor: 0, offered: 0, seen: 0 }
    }

    /// The device's side.
    pub(crate) fn activate(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).expect("a power of two");
        let at = |offset: u64| Some(u32::try_from(self.base + offset).expect("low memory"));
        queue.set_desc_table_address(at(0), Some(0));
        queue.set_avail_ring_address(at(0x1000), Some(0));
        queue.set_used_ring_address(at(0x2000), Some(0));
        queue.set_ready(true);
        let kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        ActiveQueue { queue, kick, interrupt: Interrupt::unheard() }
    }

    /// Writes a descriptor.
    pub(crate) fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.describe_at(self.base + u64::from(index) * DESCRIPTOR_LEN, address, len, flags, next);
    }

    fn describe_at(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).expect("in RAM");
    }

    /// Makes the chain that begins at `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.size);
        self.memory.write_obj(head, GuestAddress(self.base + 0x1004 + slot * 2)).expect("in RAM");
        self.offered = self.offered.wrapping_add(1);
        self.claim(self.offered);
    }

    /// Sets the index of the available ring, truthfully or not.
    pub(crate) fn claim(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.base + 0x1002)).expect("in RAM");
    }

    /// Offers a chain of buffers (address, length, whether the device writes); returns its head.
    pub(crate) fn put(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_head();
        for (position, (address, len, writable)) in buffers.iter().enumerate() {
            let index = self.next_descriptor % self.size;
            let next = (index + 1) % self.size;
            let more = if position + 1 < buffers.len() { NEXT } else { 0 };
            self.describe(index, *address, *len, more | if *writable { WRITE } else { 0 }, next);
            self.next_descriptor = self.next_descriptor.wrapping_add(1);
        }
        self.offer(head);
        head
    }

    /// Offers such a chain by a table of its own, at `table` (VIRTIO 1.2, 2.7.5.3); returns its head.
    #[cfg(test)]
    pub(crate) fn put_indirect(&mut self, table: u64, buffers: &[(u64, u32, bool)]) -> u16 {
        const INDIRECT: u16 = 4;
        let mut at = table;
        for (next, (address, len, writable)) in (1..).zip(buffers) {
            let more = if usize::from(next) < buffers.len() { NEXT } else { 0 };
            self.describe_at(at, *address, *len, more | if *writable { WRITE } else { 0 }, next);
            at += DESCRIPTOR_LEN;
        }
        let head = self.next_head();
        self.describe(head, table, u32::try_from(at - table).expect("a short table"), INDIRECT, 0);
        self.next_descriptor = self.next_descriptor.wrapping_add(1);
        self.offer(head);
        head
    }

    /// The first descriptor of the next chain.
    pub(crate) fn next_head(&self) -> u16 {
        self.next_descriptor % self.size
    }

    /// The next used chain: its head and the length written.
    #[cfg_attr(fuzzing, expect(dead_code, reason = "a fuzzed device may have written anything there"))]
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.base + 0x2002)).expect("in RAM");
        if index == self.seen {
            return None;
        }
        let at = self.base + 0x2004 + u64::from(self.seen % self.size) * 8;
        let head: u32 = self.memory.read_obj(GuestAddress(at)).expect("in RAM");
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).expect("in RAM");
        self.seen = self.seen.wrapping_add(1);
        Some((u16::try_from(head).expect("a descriptor"), len))
    }
}
