//! MSI-X (PCI 3.0, 6.8.2): the table of vectors that the guest fills, and the pending bits of masked ones.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;

use crate::event_loop::lock;

/// "No vector" in the transport's registers (VIRTIO 1.2, 4.1.5.1.2).
pub(super) const VIRTIO_MSI_NO_VECTOR: u16 = 0xffff;
const ENTRY_LEN: usize = 16;
const CONTROL_MASKED: u32 = 1;

/// The vectors of one device.
pub(super) struct MsixTable {
    shared: Arc<Mutex<Vectors>>,
}

struct Vectors {
    vm: Arc<VmFd>,
    enabled: bool,
    function_masked: bool,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy)]
struct Entry {
    registers: [u8; ENTRY_LEN],
    pending: bool,
}

impl Entry {
    fn word(&self, index: usize) -> u32 {
        let at = index * 4;
        u32::from_le_bytes([self.registers[at], self.registers[at + 1], self.registers[at + 2], self.registers[at + 3]])
    }

    fn masked(&self) -> bool {
        self.word(3) & CONTROL_MASKED != 0
    }
}

impl MsixTable {
    /// A table of `count` masked vectors.
    pub(super) fn new(count: usize, vm: Arc<VmFd>) -> Self {
        let mut masked = Entry { registers: [0; ENTRY_LEN], pending: false };
        masked.registers[12] = 1;
        let vectors = Vectors { vm, enabled: false, function_masked: false, entries: vec![masked; count] };
        Self { shared: Arc::new(Mutex::new(vectors)) }
    }

    /// The interrupt that uses `vector`.
    pub(super) fn interrupt(&self, vector: u16) -> Interrupt {
        Interrupt { table: self.shared.clone(), vector }
    }

    /// Number of vectors.
    pub(super) fn len(&self) -> usize {
        lock(&self.shared).entries.len()
    }

    /// The capability's enable and mask bits have changed.
    pub(super) fn set_control(&self, enabled: bool, function_masked: bool) {
        let mut vectors = lock(&self.shared);
        (vectors.enabled, vectors.function_masked) = (enabled, function_masked);
        for index in 0..vectors.entries.len() {
            vectors.deliver_pending(index);
        }
    }

    /// Reads the table.
    pub(super) fn read_table(&self, offset: usize, data: &mut [u8]) {
        let vectors = lock(&self.shared);
        for (at, byte) in (offset..).zip(data) {
            *byte = vectors.entries.get(at / ENTRY_LEN).map_or(0, |entry| entry.registers[at % ENTRY_LEN]);
        }
    }

    /// Writes the table; unmasking a vector delivers what was pending.
    pub(super) fn write_table(&self, offset: usize, data: &[u8]) {
        let mut vectors = lock(&self.shared);
        let index = offset / ENTRY_LEN;
        let at = offset % ENTRY_LEN;
        // Accesses are aligned words (PCI 3.0, 6.8.2); anything else is ignored.
        if at + data.len() > ENTRY_LEN {
            return;
        }
        if let Some(entry) = vectors.entries.get_mut(index) {
            entry.registers[at..at + data.len()].copy_from_slice(data);
            vectors.deliver_pending(index);
        }
    }

    /// Reads the pending bits.
    pub(super) fn read_pending(&self, offset: usize, data: &mut [u8]) {
        let vectors = lock(&self.shared);
        for (at, byte) in (offset..).zip(data) {
            let bits = vectors.entries.iter().skip(at * 8).take(8).enumerate();
            *byte = bits.fold(0, |bits, (bit, entry)| bits | u8::from(entry.pending) << bit);
        }
    }
}

impl Vectors {
    fn signal(&mut self, index: usize) -> io::Result<()> {
        let (enabled, function_masked) = (self.enabled, self.function_masked);
        let Some(entry) = self.entries.get_mut(index) else { return Ok(()) };
        if !enabled {
            return Ok(());
        }
        if function_masked || entry.masked() {
            entry.pending = true;
            return Ok(());
        }
        entry.pending = false;
        let message =
            kvm_msi { address_lo: entry.word(0), address_hi: entry.word(1), data: entry.word(2), ..Default::default() };
        self.vm.signal_msi(message)?;
        Ok(())
    }

    fn deliver_pending(&mut self, index: usize) {
        if self.entries.get(index).is_some_and(|entry| entry.pending) {
            // What the guest wrote as address and data is its own affair: KVM refuses nonsense.
            let _ = self.signal(index);
        }
    }
}

/// Tells the driver something by one vector, if it chose one.
#[derive(Clone)]
pub struct Interrupt {
    table: Arc<Mutex<Vectors>>,
    vector: u16,
}

impl Interrupt {
    /// Sends the interrupt, or keeps it pending while the vector is masked.
    ///
    /// # Errors
    /// When KVM refuses the address or data that the guest chose.
    pub fn trigger(&self) -> io::Result<()> {
        if self.vector == VIRTIO_MSI_NO_VECTOR {
            return Ok(());
        }
        lock(&self.table).signal(self.vector.into())
    }
}
