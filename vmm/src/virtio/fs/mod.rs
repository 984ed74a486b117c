//! File system device (VIRTIO 1.2, 5.11): a directory of the host, by FUSE. What an operation means comes from the
//! `virtiofsd` crate; queues, threads and limits are ours.
//!
//! Each request queue has a worker thread that answers in place: handing a request to another thread costs more than most
//! requests do. The share's root arrives as a descriptor; whether it can be written to is a property of its mount, and of the
//! share's rules where mounts come later.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::process::{Resource, getrlimit};
use thiserror::Error;
use virtio_queue::QueueT as _;
use virtiofsd::passthrough::{self, PassthroughFs};
use virtiofsd::server::Server;
use vmm_api::CachePolicy;

use super::{ActivateError, Activation, ActiveQueue, SHARED_VECTORS, VirtioDevice};
use crate::memory::Views;
use checked::CheckedFs;
use worker::Worker;
#[cfg(any(test, fuzzing))]
pub(crate) use worker::fuzz::fuzz;

mod checked;
mod spare_room;
mod unchanged;
mod worker;

const VIRTIO_ID_FS: u16 = 26;
const TAG_LEN: usize = 36;
const QUEUE_SIZE: u16 = 128;
/// Most request queues; the guest spreads its CPUs over them.
pub const MAX_REQUEST_QUEUES: u8 = 4;
/// How long the guest trusts what it was told under [`CachePolicy::Auto`].
const AUTO_TIMEOUT: Duration = Duration::from_secs(1);
const ALWAYS_TIMEOUT: Duration = Duration::from_secs(86_400);
/// Every inode that the guest knows holds a descriptor here, so a share may use this part of the process's limit.
const GUEST_FD_SHARE: u64 = 4;

/// How a directory is served.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Rules {
    /// How long the guest may trust what it cached.
    pub cache: CachePolicy,
    /// Whatever writes is refused, whether or not the mounts below the directory would allow it.
    pub read_only: bool,
}

/// Why a directory is not shared.
#[derive(Debug, Error)]
pub enum FsError {
    /// The tag is empty or too long.
    #[error("a tag has 1 to {TAG_LEN} bytes")]
    Tag,
    /// From the directory a way leads up, to files of the host that are not shared.
    #[error(
        "the directory has a parent; share the root of a mount that is attached nowhere (open_tree), or of a namespace"
    )]
    Parent,
    /// The directory cannot be served.
    #[error("cannot serve the directory")]
    Open(#[source] io::Error),
}

/// The device.
pub struct Fs {
    config: Vec<u8>,
    queue_sizes: Vec<u16>,
    server: Arc<Server<CheckedFs>>,
    workers: Vec<Worker>,
    _root: OwnedFd,
}

impl Fs {
    /// Shares the directory `root` under `tag`, with 1 to [`MAX_REQUEST_QUEUES`] request queues.
    ///
    /// # Errors
    /// Each variant of [`FsError`].
    pub fn open(tag: &str, root: OwnedFd, rules: Rules, request_queues: u8) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_LEN {
            return Err(FsError::Tag);
        }
        if has_parent(&root).map_err(FsError::Open)? {
            return Err(FsError::Parent);
        }
        // virtio_fs_config (VIRTIO 1.2, 5.11.4): the tag, padded with zeros, and the number of request queues.
        let mut config = tag.as_bytes().to_vec();
        config.resize(TAG_LEN, 0);
        let request_queues = request_queues.clamp(1, MAX_REQUEST_QUEUES);
        config.extend_from_slice(&u32::from(request_queues).to_le_bytes());
        let fs = PassthroughFs::new(passthrough_config(&root, rules.cache)).map_err(FsError::Open)?;
        fs.open_root_node().map_err(FsError::Open)?;
        Ok(Self {
            config,
            // The high-priority queue comes first.
            queue_sizes: vec![QUEUE_SIZE; usize::from(request_queues) + 1],
            server: Arc::new(Server::new(CheckedFs::new(fs, rules))),
            workers: Vec::new(),
            _root: root,
        })
    }
}

/// The root of a mount that is attached nowhere is its own parent, and so is that of a mount namespace.
fn has_parent(root: &OwnedFd) -> io::Result<bool> {
    let wanted = StatxFlags::INO | StatxFlags::MNT_ID;
    let own = statx(root, ".", AtFlags::empty(), wanted)?;
    let parent = statx(root, "..", AtFlags::empty(), wanted)?;
    Ok((own.stx_mnt_id, own.stx_ino) != (parent.stx_mnt_id, parent.stx_ino))
}

fn passthrough_config(root: &OwnedFd, cache: CachePolicy) -> passthrough::Config {
    let (policy, entry_timeout, attr_timeout) = match cache {
        CachePolicy::Never => (passthrough::CachePolicy::Never, Duration::ZERO, Duration::ZERO),
        CachePolicy::Auto => (passthrough::CachePolicy::Auto, AUTO_TIMEOUT, AUTO_TIMEOUT),
        // Linux forgets a name that is not valid for any time when its last user is done with it (`delete_stale`).
        CachePolicy::InUse => (passthrough::CachePolicy::Auto, Duration::ZERO, AUTO_TIMEOUT),
        CachePolicy::Always => (passthrough::CachePolicy::Always, ALWAYS_TIMEOUT, ALWAYS_TIMEOUT),
    };
    let keeps_names = cache != CachePolicy::InUse;
    let descriptor_limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    passthrough::Config {
        // The final dot makes the lookup go through the link to the directory itself.
        root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
        cache_policy: policy,
        entry_timeout,
        attr_timeout,
        // The guest's kernel then holds dirty pages and owns the modification time, which only a private tree allows.
        writeback: cache == CachePolicy::Always,
        xattr: true,
        posix_acl: passthrough::NegotiationMode::Auto,
        // What is announced the guest mounts as well, and its mount would hold the host's.
        announce_submounts: keeps_names,
        // Of names that are forgotten at once, attributes are of no use.
        readdirplus: keeps_names,
        // Without it the guest asks for `security.capability` before each write.
        killpriv_v2: true,
        // A file that the guest may not cache can still be mapped shared.
        allow_mmap: cache == CachePolicy::Never,
        // O_DIRECT bypasses the guest's page cache; the host's serves it, whatever the file system below can do.
        allow_direct_io: false,
        // A handle would spare the descriptor but needs CAP_DAC_READ_SEARCH on the host, and overlayfs gives none.
        inode_file_handles: passthrough::InodeFileHandlesMode::Never,
        guest_fd_limit: descriptor_limit / GUEST_FD_SHARE,
        ..Default::default()
    }
}

impl VirtioDevice for Fs {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// What serves several request queues at once is told of each by itself.
    fn vectors(&self) -> usize {
        if self.queue_sizes.len() > 2 { self.queue_sizes.len() + 1 } else { SHARED_VECTORS }
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.config)
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, device_thread, .. } = activation;
        // A driver with fewer CPUs than queues leaves some alone. The high-priority queue has what is forgotten, which is rare and
        // has no answer: the thread of the first requests does it.
        let mut threads: Vec<(usize, Vec<ActiveQueue>)> = Vec::new();
        for (index, queue) in queues.into_iter().enumerate().filter(|(_, queue)| queue.queue.ready()) {
            match threads.last_mut() {
                Some((name @ 0, served)) => {
                    *name = index;
                    served.push(queue);
                }
                _ => threads.push((index, vec![queue])),
            }
        }
        let failed = |source| ActivateError::Host { action: "start a worker of a share", source };
        let memory = Arc::new(Views::of(memory).map_err(|error| failed(io::Error::other(error)))?);
        for (index, served) in threads {
            let worker = Worker::spawn(index, served, &memory, &self.server, &device_thread);
            self.workers.push(worker.map_err(failed)?);
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
