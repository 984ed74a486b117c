//! Guest RAM: one sealed memfd, mapped below and above the hole that holds PCI windows and interrupt controllers.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use vm_memory::{FileOffset, GuestAddress};

use crate::arch::layout::{HIGH_RAM_START, PCI_HOLE_START};
use crate::virtio::GuestMemory;

/// Why there is no guest RAM.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The host refused the file.
    #[error("cannot make {size} bytes of guest RAM")]
    File {
        /// What was asked for.
        size: u64,
        /// Why.
        source: io::Error,
    },
    /// The host refused the mapping.
    #[error("cannot map guest RAM")]
    Map(#[source] vm_memory::mmap::FromRangesError),
}

/// Makes `size_mib` MiB of guest RAM. Pages are taken from the host when they are first touched.
///
/// # Errors
/// Each variant of [`MemoryError`].
pub fn create(size_mib: u32) -> Result<Arc<GuestMemory>, MemoryError> {
    let size = u64::from(size_mib) << 20;
    let file = ram_file(size).map_err(|source| MemoryError::File { size, source })?;
    let file = Arc::new(file);
    let mut ranges = Vec::new();
    let mut offset = 0;
    for (start, len) in regions(size) {
        let len = usize::try_from(len).expect("a 64-bit host");
        ranges.push((GuestAddress(start), len, Some(FileOffset::from_arc(file.clone(), offset))));
        offset += len as u64;
    }
    Ok(Arc::new(GuestMemory::from_ranges_with_files(ranges).map_err(MemoryError::Map)?))
}

/// A file whose size nobody can change any more: a mapping of it never faults for being cut short.
fn ram_file(size: u64) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(size)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

/// Guest-physical start and length of each range of RAM.
fn regions(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(PCI_HOLE_START);
    let high = size - low;
    let mut regions = vec![(0, low)];
    if high > 0 {
        regions.push((HIGH_RAM_START, high));
    }
    regions
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{HIGH_RAM_START, PCI_HOLE_START, create, regions};

    #[test]
    fn small_ram_is_one_range() {
        assert_eq!(regions(512 << 20), [(0, 512 << 20)]);
    }

    #[test]
    fn large_ram_leaves_the_hole_free() {
        assert_eq!(regions(4 << 30), [(0, PCI_HOLE_START), (HIGH_RAM_START, 1 << 30)]);
    }

    #[test]
    fn ram_is_mapped_and_sparse() {
        let memory = create(4096 + 64).expect("memory");
        assert_eq!(vm_memory::GuestMemory::num_regions(&*memory), 2);
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_and_none_lies_in_the_hole(mib in 64_u64..1 << 20) {
            let regions = regions(mib << 20);
            prop_assert_eq!(regions.iter().map(|(_, len)| len).sum::<u64>(), mib << 20);
            for (start, len) in regions {
                prop_assert!(start + len <= PCI_HOLE_START || start >= HIGH_RAM_START);
            }
        }
    }
}
