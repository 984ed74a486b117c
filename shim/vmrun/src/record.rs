//! What stands on disk of a container that this process owns: its state below the state root, and below the data root a
//! folder for what it writes and for its log.
//!
//! ```text
//!   DATA/containers/NAME.RANDOM          upper and work (overlayfs), log.json*, owner.log
//!   DATA/containers/NAME.RANDOM.state    link to the state folder; made first, removed last
//! ```
//! A data folder that its state does not name was left by a process that was killed; `gc` removes it.

use std::cell::RefCell;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use oci_spec::runtime::Spec;
use sandbox::state::{self, State, StateDir, Status};

use crate::random_hex;

/// Where a container's state and data stand.
#[derive(Clone, Debug)]
pub(crate) struct Folders {
    /// States of containers.
    pub(crate) root: PathBuf,
    /// Images, and data of containers.
    pub(crate) data_root: PathBuf,
}

/// The state and data of a container of ours.
pub(crate) struct Record {
    dir: StateDir,
    state: RefCell<State>,
}

impl Record {
    /// Takes the name and makes the folders.
    pub(crate) fn create(folders: &Folders, name: &str, image: &str, command: &[String], rm: bool) -> Result<Self> {
        let root = std::path::absolute(&folders.root)?;
        let containers = std::path::absolute(&folders.data_root)?.join("containers");
        let state = State {
            name: name.to_owned(),
            image: image.to_owned(),
            command: command.to_vec(),
            created_at_ms: now_ms(),
            started_at_ms: None,
            finished_at_ms: None,
            owner_pid: std::process::id(),
            vmm_pid: None,
            data_dir: containers.join(format!("{name}.{}", random_hex(4))),
            auto_remove: rm,
            error: None,
            status: Status::Creating,
        };
        let record = Self { dir: StateDir::create(&root, &state)?, state: RefCell::new(state) };
        match record.create_data_dir(&containers) {
            Ok(()) => Ok(record),
            Err(error) => {
                record.remove()?;
                Err(error)
            }
        }
    }

    fn create_data_dir(&self, containers: &Path) -> Result<()> {
        let data_dir = self.data_dir();
        let context = || format!("cannot make the folder {}", data_dir.display());
        DirBuilder::new().recursive(true).mode(0o700).create(containers).with_context(context)?;
        symlink(self.dir.path(), link(&data_dir)).with_context(context)?;
        DirBuilder::new().mode(0o700).create(&data_dir).with_context(context)
    }

    pub(crate) fn dir(&self) -> &StateDir {
        &self.dir
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.state.borrow().data_dir.clone()
    }

    pub(crate) fn control_socket(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    /// Changes the state, on disk first of all.
    pub(crate) fn update(&self, change: impl FnOnce(&mut State)) -> Result<()> {
        let mut state = self.state.borrow_mut();
        change(&mut state);
        Ok(self.dir.write(&state)?)
    }

    /// Keeps an ended container for `logs`, `inspect` and `rm`.
    pub(crate) fn keep(&self, status: Status, error: Option<String>) -> Result<()> {
        self.update(|state| {
            state.finished_at_ms = Some(now_ms());
            state.error = error;
            state.status = status;
        })
    }

    /// Keeps the OCI spec for `inspect`.
    pub(crate) fn write_spec(&self, spec: &Spec) -> Result<()> {
        let path = self.dir.path().join("config.json");
        fs::write(&path, serde_json::to_vec(spec)?).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Removes everything.
    pub(crate) fn remove(&self) -> Result<()> {
        let data_dir = self.data_dir();
        remove_data_dir(&data_dir)?;
        Ok(self.dir.remove()?)
    }
}

/// Removes the data of a container whose state is gone or is about to be.
pub(crate) fn remove_data_dir(data_dir: &Path) -> Result<()> {
    let context = || format!("cannot remove {}", data_dir.display());
    if_there(fs::remove_dir_all(data_dir)).with_context(context)?;
    if_there(fs::remove_file(link(data_dir))).with_context(context)
}

fn if_there(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Data folders that no state names.
pub(crate) fn orphaned_data_dirs(data_root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(data_root.join("containers")).into_iter().flatten().flatten();
    let links = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "state"));
    links.map(|link| link.with_extension("")).filter(|data_dir| !is_named(data_dir)).collect()
}

fn is_named(data_dir: &Path) -> bool {
    let Ok(dir) = fs::read_link(link(data_dir)) else { return false };
    let (Some(root), Some(name)) = (dir.parent(), dir.file_name()) else { return false };
    let known = state::read(root, &name.to_string_lossy());
    known.is_ok_and(|state| state.data_dir.file_name() == data_dir.file_name())
}

fn link(data_dir: &Path) -> PathBuf {
    let mut name = data_dir.as_os_str().to_owned();
    name.push(".state");
    name.into()
}

/// Milliseconds since the epoch.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use sandbox::state::{self, Status};

    use super::{Folders, Record, orphaned_data_dirs};

    fn folders(dir: &tempfile::TempDir) -> Folders {
        Folders { root: dir.path().join("run"), data_root: dir.path().join("data") }
    }

    #[test]
    fn a_removed_record_leaves_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let folders = folders(&dir);
        let record = Record::create(&folders, "one", "image", &[], true).expect("record");
        assert!(record.data_dir().is_dir());
        record.remove().expect("removed");
        assert_eq!(fs::read_dir(&folders.root).expect("root").count(), 0);
        assert_eq!(fs::read_dir(folders.data_root.join("containers")).expect("data").count(), 0);
    }

    #[test]
    fn data_that_no_state_names_is_found() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let folders = folders(&dir);
        let record = Record::create(&folders, "one", "image", &[], false).expect("record");
        let data_dir = record.data_dir();
        record.keep(Status::Exited { exit_code: 0, oom_killed: false }, None).expect("kept");
        assert!(orphaned_data_dirs(&folders.data_root).is_empty());
        drop(record);
        state::remove(&folders.root, "one").expect("removed");
        assert_eq!(orphaned_data_dirs(&folders.data_root), [data_dir]);
    }
}
