//! Configuration space of one function (PCI 3.0, chapter 6): 256 bytes and a mask of the bits that the guest may change.

const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION_ID: usize = 0x08;
const CLASS_CODE: usize = 0x09;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
const SUBSYSTEM_ID: usize = 0x2e;
const CAPABILITIES_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Memory space, bus master and interrupt disable.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;
/// Length of a function's registers, in bytes.
pub(super) const LEN: usize = 256;

/// The registers of a function.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    /// Address and length of window 0; the length is a power of two.
    window: Option<(u32, u32)>,
    sizing: bool,
    next_capability: usize,
    last_capability_link: usize,
}

impl ConfigSpace {
    /// A function without windows or capabilities. `class` is the class code, class in the upper byte.
    pub(super) fn new(vendor: u16, device: u16, class: u32) -> Self {
        let mut space = Self {
            bytes: [0; LEN],
            writable: [0; LEN],
            window: None,
            sizing: false,
            next_capability: FIRST_CAPABILITY,
            last_capability_link: CAPABILITIES_POINTER,
        };
        space.set_u16(VENDOR_ID, vendor);
        space.set_u16(DEVICE_ID, device);
        space.set_u16(SUBSYSTEM_VENDOR_ID, vendor);
        space.set_u16(SUBSYSTEM_ID, 0x40);
        space.bytes[REVISION_ID] = 1;
        space.bytes[CLASS_CODE..CLASS_CODE + 3].copy_from_slice(&class.to_le_bytes()[..3]);
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        space
    }

    /// Gives the function its memory window. Its bit of the command register is clear, as after a reset (PCI 3.0, 6.2.2):
    /// Linux would switch it off and on again around the sizing of each of seven registers. Accesses are answered anyway.
    pub(super) fn set_window(&mut self, address: u32, len: u32) {
        self.window = Some((address, len));
        self.set_u32(BAR0, address);
    }

    /// Appends a capability; `body` is what follows its id and link. Returns its offset.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_capability;
        self.bytes[at] = id;
        self.bytes[at + 2..at + 2 + body.len()].copy_from_slice(body);
        // Offsets are below 256: the caller adds a handful of short capabilities.
        self.bytes[self.last_capability_link] = u8::try_from(at).unwrap_or(0);
        self.last_capability_link = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        self.set_u16(STATUS, STATUS_CAPABILITIES);
        at
    }

    /// Lets the guest change the bits of `mask` at `at`.
    pub(super) fn set_writable(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Reads registers; past the end there are zeros.
    pub(super) fn read(&self, at: usize, data: &mut [u8]) {
        let sized = self.sizing.then(|| self.window.map_or(0, |(_, len)| !(len - 1)).to_le_bytes());
        for (offset, byte) in (at..).zip(data) {
            *byte = match sized {
                Some(mask) if (BAR0..BAR0 + 4).contains(&offset) => mask[offset - BAR0],
                _ => self.bytes.get(offset).copied().unwrap_or(0),
            };
        }
    }

    /// Writes registers; bits that are not writable stay. Returns the new address of the window when it has moved.
    pub(super) fn write(&mut self, at: usize, data: &[u8]) -> Option<u32> {
        if at == BAR0
            && let Ok(bytes) = data.try_into()
        {
            return self.write_window(u32::from_le_bytes(bytes));
        }
        for (offset, byte) in (at..).zip(data) {
            if let (Some(current), Some(mask)) = (self.bytes.get_mut(offset), self.writable.get(offset)) {
                *current = (*current & !mask) | (byte & mask);
            }
        }
        None
    }

    /// All ones asks for the size (PCI 3.0, 6.2.5.1), anything else is an address.
    fn write_window(&mut self, value: u32) -> Option<u32> {
        let (current, len) = self.window?;
        self.sizing = value == u32::MAX;
        let address = value & !(len - 1);
        // Nothing is ever at address 0; a driver writes it while it looks around.
        if self.sizing || address == 0 || address == current {
            return None;
        }
        self.window = Some((address, len));
        self.set_u32(BAR0, address);
        Some(address)
    }

    /// One register of two bytes.
    pub(super) fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn set_u32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{BAR0, COMMAND, ConfigSpace};

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(0x1af4, 0x1042, 0xff_00_00);
        space.set_window(0xc000_0000, 0x8000);
        space
    }

    fn read_u32(space: &ConfigSpace, at: usize) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_window_can_be_sized_and_moved() {
        let mut space = space();
        assert_eq!(space.write(BAR0, &[0xff; 4]), None);
        assert_eq!(read_u32(&space, BAR0), 0xffff_8000);
        assert_eq!(space.write(BAR0, &0xc000_0000_u32.to_le_bytes()), None);
        assert_eq!(read_u32(&space, BAR0), 0xc000_0000);
        assert_eq!(space.write(BAR0, &0xdead_1234_u32.to_le_bytes()), Some(0xdead_0000));
        assert_eq!(read_u32(&space, BAR0), 0xdead_0000);
        assert_eq!(space.write(BAR0, &[0; 4]), None);
        assert_eq!(space.write(BAR0 + 2, &[0xff; 2]), None);
        assert_eq!(read_u32(&space, BAR0), 0xdead_0000);
    }

    #[test]
    fn a_function_without_a_window_has_none_to_move() {
        let mut space = ConfigSpace::new(0x1af4, 0x1042, 0xff_00_00);
        assert_eq!(space.write(BAR0, &[0xff; 4]), None);
        assert_eq!(space.write(BAR0, &[0x12; 4]), None);
        assert_eq!(read_u32(&space, BAR0), 0);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[1; 14]);
        let second = space.add_capability(17, &[2; 10]);
        let mut byte = [0; 1];
        space.read(0x34, &mut byte);
        assert_eq!(usize::from(byte[0]), first);
        space.read(first + 1, &mut byte);
        assert_eq!(usize::from(byte[0]), second);
    }

    proptest! {
        #[test]
        fn no_write_changes_what_is_not_writable(at in 0_usize..300, data in prop::collection::vec(any::<u8>(), 0..9)) {
            let mut space = space();
            let before = space.clone();
            space.write(at, &data);
            space.write(BAR0, &0xc000_0000_u32.to_le_bytes());
            for offset in (0..256).step_by(4).filter(|offset| *offset != COMMAND) {
                prop_assert_eq!(read_u32(&space, offset), read_u32(&before, offset));
            }
        }
    }
}
