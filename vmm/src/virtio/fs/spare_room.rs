//! Room of ours for an answer that the guest has left none for.
//!
//! virtiofsd takes room for the header of an answer for granted, except in requests that have no answer. Which kind a request is of, it
//! reads out of guest memory, where it may have changed since anybody else looked. So there is always room.

use std::io;
use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueT as _};
use virtiofsd::descriptor_utils::{self, Writer};
use vm_memory::{Bytes as _, GuestAddress};

use crate::memory::Views;
use crate::virtio::GuestMemory;

/// Length of `fuse_out_header`.
pub(super) const OUT_HEADER_LEN: u16 = 16;
const VIRTQ_DESC_F_WRITE: u16 = 2; // VIRTIO 1.2, 2.7.5

/// Where things are in memory that no guest has. The table of descriptors, which has one, lies at its beginning.
const MEMORY_LEN: usize = 4096;
const AVAILABLE_RING: u16 = 0x100;
const ROOM: u16 = 0x200;

/// Room for one header: a buffer of a driver that we play ourselves.
pub(super) struct SpareRoom {
    memory: Views,
    chain: DescriptorChain<Arc<GuestMemory>>,
}

impl SpareRoom {
    pub(super) fn create() -> io::Result<Self> {
        let ranges = [(GuestAddress(0), MEMORY_LEN)];
        let memory = Arc::new(GuestMemory::from_ranges(&ranges).map_err(io::Error::other)?);
        let buffer = Descriptor::new(ROOM.into(), OUT_HEADER_LEN.into(), VIRTQ_DESC_F_WRITE, 0);
        memory.write_obj(buffer, GuestAddress(0)).map_err(io::Error::other)?;
        // Behind the ring's flags: the index of what comes next. The first entry names descriptor 0.
        memory.write_obj(1_u16, GuestAddress(u64::from(AVAILABLE_RING) + 2)).map_err(io::Error::other)?;
        let mut queue = Queue::new(1).map_err(io::Error::other)?;
        queue.set_avail_ring_address(Some(AVAILABLE_RING.into()), Some(0));
        queue.set_ready(true);
        let chain = queue.pop_descriptor_chain(memory.clone()).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { memory: Views::of(memory).map_err(io::Error::other)?, chain })
    }

    /// Writes to the beginning of the room.
    pub(super) fn writer(&self) -> Result<Writer<'_>, descriptor_utils::Error> {
        Writer::new(&self.memory.logged, self.chain.clone())
    }
}
