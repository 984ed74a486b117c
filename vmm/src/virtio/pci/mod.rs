//! The PCI bus of the guest: a host bridge and up to 31 virtio devices (VIRTIO 1.2, 4.1, modern only).
//!
//! Configuration space is reached through the ports 0xcf8 and 0xcfc (PCI 3.0, 3.2.2.3.2). Each device has one 32-bit memory
//! window at a fixed address; the driver may size it but not move it.
//!
//! Decided: an interrupt is the ioctl `KVM_SIGNAL_MSI` with the vector's own address and data. Because: it costs the one
//! system call that writing an irqfd would, needs no routing table, and so no grace period when the guest sets up its
//! vectors. Instead of: one irqfd and one routing entry per vector.

use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{GuestMemory, VirtioDevice};
use crate::arch::layout::PCI_WINDOW_START;
use crate::bus::{Bus, BusDevice};
use crate::event_loop::lock;

mod config_space;
mod msix;
mod transport;

pub use msix::Interrupt;
use transport::Transport;

const CONFIG_ADDRESS_PORT: u64 = 0xcf8;
const PORT_COUNT: u64 = 8;
const CONFIG_DATA_OFFSET: u64 = 4;
const ENABLE: u32 = 1 << 31;
/// Slot 0 is the host bridge.
const MAX_DEVICES: usize = 31;
/// Window of one device, a power of two.
pub(crate) const WINDOW_LEN: u64 = 0x8000;

/// Why a device is not on the bus.
#[derive(Debug, Error)]
pub enum PciError {
    /// The bus is full.
    #[error("a VM has at most {MAX_DEVICES} devices")]
    Full,
    /// The host refused an eventfd.
    #[error("cannot make an eventfd")]
    EventFd(#[source] std::io::Error),
    /// KVM refused to watch a doorbell.
    #[error("KVM_IOEVENTFD failed")]
    IoEventFd(#[source] kvm_ioctls::Error),
}

/// The bus while it is filled.
pub struct PciBus {
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    devices: Vec<Arc<Mutex<Transport>>>,
}

impl PciBus {
    /// An empty bus.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, memory: Arc<GuestMemory>) -> Self {
        Self { vm, memory, devices: Vec::new() }
    }

    /// Plugs a device into the next slot.
    ///
    /// # Errors
    /// Each variant of [`PciError`].
    pub fn add(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), PciError> {
        if self.devices.len() == MAX_DEVICES {
            return Err(PciError::Full);
        }
        let window = PCI_WINDOW_START + self.devices.len() as u64 * WINDOW_LEN;
        let mut kicks = Vec::new();
        for queue_index in 0..device.queue_sizes().len() {
            let kick = EventFd::new(EFD_NONBLOCK).map_err(PciError::EventFd)?;
            let doorbell = IoEventAddress::Mmio(window + transport::doorbell_offset(queue_index));
            self.vm.register_ioevent(&kick, &doorbell, NoDatamatch).map_err(PciError::IoEventFd)?;
            kicks.push(kick);
        }
        let transport = Transport::new(device, kicks, window, self.vm.clone(), self.memory.clone());
        self.devices.push(Arc::new(Mutex::new(transport)));
        Ok(())
    }

    /// Puts the bus into the guest's address spaces.
    pub fn attach(self, pio: &mut Bus, mmio: &mut Bus) {
        for (index, device) in self.devices.iter().enumerate() {
            mmio.insert(PCI_WINDOW_START + index as u64 * WINDOW_LEN, WINDOW_LEN, device.clone());
        }
        let ports = ConfigPorts { address: 0, bridge: config_space::host_bridge(), devices: self.devices };
        pio.insert(CONFIG_ADDRESS_PORT, PORT_COUNT, Arc::new(Mutex::new(ports)));
    }
}

/// Configuration mechanism #1.
struct ConfigPorts {
    address: u32,
    bridge: config_space::ConfigSpace,
    devices: Vec<Arc<Mutex<Transport>>>,
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
        match self.selected(offset) {
            Some((0, register)) => self.bridge.read(register, data),
            Some((slot, register)) => {
                if let Some(device) = self.devices.get(slot - 1) {
                    lock(device).read_config_space(register, data);
                }
            }
            None => {}
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
            && let Some(device) = slot.checked_sub(1).and_then(|index| self.devices.get(index))
        {
            lock(device).write_config_space(register, data);
        }
    }
}
