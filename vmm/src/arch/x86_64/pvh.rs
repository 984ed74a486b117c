//! The PVH boot protocol (Xen's `start_info.h`, boot ABI version 1): where the kernel finds its command line and its
//! memory map.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion as _};

use super::layout::{COMMAND_LINE, HIMEM_START, LOW_RAM_END, PVH_MEMORY_MAP, PVH_START_INFO, ROOT_IMAGE_START};
use crate::virtio::GuestMemory;

const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;
const MEMMAP_RAM: u32 = 1;
/// Linux makes a pmem device of such a range (E820_TYPE_PRAM), without probing a bus.
const MEMMAP_PERSISTENT: u32 = 12;

/// Writes the start info; `root_image_size` is that of the root image, in bytes.
///
/// # Errors
/// When guest RAM is too small.
pub fn write_start_info(memory: &GuestMemory, root_image_size: Option<u64>) -> Result<(), GuestMemoryError> {
    let mut map = vec![hvm_memmap_table_entry { addr: 0, size: LOW_RAM_END, type_: MEMMAP_RAM, reserved: 0 }];
    for region in memory.iter() {
        let start = region.start_addr().raw_value().max(HIMEM_START);
        let end = region.start_addr().raw_value() + region.len();
        map.push(hvm_memmap_table_entry { addr: start, size: end - start, type_: MEMMAP_RAM, reserved: 0 });
    }
    if let Some(size) = root_image_size {
        map.push(hvm_memmap_table_entry { addr: ROOT_IMAGE_START, size, type_: MEMMAP_PERSISTENT, reserved: 0 });
    }
    let mut at = GuestAddress(PVH_MEMORY_MAP);
    for entry in &map {
        memory.write_obj(*entry, at)?;
        at = at.unchecked_add(size_of::<hvm_memmap_table_entry>() as u64);
    }
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(PVH_START_INFO))
}

#[cfg(test)]
mod tests {
    use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::super::layout::{HIGH_RAM_START, PCI_HOLE_START, ROOT_IMAGE_START};
    use super::{HIMEM_START, LOW_RAM_END, PVH_MEMORY_MAP, PVH_START_INFO, write_start_info};

    fn memory_map(memory_mib: u32, root_image_size: Option<u64>) -> Vec<(u64, u64, u32)> {
        let memory = crate::memory::create(memory_mib).expect("memory");
        write_start_info(&memory, root_image_size).expect("written");
        let info: hvm_start_info = memory.read_obj(GuestAddress(PVH_START_INFO)).expect("in RAM");
        assert_eq!((info.magic, info.memmap_paddr, info.nr_modules), (0x336e_c578, PVH_MEMORY_MAP, 0));
        let entry = |index: u32| -> hvm_memmap_table_entry {
            memory.read_obj(GuestAddress(PVH_MEMORY_MAP + u64::from(index) * 24)).expect("in RAM")
        };
        (0..info.memmap_entries).map(|index| (entry(index).addr, entry(index).size, entry(index).type_)).collect()
    }

    #[test]
    fn the_root_image_is_persistent_memory() {
        assert_eq!(memory_map(64, Some(2 << 20)).last(), Some(&(ROOT_IMAGE_START, 2 << 20, 12)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn the_map_is_all_ram_but_the_reserved_area_and_nothing_else(memory_mib in 64_u32..8192) {
            let map = memory_map(memory_mib, None);
            let total: u64 = map.iter().map(|(_, size, _)| size).sum();
            prop_assert_eq!(total, (u64::from(memory_mib) << 20) - (HIMEM_START - LOW_RAM_END));
            prop_assert!(map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "sorted, no overlap: {:x?}", map);
            prop_assert!(map.iter().all(|(start, size, _)| start + size <= PCI_HOLE_START || *start >= HIGH_RAM_START));
        }
    }
}
