//! The PCI bus of the guest: up to 31 virtio devices (VIRTIO 1.2, 4.1, modern only), which come and go while the guest runs; the
//! guest scans the bus when its agent is told to. Slot 0, where others have a host bridge, is empty: a guest that is told which
//! configuration mechanism there is (`pci=conf1`) would only spend 77 exits on it.
//!
//! Configuration space is reached through the ports 0xcf8 and 0xcfc (PCI 3.0, 3.2.2.3.2), and a copy of it lies in guest RAM, where
//! our kernel reads it: 256 bytes for each function. Nothing of ours reads that, so a guest that changes it deceives itself.
//! Each device has one 32-bit memory window, placed by us and moved by a guest that finds it after its boot: Linux then gives it
//! another address.
//!
//! Decided: an interrupt is the ioctl `KVM_SIGNAL_MSI` with the vector's own address and data. Because: it costs the one
//! system call that writing an irqfd would, needs no routing table, and so no grace period when the guest sets up its
//! vectors. Instead of: one irqfd and one routing entry per vector, which only queues have that the host's kernel serves.
//!
//! Lock order: the configuration ports, then the slot table, then a device's transport, then its vector table. The memory
//! bus's table of ranges is a leaf, and no lock of a device's own is held when the slot table is taken.

use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;
use vm_memory::{Bytes as _, GuestAddress};

use super::{GuestMemory, VirtioDevice};
use crate::arch::layout::{PCI_CONFIG_COPY, PCI_WINDOW_START};
use crate::bus::{Bus, BusDevice};
use crate::device_thread::DeviceThread;
use crate::event_loop::lock;

mod config_space;
mod doorbells;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod msix;
#[cfg(any(test, fuzzing))]
mod owed;
mod routes;
mod transport;

use doorbells::Doorbells;
use msix::MessageTarget;
pub use msix::{Interrupt, Irqfd};
use routes::{Routes, first_gsi};
pub(crate) use transport::RING_FEATURES;
use transport::{Host, QUEUE_REGISTERS, QUEUE_REGISTERS_LEN, Transport};

/// What is written here selects the register that is shown behind it, and does nothing else.
const CONFIG_ADDRESS_PORT: u64 = 0xcf8;
const CONFIG_ADDRESS_LEN: u32 = 4;
const PORT_COUNT: u64 = 8;
const CONFIG_DATA_OFFSET: u64 = 4;
const ENABLE: u32 = 1 << 31;
/// Slot 0 stays empty.
const MAX_DEVICES: usize = 31;
const FUNCTIONS_OF_SLOT: usize = 8;
/// The copy of one slot, whose devices have one function.
const COPY_OF_SLOT: usize = FUNCTIONS_OF_SLOT * config_space::LEN;
/// Of a register that is not there.
const ABSENT: u8 = 0xff;
/// Window of one device, a power of two.
pub(crate) const WINDOW_LEN: u64 = 0x8000;

/// Why a device is not on the bus.
#[derive(Debug, Error)]
pub enum PciError {
    /// The bus is full.
    #[error("a VM has at most {MAX_DEVICES} devices")]
    Full,
    /// The name is taken.
    #[error("the VM has a device {name:?} already")]
    Exists {
        /// The name.
        name: String,
    },
    /// There is no such device.
    #[error("the VM has no device {name:?}")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The host refused an eventfd.
    #[error("cannot make an eventfd")]
    EventFd(#[source] std::io::Error),
    /// KVM refused to watch a doorbell.
    #[error("KVM_IOEVENTFD failed")]
    IoEventFd(#[source] kvm_ioctls::Error),
}

/// The bus.
pub struct PciBus {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    memory: Arc<GuestMemory>,
    /// Where the windows are.
    mmio: Arc<Bus>,
    /// Slot 1 is the first.
    slots: Mutex<[Option<Plugged>; MAX_DEVICES]>,
    device_thread: DeviceThread,
}

/// What is in a slot.
struct Plugged {
    name: String,
    transport: Arc<Mutex<Transport>>,
    doorbells: Doorbells,
}

impl PciBus {
    /// An empty bus whose devices have their windows in `mmio`.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, memory: Arc<GuestMemory>, mmio: Arc<Bus>, device_thread: DeviceThread) -> Self {
        let routes = Arc::new(Routes::new(vm.clone()));
        let bus = Self { vm, routes, memory, mmio, slots: Mutex::default(), device_thread };
        (0..=MAX_DEVICES).for_each(|slot| bus.copy(slot, &[ABSENT; COPY_OF_SLOT]));
        bus
    }

    /// Where devices are made, started and reset.
    #[must_use]
    pub fn device_thread(&self) -> &DeviceThread {
        &self.device_thread
    }

    /// Plugs a device into the first free slot. `name` is what [`Self::remove`] knows it by.
    ///
    /// # Errors
    /// Each variant of [`PciError`] but `NotFound`.
    pub fn add(&self, name: &str, device: Box<dyn VirtioDevice>) -> Result<(), PciError> {
        let mut slots = lock(&self.slots);
        if slots.iter().flatten().any(|plugged| plugged.name == name) {
            return Err(PciError::Exists { name: name.to_owned() });
        }
        let index = slots.iter().position(Option::is_none).ok_or(PciError::Full)?;
        let window = PCI_WINDOW_START + index as u64 * WINDOW_LEN;
        let (vm, count) = (self.vm.clone(), device.queue_sizes().len());
        let created = self.device_thread.call(move || {
            let doorbells = Doorbells::create(vm, count, window)?;
            let kicks = doorbells.kicks()?;
            Ok::<_, PciError>((doorbells, kicks))
        });
        let (doorbells, kicks) = created?;
        let messages = MessageTarget::Vm { routes: self.routes.clone(), first_gsi: first_gsi(index) };
        let host = Host { messages, memory: self.memory.clone(), device_thread: self.device_thread.clone() };
        let transport = Transport::new(device, kicks, window, host);
        let transport = Arc::new(Mutex::new(transport));
        self.mmio.insert(window, WINDOW_LEN, transport.clone());
        let plugged = slots[index].insert(Plugged { name: name.to_owned(), transport, doorbells });
        self.copy_registers(index + 1, plugged);
        Ok(())
    }

    /// Pulls a device out: it is reset, its workers end, its slot is free.
    ///
    /// # Errors
    /// [`PciError::NotFound`].
    pub fn remove(&self, name: &str) -> Result<(), PciError> {
        let mut slots = lock(&self.slots);
        let named = |slot: &Option<Plugged>| slot.as_ref().is_some_and(|plugged| plugged.name == name);
        let found = slots.iter().position(named).and_then(|index| Some((index + 1, slots[index].take()?)));
        let (slot, plugged) = found.ok_or_else(|| PciError::NotFound { name: name.to_owned() })?;
        self.copy(slot, &[ABSENT; COPY_OF_SLOT]);
        drop(slots);
        self.mmio.remove(&plugged.transport);
        // A vCPU that found the device just before waits for this and then meets an unplugged one.
        lock(&plugged.transport).unplug();
        Ok(())
    }

    /// Puts the configuration ports into the guest's port space.
    pub fn attach(self: &Arc<Self>, pio: &Bus) {
        let ports = ConfigPorts { address: 0, bus: self.clone() };
        pio.insert(CONFIG_ADDRESS_PORT, PORT_COUNT, Arc::new(Mutex::new(ports)));
    }

    /// Registers of the devices that are plugged in whose writes may wait until another register is accessed. They stay so when
    /// a window is moved, for what comes there instead has its registers at the same place of its window.
    #[must_use]
    pub fn gatherable(&self) -> Vec<(IoEventAddress, u32)> {
        let plugged = lock(&self.slots).iter().flatten().count() as u64;
        let windows = (0..plugged).map(|index| PCI_WINDOW_START + index * WINDOW_LEN);
        let queues = windows.map(|window| (IoEventAddress::Mmio(window + QUEUE_REGISTERS), QUEUE_REGISTERS_LEN));
        [(IoEventAddress::Pio(CONFIG_ADDRESS_PORT), CONFIG_ADDRESS_LEN)].into_iter().chain(queues).collect()
    }

    fn transport(&self, slot: usize) -> Option<Arc<Mutex<Transport>>> {
        let slots = lock(&self.slots);
        Some(slots.get(slot.checked_sub(1)?)?.as_ref()?.transport.clone())
    }

    /// Brings what a register says now to where the guest reads it.
    fn update_copy(&self, slot: usize) {
        let slots = lock(&self.slots);
        if let Some(Some(plugged)) = slot.checked_sub(1).and_then(|index| slots.get(index)) {
            self.copy_registers(slot, plugged);
        }
    }

    fn copy_registers(&self, slot: usize, plugged: &Plugged) {
        let mut registers = [0; config_space::LEN];
        lock(&plugged.transport).read_config_space(0, &mut registers);
        self.copy(slot, &registers);
    }

    fn copy(&self, slot: usize, registers: &[u8]) {
        let at = PCI_CONFIG_COPY + (slot * COPY_OF_SLOT) as u64;
        // The smallest guest has RAM there, and the ports say the same.
        let _ = self.memory.write_slice(registers, GuestAddress(at));
    }

    /// The guest has written the address of a window.
    fn move_window(&self, slot: usize, window: u64) {
        let mut slots = lock(&self.slots);
        let Some(Some(plugged)) = slot.checked_sub(1).and_then(|index| slots.get_mut(index)) else { return };
        self.mmio.remove(&plugged.transport);
        self.mmio.insert(window, WINDOW_LEN, plugged.transport.clone());
        plugged.doorbells.follow(window);
    }
}

/// Configuration mechanism #1.
struct ConfigPorts {
    address: u32,
    bus: Arc<PciBus>,
}

impl ConfigPorts {
    /// Slot and register offset, when the address selects a device that can exist.
    fn selected(&self, offset: u64) -> Option<(usize, usize)> {
        let (bus, function) = (self.address >> 16 & 0xff, self.address >> 8 & 7);
        if self.address & ENABLE == 0 || bus != 0 || function != 0 {
            return None;
        }
        let slot = usize::try_from(self.address >> 11 & 0x1f).ok()?;
        let register =
            usize::try_from(self.address & 0xfc).ok()? + usize::try_from(offset - CONFIG_DATA_OFFSET).ok()?;
        Some((slot, register))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset < CONFIG_DATA_OFFSET {
            if data.len() == 4 && offset == 0 {
                data.copy_from_slice(&self.address.to_le_bytes());
            }
            return;
        }
        if let Some((slot, register)) = self.selected(offset)
            && let Some(transport) = self.bus.transport(slot)
        {
            lock(&transport).read_config_space(register, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset < CONFIG_DATA_OFFSET {
            if let (0, Ok(bytes)) = (offset, data.try_into()) {
                self.address = u32::from_le_bytes(bytes);
            }
            return;
        }
        if let Some((slot, register)) = self.selected(offset)
            && let Some(transport) = self.bus.transport(slot)
        {
            let moved = lock(&transport).write_config_space(register, data);
            if let Some(window) = moved {
                self.bus.move_window(slot, window);
            }
            self.bus.update_copy(slot);
        }
    }
}
