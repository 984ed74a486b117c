//! The guest's root file system: a file of the host, mapped into the VM as memory that it can read and execute but not write.
//!
//! Decided: the guest executes its agent out of the host's page cache. Because: all VMs of a host have these pages in
//! common, nothing is copied or unpacked at boot, and a page that the guest never uses is never read. Instead of: an
//! initramfs, which is copied to RAM, unpacked there and freed: three exits and two copies for each page.
//!
//! It is not part of guest RAM: a device that is told to read or write here finds no memory.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use thiserror::Error;

use crate::arch::layout::{ROOT_IMAGE_END, ROOT_IMAGE_START};
use crate::memory;

/// By how much Linux maps persistent memory.
const ALIGNMENT: u64 = 2 << 20;

/// Why a file cannot be the root of the guest.
#[derive(Debug, Error)]
pub enum RootImageError {
    /// Its size.
    #[error(
        "the root image has {size} bytes and must have a multiple of 2 MiB, at most {} MiB: build it with `rootfs`",
        (ROOT_IMAGE_END - ROOT_IMAGE_START) >> 20
    )]
    Size {
        /// What it is.
        size: u64,
    },
    /// The host refused its size or the mapping.
    #[error("cannot map the root image")]
    Map(#[source] io::Error),
}

/// A mapping of the file, read-only, for the lifetime of the process.
#[derive(Clone, Copy, Debug)]
pub struct RootImage {
    /// Where it is in this process.
    pub address: u64,
    /// How long it is, in bytes.
    pub size: u64,
}

impl RootImage {
    /// Maps the file and closes it. Whoever replaces it must do so by renaming: what is written to it, guests see.
    ///
    /// # Errors
    /// Each variant of [`RootImageError`].
    pub fn map(file: OwnedFd) -> Result<Self, RootImageError> {
        let file = File::from(file);
        let size = file.metadata().map_err(RootImageError::Map)?.len();
        let fits = size > 0 && size.is_multiple_of(ALIGNMENT) && size <= ROOT_IMAGE_END - ROOT_IMAGE_START;
        let len = usize::try_from(size).ok().filter(|_| fits).ok_or(RootImageError::Size { size })?;
        let address = memory::map_read_only(&file, len).map_err(RootImageError::Map)?;
        Ok(Self { address, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> OwnedFd {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(len).expect("its length");
        file.into()
    }

    #[test]
    fn whole_multiples_that_fit_are_taken() {
        assert_eq!(RootImage::map(file(4 << 20)).expect("mapped").size, 4 << 20);
        for size in [0, 4096, (2 << 20) + 1, ROOT_IMAGE_END - ROOT_IMAGE_START + (2 << 20)] {
            let error = RootImage::map(file(size)).expect_err("refused");
            assert!(matches!(error, RootImageError::Size { size: named } if named == size));
        }
    }
}
