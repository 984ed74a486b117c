//! What stands on disk about a container: one folder each under the state root, removed as a whole.
//!
//! ```text
//!   ROOT/                    locked while a name is taken or given back, so that each step is one for everybody else
//!   ROOT/NAME/state.json     written by rename, before the step that it describes
//!   ROOT/NAME/lock           locked by the process that owns the container for as long as it lives
//!   ROOT/NAME/control.sock   answered by that process
//!   ROOT/NAME/scratch        mount point inside private mount namespaces; always empty on the host
//!
//!   Creating ─► Running ◄─► Paused        owner lives
//!       └──────────┴──────────┴─► Exited  stays until `rm`
//!   any but Exited, owner gone: an orphan, for `gc`
//! ```

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::io_limit::IoLimit;

/// What is known of a container.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct State {
    /// Name of the container, unique below one root.
    pub name: String,
    /// The image as it was asked for.
    pub image: String,
    /// The command as it runs.
    pub command: Vec<String>,
    /// Milliseconds since the epoch.
    pub created_at_ms: u64,
    /// When the command was started.
    pub started_at_ms: Option<u64>,
    /// When the command had ended.
    pub finished_at_ms: Option<u64>,
    /// The process that owns the sandbox.
    pub owner_pid: u32,
    /// The VMM, once it runs.
    pub vmm_pid: Option<u32>,
    /// Folder of what the container writes and of its log.
    pub data_dir: PathBuf,
    /// The cgroup of its VM on the host, until that has ended.
    pub cgroup: Option<PathBuf>,
    /// Protections that its VM does without, because whoever ran it allowed that.
    #[serde(default)]
    pub degraded: Vec<Protection>,
    /// What its VM may read from disks of the host and write to them.
    #[serde(default)]
    pub io_limits: Vec<IoLimit>,
    /// Whether it is removed when it exits.
    pub auto_remove: bool,
    /// Why it ended, when its command alone does not say.
    pub error: Option<String>,
    /// Where it is in its life.
    #[serde(flatten)]
    pub status: Status,
}

/// A protection of the host that a VM can do without.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protection {
    /// Its cgroup, with the limits of all that it costs.
    Cgroup,
}

/// Life of a container.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum Status {
    /// The VM starts.
    Creating,
    /// The command runs.
    Running,
    /// The command is frozen.
    Paused,
    /// The command has ended.
    Exited {
        /// Its exit status.
        exit_code: u8,
        /// The guest's kernel killed it for its memory.
        oom_killed: bool,
    },
}

impl Status {
    /// Whether the container is over.
    #[must_use]
    pub fn is_exited(self) -> bool {
        matches!(self, Self::Exited { .. })
    }
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
    /// A container that runs cannot be removed.
    #[error("container {name} is running: stop it first, or use `vmrun rm -f {name}`")]
    Owned {
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

impl StateError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// The folder of a container that this process owns; [`StateDir::remove`] ends it.
pub struct StateDir {
    path: PathBuf,
    _lock: File,
}

impl StateDir {
    /// Takes the name of a new container: makes its folder, locks it and writes its first state.
    ///
    /// # Errors
    /// [`StateError::InvalidName`], [`StateError::NameInUse`] and [`StateError::Io`].
    pub fn create(root: &Path, state: &State) -> Result<Self, StateError> {
        check_name(&state.name)?;
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(StateError::io(root))?;
        let _root_lock = lock_root(root)?;
        let path = root.join(&state.name);
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                if !is_orphan(&path) {
                    return Err(StateError::NameInUse { name: state.name.clone() });
                }
                fs::remove_dir_all(&path).map_err(StateError::io(&path))?;
                DirBuilder::new().mode(0o700).create(&path).map_err(StateError::io(&path))?;
            }
            created => created.map_err(StateError::io(&path))?,
        }
        let lock = File::create(path.join("lock")).map_err(StateError::io(&path))?;
        // Others hold this lock for a moment at most, to see whether it is free.
        let locked = rustix::fs::flock(&lock, FlockOperation::LockExclusive);
        locked.map_err(|error| StateError::Io { path: path.clone(), source: error.into() })?;
        let dir = Self { path, _lock: lock };
        fs::create_dir(dir.scratch()).map_err(StateError::io(&dir.path))?;
        dir.write(state)?;
        Ok(dir)
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
        write().map_err(StateError::io(&target))
    }

    /// Removes the folder.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn remove(&self) -> Result<(), StateError> {
        let _root_lock = lock_root(self.path.parent().unwrap_or(Path::new("/")))?;
        fs::remove_dir_all(&self.path).map_err(StateError::io(&self.path))
    }
}

/// Held for a few system calls at a time, so nobody waits long.
fn lock_root(root: &Path) -> Result<File, StateError> {
    let dir = File::open(root).map_err(StateError::io(root))?;
    rustix::fs::flock(&dir, FlockOperation::LockExclusive).map_err(|e| StateError::io(root)(e.into()))?;
    Ok(dir)
}

/// Whether nobody owns the container in this folder. The root must be locked, or the answer may be old at once.
fn owner_is_gone(path: &Path) -> bool {
    // A folder without a lock was left by a process that was killed while it made the folder.
    let Ok(lock) = File::open(path.join("lock")) else { return true };
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_ok()
}

/// A folder whose owner died before the container ended.
fn is_orphan(path: &Path) -> bool {
    owner_is_gone(path) && !read_dir(path).is_ok_and(|state| state.status.is_exited())
}

/// Names of the containers whose owner was killed.
///
/// # Errors
/// [`StateError::Io`].
pub fn orphans(root: &Path) -> Result<Vec<String>, StateError> {
    let Some(entries) = entries(root)? else { return Ok(Vec::new()) };
    let _root_lock = lock_root(root)?;
    let name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    Ok(entries.iter().filter(|path| is_orphan(path)).filter_map(name).collect())
}

/// Gives back the name of a container that has exited, or whose owner is gone; returns what was known of it.
///
/// # Errors
/// [`StateError::NotFound`], [`StateError::Owned`], [`StateError::InvalidName`] and [`StateError::Io`].
pub fn remove(root: &Path, name: &str) -> Result<Option<State>, StateError> {
    check_name(name)?;
    let not_found = || StateError::NotFound { name: name.to_owned() };
    let path = root.join(name);
    if !path.exists() {
        return Err(not_found());
    }
    let _root_lock = lock_root(root)?;
    let state = read_dir(&path).ok();
    // An owner writes `Exited` as its last act on this folder, so it need not be gone by then.
    if !state.as_ref().is_some_and(|state| state.status.is_exited()) && !owner_is_gone(&path) {
        return Err(StateError::Owned { name: name.to_owned() });
    }
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(not_found()),
        removed => removed.map(|()| state).map_err(StateError::io(&path)),
    }
}

/// Whether the process that owns a container still lives.
#[must_use]
pub fn is_owned(root: &Path, name: &str) -> bool {
    !owner_is_gone(&root.join(name))
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
    let entries = entries(root)?.unwrap_or_default();
    let mut states: Vec<State> = entries.iter().filter_map(|path| read_dir(path).ok()).collect();
    states.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(states)
}

fn entries(root: &Path) -> Result<Option<Vec<PathBuf>>, StateError> {
    match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => {
            let entries = other.map_err(StateError::io(root))?;
            Ok(Some(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()))
        }
    }
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
mod tests;
