//! `vmrun rm` and `gc`: what containers leave behind, removed.

use std::io::{self, Write as _};
use std::path::Path;

use anyhow::Result;
use sandbox::cgroup::HostCgroup;
use sandbox::state::{self, StateError};

use crate::client::ConnectError;
use crate::for_each;
use crate::record::{Folders, orphaned_data_dirs, remove_data_dir};
use crate::stop::{kill_container, kill_owner};

pub(crate) fn rm(root: &Path, force: bool, names: &[String]) -> Result<u8> {
    for_each(names, |name| {
        if force {
            end(root, name)?;
        }
        match remove(root, name) {
            // It was run with --rm, so its end was its removal.
            Err(error) if force && matches!(error.downcast_ref(), Some(StateError::NotFound { .. })) => {}
            other => other?,
        }
        Ok(writeln!(io::stdout(), "{name}")?)
    })
}

/// Ends a container that may run.
fn end(root: &Path, name: &str) -> Result<()> {
    match kill_container(root, name).map_err(|error| error.downcast::<ConnectError>()) {
        Ok(()) => Ok(()),
        Err(Ok(ConnectError::NotRunning(state))) if state.status.is_exited() => Ok(()),
        // Its VM starts; its owner does not listen yet.
        Err(Ok(ConnectError::NotRunning(_))) => kill_owner(root, name),
        Err(Ok(ConnectError::Orphaned { .. })) => Ok(()),
        Err(Ok(error)) => Err(error.into()),
        Err(Err(error)) => Err(error),
    }
}

fn remove(root: &Path, name: &str) -> Result<()> {
    // The name first: from then on nobody else finds the data.
    match state::remove(root, name)? {
        Some(state) => {
            // Its VM may be about to end with its killed owner.
            state.cgroup.map(HostCgroup::at).iter().for_each(HostCgroup::remove_with_parent);
            remove_data_dir(&state.data_dir)
        }
        None => Ok(()),
    }
}

/// Removes the containers whose owner was killed, and data that no container has. Their VMs ended with their owners.
pub(crate) fn gc(folders: &Folders) -> Result<u8> {
    let orphans = state::orphans(&folders.root)?;
    let code = for_each(&orphans, |name| match remove(&folders.root, name) {
        // Somebody else was faster.
        Err(error) if matches!(error.downcast_ref(), Some(StateError::NotFound { .. } | StateError::Owned { .. })) => {
            Ok(())
        }
        removed => removed.and_then(|()| Ok(writeln!(io::stdout(), "{name}")?)),
    })?;
    for data_dir in orphaned_data_dirs(&folders.data_root) {
        folders.cgroup_of(&data_dir).iter().for_each(HostCgroup::remove_with_parent);
        remove_data_dir(&data_dir)?;
    }
    Ok(code)
}
