//! MSI-X (PCI 3.0, 6.8.2): the table of vectors that the guest fills, and the pending bits of masked ones.
//!
//! We send a vector's message ourselves ([`Interrupt`]), or the host's kernel does, by an eventfd ([`Irqfd`]). While the vector is
//! masked, the eventfd keeps what was written to it.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_msi;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::routes::{Message, Routes};
use crate::event_loop::lock;

/// "No vector" in the transport's registers (VIRTIO 1.2, 4.1.5.1.2).
pub(super) const VIRTIO_MSI_NO_VECTOR: u16 = 0xffff;
const ENTRY_LEN: usize = 16;
const CONTROL_MASKED: u32 = 1;

/// The vectors of one device.
#[derive(Clone)]
pub(super) struct MsixTable {
    shared: Arc<Mutex<Vectors>>,
}

/// Where messages go.
pub(super) enum MessageTarget {
    /// To the vCPUs; the lines of the device begin at `first_gsi`.
    Vm { routes: Arc<Routes>, first_gsi: u32 },
    /// To a test: address and data.
    #[cfg(any(test, fuzzing))]
    Test(std::sync::mpsc::Sender<(u64, u32)>),
}

impl MessageTarget {
    fn send(&self, entry: &Entry) -> io::Result<()> {
        match self {
            Self::Vm { routes, .. } => {
                let (address_lo, address_hi, data) = (entry.word(0), entry.word(1), entry.word(2));
                routes.vm.signal_msi(kvm_msi { address_lo, address_hi, data, ..Default::default() })?;
            }
            #[cfg(any(test, fuzzing))]
            Self::Test(messages) => {
                let Message { address, data } = entry.message();
                // A test that does not listen is content.
                let _ = messages.send((address, data));
            }
        }
        Ok(())
    }

    fn connect(&self, line: &Line, message: Message) -> io::Result<()> {
        match self {
            Self::Vm { routes, first_gsi } => {
                let gsi = first_gsi + u32::from(line.vector);
                routes.connect(&line.eventfd, gsi, message, line.connected.is_some())
            }
            #[cfg(any(test, fuzzing))]
            Self::Test(_) => Ok(()),
        }
    }

    fn disconnect(&self, line: &Line) {
        match self {
            Self::Vm { routes, first_gsi } => routes.disconnect(&line.eventfd, first_gsi + u32::from(line.vector)),
            #[cfg(any(test, fuzzing))]
            Self::Test(_) => {}
        }
    }
}

struct Vectors {
    target: MessageTarget,
    enabled: bool,
    function_masked: bool,
    entries: Vec<Entry>,
    lines: Vec<Line>,
}

/// A vector that the host's kernel uses.
struct Line {
    vector: u16,
    eventfd: Arc<EventFd>,
    /// What KVM sends when the eventfd is written.
    connected: Option<Message>,
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

    fn message(&self) -> Message {
        Message { address: u64::from(self.word(1)) << 32 | u64::from(self.word(0)), data: self.word(2) }
    }
}

impl MsixTable {
    /// A table of `count` masked vectors.
    pub(super) fn new(count: usize, target: MessageTarget) -> Self {
        let mut masked = Entry { registers: [0; ENTRY_LEN], pending: false };
        masked.registers[12] = 1;
        let vectors =
            Vectors { target, enabled: false, function_masked: false, entries: vec![masked; count], lines: Vec::new() };
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

    /// Whether a line of the host's kernel is yet to follow what the guest has written.
    pub(super) fn lines_are_behind(&self) -> bool {
        let vectors = lock(&self.shared);
        vectors.lines.iter().any(|line| line.connected != vectors.message(line.vector))
    }

    /// Lets the lines follow; on the thread of devices.
    pub(super) fn follow(&self) {
        lock(&self.shared).follow();
    }

    /// Reads the pending bits, which do not tell of what the host's kernel has left pending.
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
        self.target.send(entry)
    }

    /// What a vector sends at once.
    fn message(&self, vector: u16) -> Option<Message> {
        let entry = self.entries.get(usize::from(vector))?;
        (self.enabled && !self.function_masked && !entry.masked()).then(|| entry.message())
    }

    fn follow(&mut self) {
        let wanted: Vec<_> = self.lines.iter().map(|line| self.message(line.vector)).collect();
        for (line, wanted) in self.lines.iter_mut().zip(wanted) {
            if line.connected == wanted {
                continue;
            }
            // KVM refuses nonsense, which is then silent.
            let connected = wanted.filter(|message| self.target.connect(line, *message).is_ok());
            if connected.is_none() && line.connected.is_some() {
                self.target.disconnect(line);
            }
            line.connected = connected;
        }
    }

    fn close(&mut self, eventfd: &Arc<EventFd>) {
        let of_it = |line: &Line| Arc::ptr_eq(&line.eventfd, eventfd);
        if let Some(index) = self.lines.iter().position(of_it) {
            let line = self.lines.swap_remove(index);
            if line.connected.is_some() {
                self.target.disconnect(&line);
            }
        }
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

    /// Whether one of both is as good as the other.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.vector == other.vector && Arc::ptr_eq(&self.table, &other.table)
    }

    /// Lets the host's kernel send it, from now until the [`Irqfd`] is dropped. Both on the thread of devices.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn irqfd(&self) -> io::Result<Irqfd> {
        let eventfd = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let mut vectors = lock(&self.table);
        if self.vector != VIRTIO_MSI_NO_VECTOR {
            vectors.lines.push(Line { vector: self.vector, eventfd: eventfd.clone(), connected: None });
            vectors.follow();
        }
        Ok(Irqfd { table: self.table.clone(), eventfd })
    }
}

/// Sends an interrupt when its eventfd is written, or when the vector is no longer masked. Without a vector nobody hears it.
pub struct Irqfd {
    table: Arc<Mutex<Vectors>>,
    eventfd: Arc<EventFd>,
}

impl Irqfd {
    /// What to write.
    #[must_use]
    pub fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }
}

impl Drop for Irqfd {
    fn drop(&mut self) {
        lock(&self.table).close(&self.eventfd);
    }
}

#[cfg(any(test, fuzzing))]
impl Interrupt {
    /// An interrupt that goes nowhere.
    pub(crate) fn unheard() -> Self {
        let (messages, _) = std::sync::mpsc::channel();
        MsixTable::new(1, MessageTarget::Test(messages)).interrupt(VIRTIO_MSI_NO_VECTOR)
    }

    /// An interrupt, and where its messages come.
    #[cfg(test)]
    pub(crate) fn heard() -> (Self, std::sync::mpsc::Receiver<(u64, u32)>) {
        let (messages, heard) = std::sync::mpsc::channel();
        let table = MsixTable::new(1, MessageTarget::Test(messages));
        table.set_control(true, false);
        table.write_table(12, &[0; 4]);
        (table.interrupt(0), heard)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver};

    use proptest::prelude::*;

    use super::{Message, MessageTarget, MsixTable, VIRTIO_MSI_NO_VECTOR};
    use crate::event_loop::lock;

    fn table() -> (MsixTable, Receiver<(u64, u32)>) {
        let (messages, heard) = mpsc::channel();
        (MsixTable::new(3, MessageTarget::Test(messages)), heard)
    }

    /// Address 0xfee00000 + 4096 * vector, data 32 + vector, not masked.
    fn fill(table: &MsixTable, vector: u8) {
        let at = usize::from(vector) * 16;
        table.write_table(at, &(0xfee0_0000_u32 + u32::from(vector) * 4096).to_le_bytes());
        table.write_table(at + 4, &[0; 4]);
        table.write_table(at + 8, &[32 + vector, 0, 0, 0]);
        table.write_table(at + 12, &[0; 4]);
    }

    #[test]
    fn a_vector_sends_the_guests_address_and_data() {
        let (table, heard) = table();
        fill(&table, 1);
        table.interrupt(1).trigger().expect("trigger");
        assert!(heard.try_recv().is_err(), "not before MSI-X is on");
        table.set_control(true, false);
        table.interrupt(1).trigger().expect("trigger");
        assert_eq!(heard.try_recv(), Ok((0xfee0_1000, 33)));
    }

    #[test]
    fn a_masked_vector_is_pending_and_sent_once_when_it_is_unmasked() {
        let (table, heard) = table();
        fill(&table, 0);
        table.set_control(true, true);
        let interrupt = table.interrupt(0);
        interrupt.trigger().expect("trigger");
        interrupt.trigger().expect("trigger");
        let mut pending = [0; 1];
        table.read_pending(0, &mut pending);
        assert_eq!((pending, heard.try_recv().is_err()), ([1], true));
        table.set_control(true, false);
        table.read_pending(0, &mut pending);
        assert_eq!((pending, heard.try_recv(), heard.try_recv().is_err()), ([0], Ok((0xfee0_0000, 32)), true));
        table.write_table(12, &[1, 0, 0, 0]);
        interrupt.trigger().expect("trigger");
        assert!(heard.try_recv().is_err());
        table.write_table(12, &[0; 4]);
        assert_eq!(heard.try_recv(), Ok((0xfee0_0000, 32)));
    }

    #[test]
    fn vectors_that_do_not_exist_are_silent() {
        let (table, heard) = table();
        table.set_control(true, false);
        table.interrupt(3).trigger().expect("trigger");
        table.interrupt(0xffff).trigger().expect("trigger");
        assert!(heard.try_recv().is_err());
    }

    /// What KVM sends for each line.
    fn connected(table: &MsixTable) -> Vec<Option<Message>> {
        table.follow();
        assert!(!table.lines_are_behind());
        lock(&table.shared).lines.iter().map(|line| line.connected).collect()
    }

    #[test]
    fn lines_of_the_host_s_kernel_follow_address_data_and_masks() {
        let (table, _heard) = table();
        let (first, second) =
            (table.interrupt(1).irqfd().expect("a line"), table.interrupt(1).irqfd().expect("a line"));
        let _unheard = table.interrupt(VIRTIO_MSI_NO_VECTOR).irqfd().expect("no line");
        fill(&table, 1);
        assert_eq!(connected(&table), [None, None], "not before MSI-X is on");
        table.set_control(true, false);
        assert!(table.lines_are_behind());
        let sent = Some(Message { address: 0xfee0_1000, data: 33 });
        assert_eq!(connected(&table), [sent, sent]);
        table.write_table(24, &[40, 0, 0, 0]);
        assert_eq!(connected(&table)[0], Some(Message { address: 0xfee0_1000, data: 40 }));
        table.write_table(28, &[1, 0, 0, 0]);
        assert_eq!(connected(&table), [None, None], "masked");
        table.write_table(28, &[0; 4]);
        table.set_control(true, true);
        assert_eq!(connected(&table), [None, None], "masked with all others");
        drop(first);
        table.set_control(true, false);
        assert_eq!(connected(&table).len(), 1);
        drop(second);
        assert_eq!(connected(&table), []);
    }

    proptest! {
        #[test]
        fn no_access_panics(at in any::<u16>(), data in prop::collection::vec(any::<u8>(), 0..9)) {
            let (table, _heard) = table();
            table.write_table(at.into(), &data);
            table.set_control(true, false);
            let mut read = data.clone();
            table.read_table(at.into(), &mut read);
            table.read_pending(at.into(), &mut read);
        }
    }
}
