//! Guest-physical addresses.
//!
//! ```text
//!   0x0000_0000  RAM        0x6000 PVH start info, 0x7000 memory map, 0x2_0000 command line
//!   0x0009_fc00  reserved   0xd_0000 copy of PCI configuration space, 0xf_0000 MP table
//!   0x0010_0000  RAM        kernel
//!   0xc000_0000  hole       PCI windows; 0xe000_0000 root image; local APIC
//!   0x1_0000_0000 RAM       the rest
//! ```

/// Start info of the PVH boot protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// Memory map.
pub const PVH_MEMORY_MAP: u64 = 0x7000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its final zero, in bytes (COMMAND_LINE_SIZE of the kernel).
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Copy of the configuration space of PCI bus 0, in the area where adapters would have their ROMs.
pub const PCI_CONFIG_COPY: u64 = 0xd_0000;
/// MultiProcessor floating pointer, in the area where a BIOS would be.
pub const MP_TABLE: u64 = 0xf_0000;
/// RAM above the first megabyte.
pub const HIMEM_START: u64 = 0x10_0000;
/// First address of the hole.
pub const PCI_HOLE_START: u64 = 0xc000_0000;
/// Memory window of the first PCI device.
pub const PCI_WINDOW_START: u64 = 0xc000_0000;
/// The root image, persistent memory for the guest.
pub const ROOT_IMAGE_START: u64 = 0xe000_0000;
/// First address behind the largest root image.
pub const ROOT_IMAGE_END: u64 = 0xf000_0000;
/// Local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// RAM above 4 GiB.
pub const HIGH_RAM_START: u64 = 1 << 32;
