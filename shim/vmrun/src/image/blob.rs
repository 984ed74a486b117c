//! Bytes of an image, wherever they are: files of a layout, or parts of an archive.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};

use super::digest::Digest;

/// Longest index, manifest or configuration, in bytes.
const MAX_DOCUMENT_LEN: u64 = 4 << 20;

/// A part of a file, read from its beginning to its end.
#[derive(Clone, Debug)]
pub(super) struct Section {
    file: Arc<File>,
    position: u64,
    end: u64,
}

impl Section {
    /// A part of an open file.
    pub(super) fn new(file: Arc<File>, start: u64, len: u64) -> Self {
        Self { file, position: start, end: start.saturating_add(len) }
    }

    /// A whole file.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            bail!("{} is not a regular file", path.display());
        }
        Ok(Self::new(Arc::new(file), 0, metadata.len()))
    }

    /// Bytes that are left to read.
    pub(super) fn len(&self) -> u64 {
        self.end - self.position
    }

    /// Reads a document whole.
    pub(super) fn read_document(mut self) -> Result<Vec<u8>> {
        if self.len() > MAX_DOCUMENT_LEN {
            bail!(
                "{} bytes are more than an index, manifest or configuration may have, {MAX_DOCUMENT_LEN}",
                self.len()
            );
        }
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a document whole and checks its digest.
    pub(super) fn read_verified(self, digest: &Digest) -> Result<Vec<u8>> {
        let bytes = self.read_document()?;
        digest.verify(&Digest::of(&bytes))?;
        Ok(bytes)
    }
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.len()).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..most], self.position)?;
        if count == 0 && most > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than it says"));
        }
        self.position += count as u64;
        Ok(count)
    }
}
