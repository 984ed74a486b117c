//! A driver that can follow the rules (VIRTIO 1.2, chapters 2 and 4.1) and, for the attacks, break each one.

use core::hint::spin_loop;

use crate::machine::{OWN_MEMORY, Width as _, read, write};
use crate::pci;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
/// Registers of the common configuration (VIRTIO 1.2, 4.1.4.3).
pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
/// Half of the accepted features.
pub const DRIVER_FEATURE: u64 = 0x0c;
/// Vector of configuration changes.
pub const CONFIG_VECTOR: u64 = 0x10;
const QUEUE_COUNT: u64 = 0x12;
/// The status state machine.
pub const STATUS: u64 = 0x14;
/// Which queue the registers below are of.
pub const QUEUE_SELECT: u64 = 0x16;
/// Entries of a queue.
pub const QUEUE_SIZE: u64 = 0x18;
/// Vector of a queue.
pub const QUEUE_VECTOR: u64 = 0x1a;
/// Enables a queue.
pub const QUEUE_ENABLE: u64 = 0x1c;
/// Address of the descriptor table, in two halves.
pub const QUEUE_DESC: u64 = 0x20;
/// Address of the available ring.
pub const QUEUE_AVAIL: u64 = 0x28;
/// Address of the used ring.
pub const QUEUE_USED: u64 = 0x30;
/// What is in the window.
pub const ISR: u64 = 0x1000;
/// Configuration of the device's own type.
pub const DEVICE_CONFIG: u64 = 0x2000;
/// Doorbells, 4 bytes apart.
pub const NOTIFY: u64 = 0x3000;
/// Table of vectors.
pub const MSIX_TABLE: u64 = 0x4000;
/// Pending bits.
pub const MSIX_PENDING: u64 = 0x5000;
/// Length of the window.
pub const WINDOW_LEN: u64 = 0x8000;

/// Bits of the status.
pub const ACKNOWLEDGE: u8 = 1;
/// The guest can drive the device.
pub const DRIVER: u8 = 2;
/// The driver is ready.
pub const DRIVER_OK: u8 = 4;
/// The features are settled.
pub const FEATURES_OK: u8 = 8;
/// The device has met an error.
pub const NEEDS_RESET: u8 = 0x40;

/// Features of the transport.
pub const INDIRECT: u64 = 1 << 28;
/// A device of this standard.
pub const VERSION_1: u64 = 1 << 32;

/// Flags of a descriptor.
pub const NEXT: u16 = 1;
/// The device writes to it.
pub const WRITE: u16 = 2;
/// It points to a table of descriptors.
pub const TABLE: u16 = 4;

/// Memory of one queue.
const QUEUE_MEMORY: u64 = 0x20_0000;
const AVAIL_OFFSET: u64 = 0x1_0000;
const USED_OFFSET: u64 = 0x2_0000;
const BUFFER_OFFSET: u64 = 0x4_0000;

/// Device types.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Network interface.
    Net,
    /// Entropy.
    Rng,
    /// Sockets.
    Vsock,
    /// Shared directory.
    Fs,
    /// Balloon.
    Balloon,
}

impl Kind {
    /// In the names of cases.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Rng => "rng",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
            Self::Balloon => "balloon",
        }
    }
}

/// A device that was found on the bus.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// Its type.
    pub kind: Kind,
    /// Where it is on the bus.
    pub slot: u8,
    /// Where its registers are.
    pub window: u64,
}

impl Device {
    /// The device in a slot, when it is of a type that is known here.
    pub fn find(slot: u8) -> Option<Self> {
        let kind = match pci::read::<u32>(slot, 0) {
            0x1041_1af4 => Kind::Net,
            0x1044_1af4 => Kind::Rng,
            0x1045_1af4 => Kind::Balloon,
            0x1053_1af4 => Kind::Vsock,
            0x105a_1af4 => Kind::Fs,
            _ => return None,
        };
        Some(Self { kind, slot, window: u64::from(pci::read::<u32>(slot, pci::BAR0) & !0xf) })
    }

    /// Reads a register.
    pub fn get<T: Copy>(&self, offset: u64) -> T {
        read(self.window + offset)
    }

    /// Writes a register.
    pub fn set<T: Copy>(&self, offset: u64, value: T) {
        write(self.window + offset, value);
    }

    /// The status.
    pub fn status(&self) -> u8 {
        self.get(STATUS)
    }

    /// Back to the beginning; true when the device says so.
    pub fn reset(&self) -> bool {
        self.set(STATUS, 0_u8);
        self.status() == 0
    }

    /// What the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.set(DEVICE_FEATURE_SELECT, select);
            u64::from(self.get::<u32>(DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// Accepts features; true when the device agrees.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set(STATUS, ACKNOWLEDGE | DRIVER);
        self.set(DRIVER_FEATURE_SELECT, 0_u32);
        self.set(DRIVER_FEATURE, features as u32);
        self.set(DRIVER_FEATURE_SELECT, 1_u32);
        self.set(DRIVER_FEATURE, (features >> 32) as u32);
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        self.get(QUEUE_COUNT)
    }

    /// Gives a queue its rings; `size` 0 leaves the size as it is.
    pub fn place(&self, queue: &Queue, size: u16) {
        self.set(QUEUE_SELECT, queue.index);
        if size != 0 {
            self.set(QUEUE_SIZE, size);
        }
        for (register, address) in [(QUEUE_DESC, queue.desc), (QUEUE_AVAIL, queue.avail), (QUEUE_USED, queue.used)] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(QUEUE_ENABLE, 1_u16);
    }

    /// Says that the driver is ready; true when the device works.
    pub fn go(&self) -> bool {
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        self.status() == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    }

    /// From the beginning to working queues, by the rules.
    pub fn start(&self, features: u64) -> bool {
        if !self.reset() || !self.negotiate(VERSION_1 | features) {
            return false;
        }
        for index in 0..self.queue_count() {
            let queue = Queue::of(index);
            queue.clear();
            self.place(&queue, 0);
        }
        self.go()
    }

    /// Rings the doorbell of a queue.
    pub fn kick(&self, queue: u16) {
        self.set(NOTIFY + 4 * u64::from(queue), queue);
    }
}

/// The rings of one queue.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    /// Its number.
    pub index: u16,
    /// Its entries.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// Memory for what descriptors point to, 1.7 MiB.
    pub buffer: u64,
}

impl Queue {
    /// Rings in the memory of queue `index`.
    pub fn of(index: u16) -> Self {
        let desc = OWN_MEMORY + u64::from(index) * QUEUE_MEMORY;
        let (avail, used, buffer) = (desc + AVAIL_OFFSET, desc + USED_OFFSET, desc + BUFFER_OFFSET);
        Self { index, size: 0, desc, avail, used, buffer }
    }

    /// The same, with the size that the device has for it.
    pub fn of_device(device: &Device, index: u16) -> Self {
        device.set(QUEUE_SELECT, index);
        Self { size: device.get(QUEUE_SIZE), ..Self::of(index) }
    }

    /// Zeros in the rings' heads and in the first descriptors.
    pub fn clear(&self) {
        for at in (0..0x1000).step_by(8) {
            write(self.desc + at, 0_u64);
            write(self.avail + at, 0_u64);
            write(self.used + at, 0_u64);
        }
    }

    /// Writes a descriptor.
    pub fn describe(&self, at: u16, address: u64, len: u32, flags: u16, next: u16) {
        descriptor(self.desc + 16 * u64::from(at), address, len, flags, next);
    }

    /// Makes a chain available.
    pub fn offer(&self, head: u16) {
        let index: u16 = read(self.avail + 2);
        write(self.avail + 4 + 2 * u64::from(index % self.size.max(1)), head);
        write(self.avail + 2, index.wrapping_add(1));
    }

    /// Number of chains that were given back.
    pub fn used_index(&self) -> u16 {
        read(self.used + 2)
    }

    /// Length of the chain that was given back as number `index`.
    pub fn used_len(&self, index: u16) -> u32 {
        read(self.used + 8 + 8 * u64::from(index % self.size.max(1)))
    }

    /// Waits until `count` chains were given back.
    pub fn wait(&self, count: u16) -> bool {
        wait(|| self.used_index() >= count)
    }
}

/// Writes a descriptor anywhere.
pub fn descriptor(at: u64, address: u64, len: u32, flags: u16, next: u16) {
    write(at, address);
    write(at + 8, len);
    write(at + 12, flags);
    write(at + 14, next);
}

/// Waits for the host's threads, for some seconds at most, a minute where everything is emulated.
pub fn wait(done: impl Fn() -> bool) -> bool {
    const TURNS: u32 = 2_000_000;
    const TURNS_BETWEEN_EXITS: u32 = 50;
    for turn in 0..TURNS {
        if done() {
            return true;
        }
        if turn % TURNS_BETWEEN_EXITS == 0 {
            pause();
        }
        spin_loop();
    }
    false
}

/// Gives the host's threads time: an exit.
pub fn pause() {
    0_u8.write_port(0x80);
}

/// Gives them more.
pub fn pause_long() {
    for _ in 0..20 {
        pause();
    }
}
