//! Which files stayed as they were since the guest last opened them: those may keep their pages in the guest's cache.
//!
//! Without the flag that says so, Linux drops a file's pages at each open, also those that running programs are mapped
//! from. A change that the host makes within one tick of its clock after the guest's open is seen as late as the next one.

use std::collections::HashMap;
use std::sync::Mutex;

use virtiofsd::fuse::Attr;

use crate::event_loop::lock;

/// Size, modification and status change.
type Stamp = (u64, (u64, u32), (u64, u32));

/// Files that were opened, until the guest forgets them. There are no more of them than inodes that it holds.
#[derive(Default)]
pub(super) struct OpenedFiles(Mutex<HashMap<u64, Stamp>>);

impl OpenedFiles {
    /// Notes an open, and returns whether the file is as it was at the one before.
    pub(super) fn note(&self, inode: u64, attr: &Attr) -> bool {
        let stamp = (attr.size, (attr.mtime, attr.mtimensec), (attr.ctime, attr.ctimensec));
        lock(&self.0).insert(inode, stamp) == Some(stamp)
    }

    /// The guest forgot one of its references to the inode, perhaps the last.
    pub(super) fn forget(&self, inode: u64) {
        lock(&self.0).remove(&inode);
    }

    /// The guest forgot everything.
    pub(super) fn clear(&self) {
        lock(&self.0).clear();
    }
}

#[cfg(test)]
mod tests {
    use virtiofsd::fuse::Attr;

    use super::OpenedFiles;

    #[test]
    fn a_file_is_unchanged_when_size_and_times_are_those_of_the_last_open() {
        let files = OpenedFiles::default();
        let old = Attr { size: 1, mtime: 7, ..Attr::default() };
        assert!(!files.note(2, &old), "the first open");
        assert!(files.note(2, &old));
        assert!(!files.note(3, &old), "another file");
        for new in [Attr { size: 2, ..old }, Attr { mtimensec: 1, ..old }, Attr { ctime: 8, ..old }] {
            assert!(!files.note(2, &new));
            assert!(files.note(2, &new));
        }
        files.forget(2);
        assert!(!files.note(2, &old));
    }
}
