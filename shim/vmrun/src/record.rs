//! What stands on disk of a container that this process owns: its state below the state root, and below the data root a
//! folder for what it writes and for its log.
//!
//! ```text
//!   DATA/containers/NAME.RANDOM          upper and work (overlayfs), log.json*, owner.log, network
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
use sandbox::cgroup::{CgroupError, HostCgroup};
use sandbox::io_limit::IoLimit;
use sandbox::plan::VmSize;
use sandbox::state::{self, Protection, State, StateDir, Status};

use crate::network::bridge;
use crate::random_hex;

/// Where a container's state and data stand.
#[derive(Clone, Debug)]
pub(crate) struct Folders {
    /// States of containers.
    pub(crate) root: PathBuf,
    /// Images, and data of containers.
    pub(crate) data_root: PathBuf,
    /// The cgroup that has those of VMs, as a path below the root of cgroups.
    pub(crate) cgroup_parent: PathBuf,
}

impl Folders {
    /// The cgroup of the VM of a container with this data folder, whose name no other has.
    pub(crate) fn cgroup_of(&self, data_dir: &Path) -> Option<HostCgroup> {
        HostCgroup::below(&self.cgroup_parent, data_dir.file_name()?.to_str()?)
    }
}

/// What a container is to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) name: &'a str,
    pub(crate) image: &'a str,
    pub(crate) command: &'a [String],
    pub(crate) auto_remove: bool,
    /// What it may do without.
    pub(crate) degraded: &'a [Protection],
    pub(crate) io_limits: &'a [IoLimit],
}

/// The state and data of a container of ours.
pub(crate) struct Record {
    dir: StateDir,
    state: RefCell<State>,
}

impl Record {
    /// Takes the name and makes the folders.
    pub(crate) fn create(folders: &Folders, wanted: Wanted<'_>) -> Result<Self> {
        let Wanted { name, image, command, auto_remove, degraded, io_limits } = wanted;
        let root = std::path::absolute(&folders.root)?;
        let containers = std::path::absolute(&folders.data_root)?.join("containers");
        let data_dir = containers.join(format!("{name}.{}", random_hex(4)));
        let cgroup = folders.cgroup_of(&data_dir).with_context(|| {
            format!("{} is not the path of a cgroup: see --cgroup-parent", folders.cgroup_parent.display())
        })?;
        let state = State {
            name: name.to_owned(),
            image: image.to_owned(),
            command: command.to_vec(),
            created_at_ms: now_ms(),
            started_at_ms: None,
            finished_at_ms: None,
            owner_pid: std::process::id(),
            vmm_pid: None,
            data_dir,
            cgroup: (!degraded.contains(&Protection::Cgroup)).then(|| cgroup.path().to_owned()),
            degraded: degraded.to_vec(),
            io_limits: io_limits.to_vec(),
            auto_remove,
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

    /// Makes the cgroup of the VM, unless it does without.
    pub(crate) fn create_cgroup(&self, size: VmSize) -> Result<Option<HostCgroup>, CgroupError> {
        let cgroup = self.cgroup();
        cgroup.iter().try_for_each(|cgroup| cgroup.create_limited(size, &self.state.borrow().io_limits))?;
        Ok(cgroup)
    }

    /// The cgroup of its VM, until that has ended.
    pub(crate) fn cgroup(&self) -> Option<HostCgroup> {
        self.state.borrow().cgroup.clone().map(HostCgroup::at)
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
        self.cgroup().iter().for_each(HostCgroup::remove_with_parent);
        if let Err(error) = bridge::remove(&self.data_dir()) {
            tracing::warn!(error = format!("{error:#}"), "the network stays until the container is removed");
        }
        self.update(|state| {
            state.cgroup = None;
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
        self.cgroup().iter().for_each(HostCgroup::remove_with_parent);
        let data_dir = self.data_dir();
        remove_data_dir(&data_dir)?;
        Ok(self.dir.remove()?)
    }
}

/// Removes the data of a container whose state is gone or is about to be.
pub(crate) fn remove_data_dir(data_dir: &Path) -> Result<()> {
    bridge::remove(data_dir)?;
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
    use std::os::unix::fs::PermissionsExt as _;

    use sandbox::state::{self, Status};

    use super::{Folders, Record, Wanted, orphaned_data_dirs};

    const WANTED: Wanted<'_> =
        Wanted { name: "one", image: "image", command: &[], auto_remove: false, degraded: &[], io_limits: &[] };

    fn folders(dir: &tempfile::TempDir) -> Folders {
        let [root, data_root] = ["run", "data"].map(|folder| dir.path().join(folder));
        Folders { root, data_root, cgroup_parent: "/vmrun-test".into() }
    }

    #[test]
    fn a_removed_record_leaves_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let folders = folders(&dir);
        let record = Record::create(&folders, WANTED).expect("record");
        assert!(record.data_dir().is_dir());
        record.remove().expect("removed");
        assert_eq!(fs::read_dir(&folders.root).expect("root").count(), 0);
        assert_eq!(fs::read_dir(folders.data_root.join("containers")).expect("data").count(), 0);
    }

    #[test]
    fn other_users_of_the_host_have_no_way_to_the_files_of_a_container() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let folders = folders(&dir);
        let record = Record::create(&folders, WANTED).expect("record");
        let containers = folders.data_root.join("containers");
        for folder in [&folders.root, &folders.data_root, &containers, &record.data_dir()] {
            let mode = fs::metadata(folder).expect("a folder").permissions().mode();
            assert_eq!(mode & 0o7777, 0o700, "{}", folder.display());
        }
        record.remove().expect("removed");
    }

    #[test]
    fn data_that_no_state_names_is_found() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let folders = folders(&dir);
        let record = Record::create(&folders, WANTED).expect("record");
        let data_dir = record.data_dir();
        record.keep(Status::Exited { exit_code: 0, oom_killed: false }, None).expect("kept");
        assert!(orphaned_data_dirs(&folders.data_root).is_empty());
        drop(record);
        state::remove(&folders.root, "one").expect("removed");
        assert_eq!(orphaned_data_dirs(&folders.data_root), [data_dir]);
    }
}
