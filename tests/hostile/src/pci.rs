//! Configuration mechanism #1 (PCI 3.0, 3.2.2.3.2).

use crate::machine::Width;

/// The port that selects a register.
pub const ADDRESS: u16 = 0xcf8;
/// The port with the selected register.
pub const DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;

/// Registers that attacks name.
pub const COMMAND: u8 = 0x04;
/// Address of the memory window.
pub const BAR0: u8 = 0x10;
/// Offset of the first capability.
pub const CAPABILITIES: u8 = 0x34;

/// Slots of a bus.
pub const SLOT_COUNT: u8 = 32;

/// Selects a register of a slot.
pub fn select(slot: u8, register: u8) {
    (ENABLE | u32::from(slot) << 11 | u32::from(register & 0xfc)).write_port(ADDRESS);
}

/// Reads a register.
pub fn read<T: Width>(slot: u8, register: u8) -> T {
    select(slot, register);
    T::read_port(DATA + u16::from(register & 3))
}

/// Writes a register.
pub fn write<T: Width>(slot: u8, register: u8, value: T) {
    select(slot, register);
    value.write_port(DATA + u16::from(register & 3));
}

/// Offset of the capability with this id.
pub fn capability(slot: u8, id: u8) -> Option<u8> {
    let mut at = read::<u8>(slot, CAPABILITIES);
    for _ in 0..16 {
        if at == 0 {
            break;
        }
        if read::<u8>(slot, at) == id {
            return Some(at);
        }
        at = read::<u8>(slot, at + 1);
    }
    None
}
