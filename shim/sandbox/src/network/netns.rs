//! Work in another network namespace: on a thread of its own, which enters it and ends with the work.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};
use rtnetlink::Handle;
use rustix::fs::{FsWord, fstat, fstatfs};

use super::NetworkError;

/// Magic number of the file system of namespaces (linux/magic.h).
const NSFS_MAGIC: FsWord = 0x6e73_6673;

/// Opens the namespace at `path`, which must not be our own.
pub(super) fn open(path: &Path) -> Result<OwnedFd, NetworkError> {
    let opened = File::open(path).map_err(|source| NetworkError::OpenNamespace { path: path.to_owned(), source })?;
    let failed =
        |source: rustix::io::Errno| NetworkError::OpenNamespace { path: path.to_owned(), source: source.into() };
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
    };
    thread::scope(|scope| {
        let spawned = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, entered);
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
