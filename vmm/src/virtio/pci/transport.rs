//! One virtio device as a PCI function: identification, capabilities, and the registers of its window (VIRTIO 1.2, 4.1.4).
//!
//! The guest drives the status state machine (VIRTIO 1.2, 2.1). A queue's configuration is frozen once it is enabled, and
//! the device gets its queues only when all their rings lie in guest RAM.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT as _};
use vmm_sys_util::eventfd::EventFd;

use super::WINDOW_LEN;
use super::config_space::ConfigSpace;
use super::msix::{MessageTarget, MsixTable, VIRTIO_MSI_NO_VECTOR};
use crate::bus::BusDevice;
use crate::device_thread::DeviceThread;
use crate::virtio::{Activation, ActiveQueue, GuestMemory, VirtioDevice};

const COMMON_CONFIG: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE_CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const STRUCTURE_LEN: u64 = 0x1000;
/// Distance of two doorbells.
const NOTIFY_MULTIPLIER: u32 = 4;

const VENDOR_VIRTIO: u16 = 0x1af4;
/// Device id of a modern device is this plus its type (VIRTIO 1.2, 4.1.2.1).
const DEVICE_BASE: u16 = 0x1040;
const CLASS_OTHER: u32 = 0xff_00_00;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const VIRTIO_PCI_CAP_COMMON_CFG: u8 = 1;
const VIRTIO_PCI_CAP_NOTIFY_CFG: u8 = 2;
const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;
const VIRTIO_PCI_CAP_DEVICE_CFG: u8 = 4;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;

const ACKNOWLEDGE_AND_DRIVER: u8 = 1 | 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const DEVICE_NEEDS_RESET: u8 = 0x40;

const VIRTIO_F_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// What every queue has.
pub(crate) const RING_FEATURES: u64 = VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1;

/// From `queue_select` to the end of the common configuration: what the driver writes there counts when it reads a register, or
/// writes the status, which lies before.
pub(super) const QUEUE_REGISTERS: u64 = COMMON_CONFIG + 0x16;
pub(super) const QUEUE_REGISTERS_LEN: u32 = 0x38 - 0x16;

/// Offset of a queue's doorbell in the window.
pub(super) fn doorbell_offset(queue_index: usize) -> u64 {
    NOTIFY + queue_index as u64 * u64::from(NOTIFY_MULTIPLIER)
}

/// A device and its registers.
pub(super) struct Transport {
    /// Absent while the thread of devices has it, for which we wait.
    device: Option<Box<dyn VirtioDevice>>,
    config_space: ConfigSpace,
    msix_capability: usize,
    msix: MsixTable,
    memory: Arc<GuestMemory>,
    kicks: Arc<Vec<EventFd>>,
    registers: Registers,
    device_thread: DeviceThread,
    /// Pulled out of its slot: nothing answers any more.
    unplugged: bool,
    /// The log has this device's first error; a guest could make any number.
    error_logged: bool,
}

/// What a device works with.
pub(super) struct Host {
    pub(super) messages: MessageTarget,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) device_thread: DeviceThread,
}

/// What the driver has set: all of the transport's state.
#[derive(Clone, Debug, Default)]
struct Registers {
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

#[derive(Clone, Debug, Default)]
struct QueueRegisters {
    size: u16,
    vector: u16,
    enabled: bool,
    descriptor_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl Transport {
    pub(super) fn new(device: Box<dyn VirtioDevice>, kicks: Vec<EventFd>, window: u64, host: Host) -> Self {
        let Host { messages, memory, device_thread } = host;
        let vectors = device.vectors();
        let mut config_space = ConfigSpace::new(VENDOR_VIRTIO, DEVICE_BASE + device.device_id(), CLASS_OTHER);
        // Windows lie below 4 GiB.
        config_space.set_window(u32::try_from(window).unwrap_or(0), u32::try_from(WINDOW_LEN).unwrap_or(0));
        for (kind, offset) in [
            (VIRTIO_PCI_CAP_COMMON_CFG, COMMON_CONFIG),
            (VIRTIO_PCI_CAP_ISR_CFG, ISR),
            (VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE_CONFIG),
            (VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY),
        ] {
            config_space.add_capability(CAPABILITY_VENDOR, &virtio_capability(kind, offset));
        }
        let msix_capability = config_space.add_capability(CAPABILITY_MSIX, &msix_capability(vectors));
        config_space.set_writable(msix_capability + 2, &(MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes());
        let registers = Registers::reset(&*device);
        let msix = MsixTable::new(vectors, messages);
        Self {
            device: Some(device),
            config_space,
            msix_capability,
            msix,
            memory,
            kicks: Arc::new(kicks),
            registers,
            device_thread,
            unplugged: false,
            error_logged: false,
        }
    }

    pub(super) fn read_config_space(&self, register: usize, data: &mut [u8]) {
        self.config_space.read(register, data);
    }

    /// Returns the new address of the window when the guest has moved it.
    pub(super) fn write_config_space(&mut self, register: usize, data: &[u8]) -> Option<u64> {
        let moved = self.config_space.write(register, data);
        let control = self.config_space.u16_at(self.msix_capability + 2);
        self.msix.set_control(control & MSIX_ENABLE != 0, control & MSIX_FUNCTION_MASK != 0);
        self.follow_vectors();
        moved.map(u64::from)
    }

    /// Lets the host's kernel send what the vectors say now, before the guest goes on.
    fn follow_vectors(&self) {
        if self.msix.lines_are_behind() {
            let msix = self.msix.clone();
            self.device_thread.call(move || msix.follow());
        }
    }

    /// Ends all work for good. A vCPU that is about to touch a register meets nothing.
    pub(super) fn unplug(&mut self) {
        self.unplugged = true;
        self.on_device_thread(|device| device.reset());
    }

    fn device(&self) -> &dyn VirtioDevice {
        self.device.as_deref().expect("only `on_device_thread` takes it, and gives it back")
    }

    /// Does with the device what a vCPU may not do itself, and waits for it.
    fn on_device_thread<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut dyn VirtioDevice) -> T + Send + 'static,
    ) -> T {
        let mut device = self.device.take().expect("given back each time");
        let (device, result) = self.device_thread.call(move || {
            let result = work(&mut *device);
            (device, result)
        });
        self.device = Some(device);
        result
    }

    fn offered_features(&self) -> u64 {
        self.device().features() | RING_FEATURES
    }

    fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.registers.queues.get_mut(usize::from(self.registers.queue_select))
    }

    /// The register at `offset` of the common configuration (VIRTIO 1.2, 4.1.4.3).
    fn read_common(&mut self, offset: u64) -> u64 {
        let registers = &self.registers;
        let queue = registers.queues.get(usize::from(registers.queue_select)).cloned().unwrap_or_default();
        match offset {
            0x00 => registers.device_feature_select.into(),
            0x04 => select_word(self.offered_features(), registers.device_feature_select).into(),
            0x08 => registers.driver_feature_select.into(),
            0x0c => select_word(registers.driver_features, registers.driver_feature_select).into(),
            0x10 => registers.config_vector.into(),
            0x12 => registers.queues.len() as u64,
            0x14 => registers.status.into(),
            0x15 => 0,
            0x16 => registers.queue_select.into(),
            0x18 => queue.size.into(),
            0x1a => queue.vector.into(),
            0x1c => queue.enabled.into(),
            0x1e => registers.queue_select.into(),
            0x20 => low(queue.descriptor_table).into(),
            0x24 => high(queue.descriptor_table).into(),
            0x28 => low(queue.avail_ring).into(),
            0x2c => high(queue.avail_ring).into(),
            0x30 => low(queue.used_ring).into(),
            0x34 => high(queue.used_ring).into(),
            _ => 0,
        }
    }

    fn write_common(&mut self, offset: u64, value: u32) {
        let half = low_half(value);
        match offset {
            0x00 => self.registers.device_feature_select = value,
            0x08 => self.registers.driver_feature_select = value,
            0x0c => self.write_driver_features(value),
            0x10 => self.registers.config_vector = self.vector(half),
            0x14 => self.write_status(value.to_le_bytes()[0]),
            0x16 => self.registers.queue_select = half,
            _ => self.write_queue(offset, value),
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let vector = self.vector(low_half(value));
        let max_size =
            self.device().queue_sizes().get(usize::from(self.registers.queue_select)).copied().unwrap_or_default();
        let negotiating = self.registers.status & DRIVER_OK == 0;
        // Frozen once enabled: a device never sees its rings move.
        let Some(queue) = self.selected().filter(|queue| negotiating && !queue.enabled) else { return };
        let half = low_half(value);
        match offset {
            0x18 if half.is_power_of_two() && half <= max_size => queue.size = half,
            0x1a => queue.vector = vector,
            0x1c if half == 1 => queue.enabled = true,
            0x20 => set_low(&mut queue.descriptor_table, value),
            0x24 => set_high(&mut queue.descriptor_table, value),
            0x28 => set_low(&mut queue.avail_ring, value),
            0x2c => set_high(&mut queue.avail_ring, value),
            0x30 => set_low(&mut queue.used_ring, value),
            0x34 => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    /// A vector that does not exist reads back as none (VIRTIO 1.2, 4.1.5.1.2).
    fn vector(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.msix.len() { vector } else { VIRTIO_MSI_NO_VECTOR }
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.registers.status & FEATURES_OK != 0 {
            return;
        }
        match self.registers.driver_feature_select {
            0 => set_low(&mut self.registers.driver_features, value),
            1 => set_high(&mut self.registers.driver_features, value),
            _ => {}
        }
    }

    fn write_status(&mut self, status: u8) {
        if status == 0 {
            self.on_device_thread(|device| device.reset());
            self.registers = Registers::reset(self.device());
            return;
        }
        let before = self.registers.status;
        // Bits are only ever added; features are accepted when they were offered and include version 1.
        let mut after = before | (status & (ACKNOWLEDGE_AND_DRIVER | DRIVER_OK | FEATURES_OK));
        let features = self.registers.driver_features;
        let acceptable = features & !self.offered_features() == 0 && features & VIRTIO_F_VERSION_1 != 0;
        if before & FEATURES_OK == 0 && !acceptable {
            after &= !FEATURES_OK;
        }
        if after & FEATURES_OK == 0 {
            after &= !DRIVER_OK;
        }
        self.registers.status = after;
        if after & !before & DRIVER_OK != 0
            && let Err(error) = self.activate()
        {
            if !std::mem::replace(&mut self.error_logged, true) {
                tracing::warn!(device = self.device().device_id(), error, "a device needs a reset");
            }
            self.registers.status |= DEVICE_NEEDS_RESET;
            // Without a configuration vector the driver polls its status.
            let _ = self.msix.interrupt(self.registers.config_vector).trigger();
        }
    }

    fn activate(&mut self) -> Result<(), String> {
        let features = self.registers.driver_features;
        let mut queues = Vec::new();
        for registers in &self.registers.queues {
            let queue = self.build_queue(registers, queues.len(), features & VIRTIO_F_EVENT_IDX != 0)?;
            queues.push((queue, self.msix.interrupt(registers.vector)));
        }
        let config_changed = self.msix.interrupt(self.registers.config_vector);
        let (memory, kicks, device_thread) = (self.memory.clone(), self.kicks.clone(), self.device_thread.clone());
        self.on_device_thread(move |device| {
            let with_kick = |((queue, interrupt), kick): (_, &EventFd)| {
                let kick = kick.try_clone().map_err(|error| format!("cannot clone an eventfd: {error}"))?;
                Ok(ActiveQueue { queue, kick, interrupt })
            };
            let queues = queues.into_iter().zip(kicks.iter()).map(with_kick).collect::<Result<_, String>>()?;
            let activation = Activation { memory, features, queues, config_changed, device_thread };
            device.activate(activation).map_err(|error| error.to_string())
        })
    }

    fn build_queue(&self, registers: &QueueRegisters, index: usize, event_idx: bool) -> Result<Queue, String> {
        let max_size = self.device().queue_sizes().get(index).copied().unwrap_or_default();
        let mut queue = Queue::new(max_size).map_err(|error| error.to_string())?;
        queue.set_size(registers.size);
        queue.set_event_idx(event_idx);
        let split = |address: u64| (Some(low(address)), Some(high(address)));
        let (low_half, high_half) = split(registers.descriptor_table);
        queue.set_desc_table_address(low_half, high_half);
        let (low_half, high_half) = split(registers.avail_ring);
        queue.set_avail_ring_address(low_half, high_half);
        let (low_half, high_half) = split(registers.used_ring);
        queue.set_used_ring_address(low_half, high_half);
        queue.set_ready(registers.enabled);
        // The crate takes no address that is not aligned and keeps the one it had.
        let aligned = queue.desc_table() == registers.descriptor_table
            && queue.avail_ring() == registers.avail_ring
            && queue.used_ring() == registers.used_ring;
        if registers.enabled && !(aligned && queue.is_valid(&*self.memory)) {
            return Err(format!("the rings of queue {index} are not in guest RAM or not aligned"));
        }
        Ok(queue)
    }
}

impl BusDevice for Transport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if self.unplugged {
            data.fill(0xff);
            return;
        }
        let within = offset % STRUCTURE_LEN;
        let at = usize::try_from(within).unwrap_or(usize::MAX);
        match offset - within {
            COMMON_CONFIG => {
                let value = self.read_common(within).to_le_bytes();
                for (to, from) in data.iter_mut().zip(value) {
                    *to = from;
                }
            }
            DEVICE_CONFIG => {
                let config = self.device().config();
                for (offset, byte) in (at..).zip(data) {
                    *byte = config.get(offset).copied().unwrap_or(0);
                }
            }
            MSIX_TABLE => self.msix.read_table(at, data),
            MSIX_PENDING => self.msix.read_pending(at, data),
            // There is no interrupt line, so its status is always zero.
            _ => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if self.unplugged {
            return;
        }
        let within = offset % STRUCTURE_LEN;
        match offset - within {
            COMMON_CONFIG => {
                let mut value = [0; 4];
                // 64-bit fields are written as two halves (VIRTIO 1.2, 4.1.3.1).
                if let Some(bytes) = value.get_mut(..data.len()) {
                    bytes.copy_from_slice(data);
                    self.write_common(within, u32::from_le_bytes(value));
                }
            }
            MSIX_TABLE => {
                self.msix.write_table(usize::try_from(within).unwrap_or(usize::MAX), data);
                self.follow_vectors();
            }
            NOTIFY => {
                // KVM signals doorbells itself, except at a place of the window that it could not watch.
                let index = usize::try_from(within / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
                if let Some(kick) = self.kicks.get(index) {
                    // A counter that is full has been signalled.
                    let _ = kick.write(1);
                }
            }
            _ => {}
        }
    }
}

impl Registers {
    fn reset(device: &dyn VirtioDevice) -> Self {
        let queue = |size: &u16| QueueRegisters { size: *size, vector: VIRTIO_MSI_NO_VECTOR, ..Default::default() };
        Self {
            config_vector: VIRTIO_MSI_NO_VECTOR,
            queues: device.queue_sizes().iter().map(queue).collect(),
            ..Default::default()
        }
    }
}

fn virtio_capability(kind: u8, offset: u64) -> Vec<u8> {
    // virtio_pci_cap (VIRTIO 1.2, 4.1.4) after its first two bytes; the notify capability has the multiplier behind it.
    let notify = kind == VIRTIO_PCI_CAP_NOTIFY_CFG;
    let mut body = vec![if notify { 20 } else { 16 }, kind, 0, 0, 0, 0];
    body.extend_from_slice(&u32::try_from(offset).unwrap_or(0).to_le_bytes());
    body.extend_from_slice(&u32::try_from(STRUCTURE_LEN).unwrap_or(0).to_le_bytes());
    if notify {
        body.extend_from_slice(&NOTIFY_MULTIPLIER.to_le_bytes());
    }
    body
}

fn msix_capability(vectors: usize) -> Vec<u8> {
    let mut body = u16::try_from(vectors - 1).unwrap_or(0).to_le_bytes().to_vec();
    body.extend_from_slice(&u32::try_from(MSIX_TABLE).unwrap_or(0).to_le_bytes());
    body.extend_from_slice(&u32::try_from(MSIX_PENDING).unwrap_or(0).to_le_bytes());
    body
}

fn select_word(value: u64, select: u32) -> u32 {
    match select {
        0 => low(value),
        1 => high(value),
        _ => 0,
    }
}

pub(super) fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

pub(super) fn high(value: u64) -> u32 {
    low(value >> 32)
}

fn low_half(value: u32) -> u16 {
    let [a, b, ..] = value.to_le_bytes();
    u16::from_le_bytes([a, b])
}

fn set_low(value: &mut u64, half: u32) {
    *value = u64::from(high(*value)) << 32 | u64::from(half);
}

fn set_high(value: &mut u64, half: u32) {
    *value = u64::from(low(*value)) | u64::from(half) << 32;
}

#[cfg(test)]
mod tests;
