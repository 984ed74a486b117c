//! The PVH boot protocol (Xen's `start_info.h`, boot ABI version 1): where the kernel finds its command line, its initramfs
//! and its memory map.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion as _};

use super::layout::{COMMAND_LINE, HIMEM_START, LOW_RAM_END, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use crate::virtio::GuestMemory;

const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;
const MEMMAP_RAM: u32 = 1;

/// Writes the start info; `initramfs` is its address and length.
///
/// # Errors
/// When guest RAM is too small.
pub fn write_start_info(memory: &GuestMemory, initramfs: Option<(u64, u64)>) -> Result<(), GuestMemoryError> {
    let mut map = vec![hvm_memmap_table_entry { addr: 0, size: LOW_RAM_END, type_: MEMMAP_RAM, reserved: 0 }];
    for region in memory.iter() {
        let start = region.start_addr().raw_value().max(HIMEM_START);
        let end = region.start_addr().raw_value() + region.len();
        map.push(hvm_memmap_table_entry { addr: start, size: end - start, type_: MEMMAP_RAM, reserved: 0 });
    }
    let mut at = GuestAddress(PVH_MEMORY_MAP);
    for entry in &map {
        memory.write_obj(*entry, at)?;
        at = at.unchecked_add(size_of::<hvm_memmap_table_entry>() as u64);
    }
    let mut info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    if let Some((address, len)) = initramfs {
        let module = hvm_modlist_entry { paddr: address, size: len, ..Default::default() };
        memory.write_obj(module, GuestAddress(PVH_MODULES))?;
        info.nr_modules = 1;
        info.modlist_paddr = PVH_MODULES;
    }
    memory.write_obj(info, GuestAddress(PVH_START_INFO))
}
