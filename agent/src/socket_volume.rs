//! Sockets of the host in the guest: whoever connects to one here reaches the one there, by a stream of the host.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, io};

use agent_api::SHARE_DIR;
use agent_api::message::Ownership;
use tokio::io::copy_bidirectional;
use tokio::net::UnixListener;

use crate::memory_volume::own;
use crate::share::ShareTag;
use crate::streams;

/// All of them. They last as long as the VM.
#[derive(Default)]
pub(crate) struct Sockets(Mutex<HashMap<PathBuf, Arc<UnixListener>>>);

impl Sockets {
    /// Makes the socket, if it is not there yet.
    pub(crate) fn listen(&self, volume: &ShareTag, ownership: &Ownership) -> io::Result<()> {
        let path = volume.path();
        let mut listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if listeners.contains_key(&path) {
            return Ok(());
        }
        fs::create_dir_all(SHARE_DIR)?;
        let listener = UnixListener::bind(&path)?;
        own(&path, ownership)?;
        listeners.insert(path, Arc::new(listener));
        Ok(())
    }

    /// Waits for a connection, dials the stream for it, and carries bytes until both sides have ended.
    pub(crate) async fn accept(&self, volume: &ShareTag, stream: u64) -> io::Result<()> {
        let found = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&volume.path()).cloned();
        let listener = found.ok_or(io::ErrorKind::NotFound)?;
        let (mut client, _) = listener.accept().await?;
        let mut host = streams::dial(stream).await?.ok_or(io::ErrorKind::InvalidInput)?;
        // One that breaks is an end like others: the other side sees it.
        let _ = copy_bidirectional(&mut client, &mut host).await;
        Ok(())
    }
}
