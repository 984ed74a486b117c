//! Guest RAM: one file in memory, mapped below and above the hole that holds PCI windows and interrupt controllers.
//!
//! Decided: what each guest touches before its first container runs lies in large pages of the host: the kernel, what its allocator gives
//! first, and its array of pages. Because: KVM then maps it with an exit for 2 MiB, and not for 4 KiB, and loading it faults as rarely.
//! Instead of: large pages for all of RAM, which would make a guest that touches little use much.
//!
//! Decided: the file is in a tmpfs of our own, which gives large pages where they are asked for (`huge=advise`), and loses its name at
//! once. Because: a memfd has the policy of all shared memory, which is `never` on most hosts, and small pages can only be collapsed
//! (`MADV_COLLAPSE`), at 1.0 million instructions for each large one, where a fault for one takes 0.4.
#![expect(unsafe_code, reason = "mappings at addresses of our choice, and an option of the allocator")]

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::Arc;

use rustix::fs::{AtFlags, MemfdFlags, Mode, OFlags, SealFlags, openat, unlinkat};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use thiserror::Error;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::bitmap::NewBitmap as _;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Address as _, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap,
};

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
    Map(#[source] io::Error),
    /// The mapping is not what a region of guest RAM must be.
    #[error("cannot use a mapping as guest RAM")]
    Region(#[from] MmapRegionError),
    /// Regions overlap.
    #[error("cannot use mappings as guest RAM")]
    Regions(#[from] GuestRegionCollectionError),
}

/// What the host shows as the name of its mappings.
const RAM_NAME: &str = "guest-ram";
/// How RAM is mapped.
const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_SHARED | libc::MAP_NORESERVE;
/// Size of a page of the host.
const PAGE: usize = 4096;
/// Size of a large page of the host.
const LARGE_PAGE: usize = 2 << 20;
/// What a guest with our kernel touches before its first container runs, in MiB, but for large pages of which it touches few: boot
/// tables, what its allocator gives first, the kernel's code, its data.
const TOUCHED: [Range<u64>; 4] = [0..2, 8..14, 16..26, 28..34];
/// The same of a guest with 1 GiB or more, in addition.
const TOUCHED_OF_MUCH: [Range<u64>; 2] = [14..16, 36..38];
/// At the end of RAM is the array of `struct page`, 64 bytes for 4 KiB; and below it hash tables, which grow with RAM, and the rest.
const PAGES_TO_THEIR_ARRAY: u64 = 64;
const PAGES_TO_HASH_TABLES: u64 = 512;
const TABLES: u64 = 1 << 20;

/// Pages of the host under what is loaded at boot.
#[derive(Debug, Default)]
pub enum Backing {
    /// Of 4 KiB.
    #[default]
    Small,
    /// Of 2 MiB where the host has them, in this mount of a tmpfs.
    Large(OwnedFd),
}

/// Has all threads of the process allocate from one heap. They allocate little, for which each would have 128 MiB of address space
/// and pages of its own.
pub fn share_one_heap() {
    // SAFETY: it changes what later allocations of threads do, and no memory. Without it there are only more heaps.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// What the host's policy of transparent huge pages says: whoever switched them off had a reason.
#[must_use]
pub fn host_has_large_pages() -> bool {
    let policy = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    policy.is_ok_and(|policy| !policy.contains("[never]"))
}

impl Backing {
    /// Makes `size_mib` MiB of guest RAM. Pages are taken from the host when they are first touched.
    ///
    /// # Errors
    /// Each variant of [`MemoryError`].
    pub fn create(&self, size_mib: u32) -> Result<Arc<GuestMemory>, MemoryError> {
        let size = u64::from(size_mib) << 20;
        let file = self.ram_file(size).map_err(|source| MemoryError::File { size, source })?;
        let file = Arc::new(file);
        let mut mapped = Vec::new();
        let mut offset = 0;
        for (start, len) in regions(size) {
            let len = usize::try_from(len).expect("a 64-bit host");
            let region = map(&file, offset, len)?;
            mapped.push(GuestRegionMmap::new(region, GuestAddress(start)).expect("ends below 2^64"));
            offset += len as u64;
        }
        Ok(Arc::new(GuestMemory::from_regions(mapped)?))
    }

    /// A memfd's size nobody can change any more, and that of a file whose name is gone only who holds its descriptor: a mapping of
    /// it never faults for being cut short.
    fn ram_file(&self, size: u64) -> io::Result<File> {
        let file = match self {
            Self::Small => rustix::fs::memfd_create(RAM_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?,
            Self::Large(mount) => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
                let file = openat(mount, RAM_NAME, flags, Mode::RUSR | Mode::WUSR)?;
                unlinkat(mount, RAM_NAME, AtFlags::empty())?;
                file
            }
        };
        let file = File::from(file);
        file.set_len(size)?;
        if let Self::Small = self {
            rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        }
        Ok(file)
    }

    /// Has the host make these pages of what each guest touches. Only a hint.
    pub fn prepare(&self, memory: &GuestMemory) {
        if let Self::Small = self {
            return;
        }
        let size: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        let end = memory.last_addr().raw_value() + 1;
        let of_much = if size >> 30 > 0 { &TOUCHED_OF_MUCH[..] } else { &[] };
        for Range { start, end } in TOUCHED.iter().chain(of_much) {
            populate(memory, start << 20, end << 20);
        }
        populate(memory, end.saturating_sub(size / PAGES_TO_THEIR_ARRAY + size / PAGES_TO_HASH_TABLES + TABLES), end);
    }
}

/// Makes RAM of 4 KiB pages, for tests.
#[cfg(any(test, fuzzing))]
pub(crate) fn create(size_mib: u32) -> Result<Arc<GuestMemory>, MemoryError> {
    Backing::Small.create(size_mib)
}

fn populate(memory: &GuestMemory, start: u64, end: u64) {
    let size = LARGE_PAGE as u64;
    let first = start / size * size;
    let mut last = end.next_multiple_of(size);
    while last > first && !memory.address_in_range(GuestAddress(last - 1)) {
        last -= size;
    }
    let len = usize::try_from(last - first).expect("a 64-bit host");
    if let Ok(slice) = memory.get_slice(GuestAddress(first), len) {
        let start = slice.ptr_guard_mut().as_ptr().cast();
        // SAFETY: the range is mapped, and the advice changes neither its bytes nor where it is.
        let _ = unsafe { madvise(start, len, Advice::LinuxHugepage) };
        // SAFETY: as above; the guest has written nothing yet, and its pages are only taken.
        let _ = unsafe { madvise(start, len, Advice::LinuxPopulateWrite) };
    }
}

/// Takes the whole pages of a range from the guest, in which it finds zeros when it touches them again. A range that is not all RAM stays.
pub fn take_back(memory: &GuestMemory, start: GuestAddress, len: u32) {
    let Ok(slice) = memory.get_slice(start, len as usize) else { return };
    let range = slice.ptr_guard_mut().as_ptr();
    // Ranges of RAM are mapped at multiples of a page.
    let before = range.align_offset(PAGE);
    let len = (len as usize).saturating_sub(before) / PAGE * PAGE;
    if len > 0 {
        // SAFETY: these are pages of a mapping of guest RAM, whose bytes the guest may change at any time, as this does.
        let _ = unsafe { madvise(range.wrapping_add(before).cast(), len, Advice::LinuxRemove) };
    }
}

/// Maps a part of the file at a multiple of [`LARGE_PAGE`], for the lifetime of the process.
fn map(file: &Arc<File>, offset: u64, len: usize) -> Result<MmapRegion, MemoryError> {
    let failed = |error: rustix::io::Errno| MemoryError::Map(error.into());
    let room = len + LARGE_PAGE;
    // SAFETY: the kernel chooses where, so nothing that is mapped is changed.
    let reserved =
        unsafe { mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE) };
    let reserved = reserved.map_err(failed)?;
    let address = reserved.map_addr(|address| address.next_multiple_of(LARGE_PAGE));
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
    // SAFETY: the range lies in what was reserved above, which nobody else knows.
    let mapped = unsafe { mmap(address, len, prot, flags | MapFlags::FIXED, file, offset) }.map_err(failed)?;
    let builder = MmapRegionBuilder::new(len).with_file_offset(FileOffset::from_arc(file.clone(), offset));
    let builder = builder.with_mmap_prot(PROT).with_mmap_flags(FLAGS);
    // SAFETY: `len` bytes are mapped there, and nobody unmaps them.
    let builder = unsafe { builder.with_raw_mmap_pointer(mapped.cast()) };
    Ok(builder.build()?)
}

/// Guest RAM by two types.
///
/// Decided: the second for the `virtiofsd` crate only. Because: an access through it counts references and takes a lock, 45 to 70 ns where
/// one through the first takes 10 to 20, and a packet or a request has a dozen for its rings alone. Instead of: the second for all.
pub struct Views {
    /// What everybody else works with.
    pub plain: Arc<GuestMemory>,
    /// The same bytes, its ranges with bitmaps of written pages, which nobody reads.
    pub logged: GuestMemoryMmap<BitmapMmapRegion>,
}

impl Views {
    /// Adds the other view.
    ///
    /// # Errors
    /// [`MemoryError::Region`] and [`MemoryError::Regions`], which what is mapped does not cause.
    pub fn of(plain: Arc<GuestMemory>) -> Result<Self, MemoryError> {
        let mut regions = Vec::new();
        for region in plain.iter() {
            let builder = MmapRegionBuilder::new_with_bitmap(region.size(), BitmapMmapRegion::with_len(region.size()));
            let builder = builder.with_mmap_prot(PROT).with_mmap_flags(FLAGS);
            // SAFETY: it is mapped as long as `plain` is there, and dropping this unmaps nothing.
            let logged = unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) }.build()?;
            regions.push(GuestRegionMmap::new(logged, region.start_addr()).expect("ends below 2^64"));
        }
        Ok(Self { logged: GuestMemoryMmap::from_regions(regions)?, plain })
    }
}

/// Maps the first `len` bytes of a file that is not guest RAM, for the lifetime of the process; returns where.
///
/// # Errors
/// When the host refuses.
pub fn map_read_only(file: &File, len: usize) -> io::Result<u64> {
    // SAFETY: the kernel chooses where, so nothing that is mapped is changed.
    let mapped = unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::PRIVATE, file, 0) };
    Ok(mapped?.addr() as u64)
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
    use std::fs::File;

    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::{Backing, HIGH_RAM_START, PCI_HOLE_START, create, regions};

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

    /// Where the kernel's surroundings or the array of pages reach beyond RAM, or into the hole.
    #[test]
    fn large_pages_are_only_a_hint() {
        for mib in [1, 17, 25, 222, 3073] {
            // Any folder of a file system in memory.
            let backing = Backing::Large(File::open("/dev/shm").expect("a tmpfs").into());
            let memory = backing.create(mib).expect("memory");
            backing.prepare(&memory);
            assert_eq!(memory.read_obj::<u64>(GuestAddress(0)).expect("RAM"), 0, "{mib}");
        }
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
