//! Network namespaces with a path, and work in them: on a thread of its own, which enters one and ends with the work.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::Handle;
use rustix::fs::{FsWord, fstat, fstatfs, statfs};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use super::NetworkError;

/// Magic number of the file system of namespaces (linux/magic.h).
const NSFS_MAGIC: FsWord = 0x6e73_6673;

/// Makes a namespace that stays until [`remove`] at `path`, where nothing may be yet.
///
/// # Errors
/// When the host refuses; the file may be there then.
pub fn create(path: &Path) -> Result<(), NetworkError> {
    let action = || format!("make the network namespace {}", path.display());
    File::create_new(path).map_err(NetworkError::host(action()))?;
    on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| NetworkError::host(action())(error.into()))?;
        mount_bind("/proc/thread-self/ns/net", path).map_err(|error| NetworkError::host(action())(error.into()))
    })
}

/// Whether a namespace is at `path`, and not only the file that it was mounted on.
#[must_use]
pub fn is_there(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.f_type == NSFS_MAGIC)
}

/// Removes what [`create`] made, all of it or a part.
///
/// # Errors
/// When the host refuses.
pub fn remove(path: &Path) -> Result<(), NetworkError> {
    let failed = |error| NetworkError::host(format!("remove the network namespace {}", path.display()))(error);
    match unmount(path, UnmountFlags::DETACH) {
        // No mount, no file.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => return Err(failed(error.into())),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    }
}

/// Opens the namespace at `path`, which must not be our own.
pub(super) fn open(path: &Path) -> Result<OwnedFd, NetworkError> {
    let opened = File::open(path).map_err(|source| NetworkError::OpenNamespace { path: path.to_owned(), source })?;
    let failed = |source: Errno| NetworkError::OpenNamespace { path: path.to_owned(), source: source.into() };
    if fstatfs(&opened).map_err(failed)?.f_type != NSFS_MAGIC {
        return Err(NetworkError::NotANamespace { path: path.to_owned() });
    }
    let own = File::open("/proc/self/ns/net").map_err(NetworkError::host("open our own network namespace"))?;
    let (found, own) = (fstat(&opened).map_err(failed)?, fstat(&own).map_err(failed)?);
    if (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino) {
        return Err(NetworkError::HostNetwork { path: path.to_owned() });
    }
    Ok(opened.into())
}

/// Runs `work` in the namespace, with a netlink connection to it.
pub(super) fn enter<T: Send>(
    namespace: &OwnedFd,
    work: impl AsyncFnOnce(Handle) -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    let entered = || {
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|error| NetworkError::Host {
            action: "enter the network namespace".to_owned(),
            source: error.into(),
        })?;
        with_netlink(work)
    };
    on_a_thread(entered)
}

/// Runs `work` in our own namespace, with a netlink connection to it.
pub(super) fn stay<T: Send>(
    work: impl AsyncFnOnce(Handle) -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    on_a_thread(|| with_netlink(work))
}

fn with_netlink<T>(work: impl AsyncFnOnce(Handle) -> Result<T, NetworkError>) -> Result<T, NetworkError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(NetworkError::host("start a runtime"))?;
    runtime.block_on(async {
        let opened = rtnetlink::new_connection().map_err(NetworkError::host("open a netlink socket"));
        let (connection, handle, _) = opened?;
        let connection = tokio::spawn(connection);
        let done = work(handle).await;
        connection.abort();
        done
    })
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T, NetworkError> + Send) -> Result<T, NetworkError> {
    thread::scope(|scope| {
        let spawned = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work);
        let joined = spawned.map_err(NetworkError::host("start a thread"))?.join();
        joined.unwrap_or_else(|_| {
            let source = io::Error::other("its thread panicked");
            Err(NetworkError::Host { action: "work in the network namespace".to_owned(), source })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_network_and_other_files_are_refused() {
        let own = open(Path::new("/proc/self/ns/net")).expect_err("our own");
        assert!(matches!(own, NetworkError::HostNetwork { .. }), "{own}");
        let file = open(Path::new("/proc/self/status")).expect_err("a file");
        assert!(matches!(file, NetworkError::NotANamespace { .. }), "{file}");
        let nothing = open(Path::new("/does/not/exist")).expect_err("nothing");
        assert!(matches!(nothing, NetworkError::OpenNamespace { .. }), "{nothing}");
    }
}
