//! Locks between processes, named, in a folder: a file that is locked for as long as its holder lives, and removed by it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// The lock of one name, released and removed when dropped.
pub(super) struct NameLock {
    path: PathBuf,
    _file: File,
}

impl NameLock {
    /// Waits for the lock.
    pub(super) fn wait(dir: &Path, name: &str) -> Result<Self> {
        loop {
            if let Some(lock) = Self::lock(dir, name, FlockOperation::LockExclusive)? {
                return Ok(lock);
            }
        }
    }

    /// The lock, unless another process has it.
    pub(super) fn attempt(dir: &Path, name: &str) -> Result<Option<Self>> {
        Self::lock(dir, name, FlockOperation::NonBlockingLockExclusive)
    }

    fn lock(dir: &Path, name: &str, operation: FlockOperation) -> Result<Option<Self>> {
        let path = dir.join(format!(".{name}.lock"));
        let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        match flock(&file, operation) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            locked => locked.with_context(|| format!("cannot lock {}", path.display()))?,
        }
        // Whoever held it before has removed the file: then a third process may have made another one.
        let is_current = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            there => there?.ino() == file.metadata()?.ino(),
        };
        // Not `then_some`: what it makes and drops would remove the file of the third.
        Ok(is_current.then(|| Self { path, _file: file }))
    }
}

impl Drop for NameLock {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a lock");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::NameLock;

    #[test]
    fn a_lock_has_one_holder_and_is_removed_by_it() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let holders = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let lock = NameLock::wait(dir.path(), "name").expect("locked");
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        assert!(lock.path.exists());
                        holders.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(dir.path().read_dir().expect("the folder").count(), 0);
    }
}
