//! What stands on disk about a sandbox: one folder per container under the state root, removed as a whole.
//!
//! ```text
//!   ROOT/NAME/state.json     written by rename, before the step that it describes
//!   ROOT/NAME/lock           locked by the process that owns the sandbox for as long as it lives
//!   ROOT/NAME/control.sock   answered by that process
//!   ROOT/NAME/scratch        mount point inside private mount namespaces; always empty on the host
//! ```

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What is known of a container.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct State {
    /// Name of the container, unique below one root.
    pub name: String,
    /// The image as it was asked for.
    pub image: String,
    /// The command as it runs.
    pub command: Vec<String>,
    /// Seconds since the epoch.
    pub created_at: u64,
    /// The process that owns the sandbox.
    pub owner_pid: u32,
    /// The VMM, once it runs.
    pub vmm_pid: Option<u32>,
    /// Where it is in its life.
    pub status: Status,
}

/// Life of a container.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum Status {
    /// The VM starts.
    Creating,
    /// The command runs.
    Running,
    /// The command has ended.
    Exited {
        /// Its exit status.
        exit_code: u8,
    },
}

/// Why a state folder cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// A container of this name is there.
    #[error("the name {name:?} is in use: remove that container with `vmrun rm {name}`, or choose another name")]
    NameInUse {
        /// The name.
        name: String,
    },
    /// A name that is not one.
    #[error("{name:?} is not a valid name: use letters, digits, `_`, `.` and `-`, a letter or digit first, at most 64")]
    InvalidName {
        /// What was given.
        name: String,
    },
    /// No container of this name.
    #[error("no such container: {name}")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The disk said no.
    #[error("cannot use the state folder {}", path.display())]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The folder of a container that this process owns; [`StateDir::remove`] ends it.
pub struct StateDir {
    path: PathBuf,
    _lock: File,
}

impl StateDir {
    /// Makes the folder of a new container and locks it.
    ///
    /// # Errors
    /// Each variant of [`StateError`] but `NotFound`.
    pub fn create(root: &Path, name: &str) -> Result<Self, StateError> {
        check_name(name)?;
        let path = root.join(name);
        let io_error = |source| StateError::Io { path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(io_error)?;
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists && is_orphan(&path) => {
                fs::remove_dir_all(&path).map_err(io_error)?;
                DirBuilder::new().mode(0o700).create(&path).map_err(io_error)?;
            }
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                return Err(StateError::NameInUse { name: name.to_owned() });
            }
            created => created.map_err(io_error)?,
        }
        let lock = File::create(path.join("lock")).map_err(io_error)?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| io_error(e.into()))?;
        fs::create_dir(path.join("scratch")).map_err(io_error)?;
        Ok(Self { path, _lock: lock })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Mount point for private namespaces.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.path.join("scratch")
    }

    /// Writes the state so that a reader sees the old or the new one.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn write(&self, state: &State) -> Result<(), StateError> {
        let (target, temporary) = (self.path.join("state.json"), self.path.join("state.json.new"));
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(state)?)?;
            fs::rename(&temporary, &target)
        };
        write().map_err(|source| StateError::Io { path: target.clone(), source })
    }

    /// Removes the folder.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn remove(self) -> Result<(), StateError> {
        fs::remove_dir_all(&self.path).map_err(|source| StateError::Io { path: self.path.clone(), source })
    }
}

/// A folder whose owner died before the container ended, or ended without removing it while nothing keeps it.
#[must_use]
pub fn is_orphan(path: &Path) -> bool {
    let Ok(lock) = File::open(path.join("lock")) else { return false };
    let owner_is_gone = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
    owner_is_gone && !matches!(read_dir(path), Ok(State { status: Status::Exited { .. }, .. }))
}

/// Reads the state of one container.
///
/// # Errors
/// [`StateError::InvalidName`], [`StateError::NotFound`] and [`StateError::Io`].
pub fn read(root: &Path, name: &str) -> Result<State, StateError> {
    check_name(name)?;
    let path = root.join(name);
    read_dir(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => StateError::NotFound { name: name.to_owned() },
        _ => StateError::Io { path, source },
    })
}

/// Every container below a root, in the order of their names.
///
/// # Errors
/// [`StateError::Io`] when the root cannot be read; a root that does not exist is empty.
pub fn list(root: &Path) -> Result<Vec<State>, StateError> {
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|source| StateError::Io { path: root.to_owned(), source })?,
    };
    let mut states: Vec<State> = entries.flatten().filter_map(|entry| read_dir(&entry.path()).ok()).collect();
    states.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(states)
}

fn read_dir(path: &Path) -> io::Result<State> {
    Ok(serde_json::from_slice(&fs::read(path.join("state.json"))?)?)
}

fn check_name(name: &str) -> Result<(), StateError> {
    let tail_ok = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    let head_ok = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if head_ok && tail_ok && name.len() <= 64 {
        return Ok(());
    }
    Err(StateError::InvalidName { name: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::{State, StateDir, StateError, Status, list, read};

    fn state(name: &str) -> State {
        State {
            name: name.to_owned(),
            image: "rootfs:/srv".to_owned(),
            command: vec!["true".to_owned()],
            created_at: 1,
            owner_pid: 1,
            vmm_pid: None,
            status: Status::Creating,
        }
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let root = tempfile::tempdir().expect("temporary directory");
        let dir = StateDir::create(root.path(), "one").expect("create");
        dir.write(&state("one")).expect("write");
        assert_eq!(read(root.path(), "one").expect("read"), state("one"));
        assert_eq!(list(root.path()).expect("list"), [state("one")]);
    }

    #[test]
    fn a_name_is_taken_while_its_owner_lives() {
        let root = tempfile::tempdir().expect("temporary directory");
        let _dir = StateDir::create(root.path(), "one").expect("create");
        let error = StateDir::create(root.path(), "one").err().expect("refused");
        assert!(matches!(error, StateError::NameInUse { .. }), "{error}");
    }

    #[test]
    fn the_folder_of_a_dead_owner_is_replaced() {
        let root = tempfile::tempdir().expect("temporary directory");
        drop(StateDir::create(root.path(), "one").expect("create"));
        StateDir::create(root.path(), "one").expect("the name is free again");
    }

    #[test]
    fn names_cannot_leave_the_root() {
        let root = tempfile::tempdir().expect("temporary directory");
        for name in ["..", "a/b", "", "-rf", "a\nb"] {
            let error = StateDir::create(root.path(), name).err().expect("refused");
            assert!(matches!(error, StateError::InvalidName { .. }), "{name:?}: {error}");
        }
    }
}
