//! File system device (VIRTIO 1.2, 5.11): a directory of the host, by FUSE. What an operation means comes from the
//! `virtiofsd` crate; queues, threads and limits are ours.
//!
//! Each request queue has a worker thread that answers in place: handing a request to another thread costs more than most
//! requests do. The share's root arrives as a descriptor; whether it can be written to is a property of its mount.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use virtiofsd::passthrough::{self, PassthroughFs};
use virtiofsd::server::Server;
use vmm_api::CachePolicy;

use super::{ActivateError, Activation, VirtioDevice};
use worker::Worker;

mod worker;

const VIRTIO_ID_FS: u16 = 26;
const TAG_LEN: usize = 36;
const QUEUE_SIZE: u16 = 128;
/// The high-priority queue and one request queue.
const QUEUE_SIZES: [u16; 2] = [QUEUE_SIZE; 2];
/// How long the guest trusts what it was told under [`CachePolicy::Auto`].
const AUTO_TIMEOUT: Duration = Duration::from_secs(1);
const ALWAYS_TIMEOUT: Duration = Duration::from_secs(86_400);
/// Most descriptors that one share holds open for the guest.
const GUEST_FD_LIMIT: u64 = 200_000;

/// Why a directory is not shared.
#[derive(Debug, Error)]
pub enum FsError {
    /// The tag is empty or too long.
    #[error("a tag has 1 to {TAG_LEN} bytes")]
    Tag,
    /// The directory cannot be served.
    #[error("cannot serve the directory")]
    Open(#[source] io::Error),
}

/// The device.
pub struct Fs {
    config: Vec<u8>,
    server: Arc<Server<PassthroughFs>>,
    workers: Vec<Worker>,
    _root: OwnedFd,
}

impl Fs {
    /// Shares the directory `root` under `tag`.
    ///
    /// # Errors
    /// Each variant of [`FsError`].
    pub fn new(tag: &str, root: OwnedFd, cache: CachePolicy) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_LEN {
            return Err(FsError::Tag);
        }
        // virtio_fs_config (VIRTIO 1.2, 5.11.4): the tag, padded with zeros, and the number of request queues.
        let mut config = tag.as_bytes().to_vec();
        config.resize(TAG_LEN, 0);
        config.extend_from_slice(&1_u32.to_le_bytes());
        let fs = PassthroughFs::new(passthrough_config(&root, cache)).map_err(FsError::Open)?;
        fs.open_root_node().map_err(FsError::Open)?;
        Ok(Self { config, server: Arc::new(Server::new(fs)), workers: Vec::new(), _root: root })
    }
}

fn passthrough_config(root: &OwnedFd, cache: CachePolicy) -> passthrough::Config {
    let (policy, timeout) = match cache {
        CachePolicy::Never => (passthrough::CachePolicy::Never, Duration::ZERO),
        CachePolicy::Auto => (passthrough::CachePolicy::Auto, AUTO_TIMEOUT),
        CachePolicy::Always => (passthrough::CachePolicy::Always, ALWAYS_TIMEOUT),
    };
    passthrough::Config {
        // The final dot makes the lookup go through the link to the directory itself.
        root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
        cache_policy: policy,
        entry_timeout: timeout,
        attr_timeout: timeout,
        writeback: cache == CachePolicy::Always,
        xattr: true,
        announce_submounts: true,
        readdirplus: true,
        killpriv_v2: false,
        guest_fd_limit: GUEST_FD_LIMIT,
        ..Default::default()
    }
}

impl VirtioDevice for Fs {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for (index, queue) in activation.queues.into_iter().enumerate() {
            let worker = Worker::spawn(index, queue, activation.memory.clone(), self.server.clone())
                .map_err(|source| ActivateError::Host { action: "start a worker of a share", source })?;
            self.workers.push(worker);
        }
        Ok(())
    }

    fn reset(&mut self) {
        if self.workers.is_empty() {
            return;
        }
        // Dropping a worker stops and joins it.
        self.workers.clear();
        self.server.destroy();
    }
}
