//! Sockets of the host that containers mount: connections to one in the guest are streams to the one on the host. Bytes pass, descriptors
//! and the credentials of whoever connects do not.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

use agent_api::message::{AcceptSocketRequest, ListenSocketRequest, Ownership};
use oci_spec::runtime::Spec;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

use crate::plan::Volume;
use crate::stream_call::StreamCall;
use crate::{CallError, Sandbox};

/// Connections at once to one socket.
const MAX_CONNECTIONS: usize = 256;

/// The sockets among the bind mounts of a spec.
#[must_use]
pub fn sockets(spec: &Spec) -> Vec<Volume> {
    let is_socket =
        |volume: &Volume| std::fs::metadata(&volume.source).is_ok_and(|found| found.file_type().is_socket());
    spec.mounts().iter().flatten().filter_map(Volume::of).filter(is_socket).collect()
}

impl Sandbox {
    /// Makes a socket at [`crate::plan::guest_memory_volume`] of `name`, with the owner and the mode of the host's.
    ///
    /// # Errors
    /// What the agent says, or that it no longer answers.
    pub async fn add_socket(&self, name: &str, host_path: &Path) -> Result<(), CallError> {
        // Nobody but root can use one that has just gone.
        let found = std::fs::metadata(host_path).ok();
        let (mode, uid, gid) = found.map_or((0o600, 0, 0), |found| (found.mode() & 0o7777, found.uid(), found.gid()));
        let ownership = Ownership { mode, uid, gid, ..Default::default() };
        let request =
            ListenSocketRequest { name: name.to_owned(), ownership: Some(ownership).into(), ..Default::default() };
        self.agent.listen_socket(&request).await
    }

    /// Connects whoever connects to the guest's socket to the host's, for as long as the VM lives.
    pub async fn serve_socket(&self, name: &str, host_path: &Path) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        while let Ok(place) = places.clone().acquire_owned().await {
            let call = match self.accept_socket(name).await {
                Ok(call) => call,
                Err(error) => return tracing::debug!(%error, name, "a socket is not served any more"),
            };
            let host_path = host_path.to_owned();
            tokio::spawn(async move {
                connect(call, &host_path).await;
                drop(place);
            });
        }
    }

    async fn accept_socket(&self, name: &str) -> Result<StreamCall, CallError> {
        let mut request = AcceptSocketRequest { name: name.to_owned(), ..Default::default() };
        self.stream_call("AcceptSocket", |agent, stream| async move {
            request.stream = stream;
            agent.accept_socket(&request).await
        })
        .await
    }
}

async fn connect(call: StreamCall, host_path: &Path) {
    // However it ends, each side sees it.
    let _ = match UnixStream::connect(host_path).await {
        Ok(mut server) => call.carry(&mut server).await,
        Err(error) => {
            tracing::warn!(%error, path = %host_path.display(), "a socket of the host cannot be connected to");
            call.done().await
        }
    };
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::sockets;

    #[test]
    fn a_socket_is_found_among_the_mounts() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("socket");
        let _listener = UnixListener::bind(&path).expect("bound");
        let spec = json!({ "ociVersion": "1.1.0", "mounts": [
            { "destination": "/proc", "type": "proc" },
            { "destination": "/a", "type": "bind", "source": dir.path(), "options": ["rbind"] },
            { "destination": "/b", "type": "bind", "source": path, "options": ["rbind", "ro"] },
        ] });
        let found = sockets(&serde_json::from_value(spec).expect("a spec"));
        assert_eq!(found.iter().map(|volume| &volume.source).collect::<Vec<_>>(), [&path]);
    }
}
