//! From the address of an access to the device behind it. Where no device is, reads are all ones and writes are ignored.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::event_loop::lock;

/// A device with registers.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset` from the start of the device's range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// One address space: ports or memory. Ranges come and go while the guest runs.
///
/// The table of ranges is a leaf in the lock order: it is not held while a device works.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Vec<Range>>,
    unclaimed: AtomicU64,
}

struct Range {
    start: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

impl Bus {
    /// Puts a device at `start`. Of two ranges that overlap the older one gets the access.
    pub fn insert(&self, start: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).push(Range { start, len, device });
    }

    /// Takes the device away again.
    pub fn remove<D: BusDevice>(&self, device: &Arc<Mutex<D>>) {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        ranges.retain(|range| !std::ptr::addr_eq(Arc::as_ptr(&range.device), Arc::as_ptr(device)));
    }

    /// The guest reads.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => lock(&device).read(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
    }

    /// The guest writes.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address) {
            Some((offset, device)) => lock(&device).write(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Accesses that no device claimed.
    #[must_use]
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    fn find(&self, address: u64) -> Option<(u64, Arc<Mutex<dyn BusDevice>>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let range = ranges.iter().find(|range| address >= range.start && address - range.start < range.len)?;
        Some((address - range.start, range.device.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::{Bus, BusDevice};

    struct Register(u8);

    impl BusDevice for Register {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).expect("small"));
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    #[test]
    fn an_access_reaches_its_device_or_none() {
        let bus = Bus::default();
        let device = Arc::new(Mutex::new(Register(0)));
        bus.insert(0x10, 4, device.clone());
        bus.write(0x10, &[5]);
        let mut data = [0; 1];
        bus.read(0x13, &mut data);
        assert_eq!(data, [8]);
        bus.read(0x14, &mut data);
        assert_eq!(data, [0xff]);
        bus.write(u64::MAX, &[1]);
        assert_eq!(bus.unclaimed(), 2);
        bus.remove(&device);
        bus.read(0x13, &mut data);
        assert_eq!(data, [0xff]);
    }
}
