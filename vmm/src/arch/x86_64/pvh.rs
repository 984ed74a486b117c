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

#[cfg(test)]
mod tests {
    use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::super::layout::{HIGH_RAM_START, PCI_HOLE_START};
    use super::{HIMEM_START, LOW_RAM_END, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO, write_start_info};

    fn memory_map(memory_mib: u32) -> Vec<(u64, u64)> {
        let memory = crate::memory::create(memory_mib).expect("memory");
        write_start_info(&memory, None).expect("written");
        let info: hvm_start_info = memory.read_obj(GuestAddress(PVH_START_INFO)).expect("in RAM");
        assert_eq!((info.magic, info.memmap_paddr, info.nr_modules), (0x336e_c578, PVH_MEMORY_MAP, 0));
        let entry = |index: u32| -> hvm_memmap_table_entry {
            memory.read_obj(GuestAddress(PVH_MEMORY_MAP + u64::from(index) * 24)).expect("in RAM")
        };
        (0..info.memmap_entries).map(|index| (entry(index).addr, entry(index).size)).collect()
    }

    #[test]
    fn the_initramfs_is_the_only_module() {
        let memory = crate::memory::create(64).expect("memory");
        write_start_info(&memory, Some((0x30_0000, 77))).expect("written");
        let info: hvm_start_info = memory.read_obj(GuestAddress(PVH_START_INFO)).expect("in RAM");
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(PVH_MODULES)).expect("in RAM");
        assert_eq!((info.nr_modules, info.modlist_paddr, module.paddr, module.size), (1, PVH_MODULES, 0x30_0000, 77));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn the_map_is_all_ram_but_the_reserved_area_and_nothing_else(memory_mib in 64_u32..8192) {
            let map = memory_map(memory_mib);
            let total: u64 = map.iter().map(|(_, size)| size).sum();
            prop_assert_eq!(total, (u64::from(memory_mib) << 20) - (HIMEM_START - LOW_RAM_END));
            prop_assert!(map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "sorted, no overlap: {:x?}", map);
            prop_assert!(map.iter().all(|(start, size)| start + size <= PCI_HOLE_START || *start >= HIGH_RAM_START));
        }
    }
}
