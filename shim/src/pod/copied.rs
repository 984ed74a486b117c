//! Small volumes of the kubelet (ConfigMap, Secret, projected, downward API) are copied into the guest and not shared: a change on the
//! host is then one that the guest's kernel makes, and inotify tells it to whoever watches in a container.
//!
//! ```text
//!   create ─► read ─► WriteVolume          kubelet swaps `..data` ─► inotify ─► read ─► WriteVolume, as long as the VM lives
//! ```

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::inotify::{self, WatchFlags};
use sandbox::message::volume_entry::What;
use sandbox::message::{Empty, VolumeEntry, WriteVolumeRequest};
use sandbox::plan::{self, Volume};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use super::Pod;
use super::memory::ownership;
use crate::error::TaskError;
use crate::vm::Vm;

/// Parts of the paths of the volumes that the kubelet writes and swaps.
const KINDS: [&str; 4] = [
    "/kubernetes.io~configmap/",
    "/kubernetes.io~secret/",
    "/kubernetes.io~projected/",
    "/kubernetes.io~downward-api/",
];
/// A ConfigMap or Secret has at most 1 MiB, a message at most 4 MiB. What is larger is shared.
const MAX_BYTES: u64 = 2 << 20;
const MAX_ENTRIES: usize = 1024;
/// The link of a volume that the kubelet swaps.
const SWAPPED: &str = "..data";
/// The kubelet swaps a volume once in some seconds, and reading it takes milliseconds.
const MAX_ATTEMPTS: usize = 3;
/// Space for the events that are taken at once.
const EVENT_BYTES: usize = 4096;

impl Pod {
    /// Copies the volumes of a spec that are to be copied, and follows them; returns their guest paths.
    pub(super) async fn add_copied_volumes(
        &self,
        vm: &Arc<Vm>,
        spec: &Spec,
    ) -> Result<HashMap<Volume, PathBuf>, TaskError> {
        let mut guest_paths = HashMap::new();
        for volume in spec.mounts().iter().flatten().filter_map(kubelet_volume) {
            let source = &volume.source;
            let failed = |action: &str| TaskError::host(format!("{action} {}", source.display()));
            // Before the look at what there is, so that no swap is missed.
            let events = watch(source).map_err(failed("watch"))?;
            let Some(entries) = read(source).map_err(failed("read"))? else { continue };
            let (name, is_new) = self.copied_volumes.of(source);
            vm.sandbox.write_volume(&request(&name, source, entries)).await?;
            if is_new {
                tokio::spawn(follow(vm.clone(), name.clone(), source.clone(), events));
            }
            guest_paths.insert(volume, plan::guest_memory_volume(&name));
        }
        Ok(guest_paths)
    }
}

/// What a mount shows, if the kubelet writes it and the container does not.
fn kubelet_volume(mount: &Mount) -> Option<Volume> {
    let volume = Volume::of(mount).filter(|volume| volume.read_only)?;
    let text = volume.source.to_string_lossy();
    let is_kubelets = KINDS.iter().any(|kind| text.contains(kind)) && volume.source.is_dir();
    is_kubelets.then_some(volume)
}

/// A queue of inotify(7) is read like a pipe.
fn watch(source: &Path) -> io::Result<pipe::Receiver> {
    let queue = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    let changes = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_TO | WatchFlags::CLOSE_WRITE;
    inotify::add_watch(&queue, source, changes | WatchFlags::ONLYDIR)?;
    pipe::Receiver::from_owned_fd_unchecked(queue)
}

/// Writes the volume again whenever it has changed, until the VM ends.
async fn follow(vm: Arc<Vm>, name: String, source: PathBuf, mut events: pipe::Receiver) {
    // What the events say is looked up.
    let mut events_of_a_swap = vec![0; EVENT_BYTES];
    let changes = async {
        while events.read(&mut events_of_a_swap).await.is_ok() {
            let entries = match read(&source) {
                Ok(Some(entries)) => entries,
                Ok(None) => {
                    tracing::warn!(volume = %source.display(), "the volume is too large now: its copy stays as it is");
                    continue;
                }
                // The kubelet removes the volumes of a pod when its containers have ended.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                Err(error) => {
                    tracing::warn!(%error, volume = %source.display(), "a volume cannot be read");
                    continue;
                }
            };
            if let Err(error) = vm.sandbox.write_volume(&request(&name, &source, entries)).await {
                tracing::warn!(%error, volume = %source.display(), "a volume cannot be written in the guest");
            }
        }
    };
    tokio::select! {
        () = changes => {}
        _ = vm.sandbox.ended() => {}
    }
}

/// Everything in a volume, each folder before what is in it; nothing when that is too much for a copy. A swap in the middle is seen by
/// the link that is swapped, and the volume is read again.
fn read(source: &Path) -> io::Result<Option<Vec<VolumeEntry>>> {
    let mut attempt = 1;
    loop {
        let before = fs::read_link(source.join(SWAPPED)).ok();
        let mut volume = Reading::default();
        let done = volume.add_folder(source, Path::new(""));
        if fs::read_link(source.join(SWAPPED)).ok() == before || attempt == MAX_ATTEMPTS {
            return done.map(|()| Some(volume.entries).filter(|_| !volume.is_too_large));
        }
        attempt += 1;
    }
}

#[derive(Default)]
struct Reading {
    entries: Vec<VolumeEntry>,
    bytes: u64,
    is_too_large: bool,
}

impl Reading {
    fn add_folder(&mut self, folder: &Path, below: &Path) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let (path, name) = (entry.path(), below.join(entry.file_name()));
            // An old generation may be removed while it is looked at.
            let Some(found) = unless_gone(entry.metadata())? else { continue };
            self.bytes = self.bytes.saturating_add(found.len());
            // What has no name in UTF-8 is for a share, and so is a device.
            let shown = name.to_str().filter(|_| found.is_dir() || found.is_file() || found.is_symlink());
            let Some(shown) = shown.filter(|_| self.bytes <= MAX_BYTES && self.entries.len() < MAX_ENTRIES) else {
                self.is_too_large = true;
                return Ok(());
            };
            let Some(what) = unless_gone(content(&path, &found))? else { continue };
            let ownership = Some(ownership(&found)).into();
            self.entries.push(VolumeEntry {
                path: shown.to_owned(),
                ownership,
                what: Some(what),
                ..Default::default()
            });
            if found.is_dir() {
                unless_gone(self.add_folder(&path, &name))?;
            }
        }
        Ok(())
    }
}

fn content(path: &Path, found: &Metadata) -> io::Result<What> {
    if found.is_dir() {
        Ok(What::Folder(Empty::new()))
    } else if found.is_symlink() {
        Ok(What::Link(fs::read_link(path)?.to_string_lossy().into_owned()))
    } else {
        Ok(What::File(fs::read(path)?))
    }
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn request(name: &str, source: &Path, entries: Vec<VolumeEntry>) -> WriteVolumeRequest {
    let root = fs::metadata(source).map(|found| ownership(&found)).unwrap_or_default();
    WriteVolumeRequest { name: name.to_owned(), root: Some(root).into(), entries, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use sandbox::message::volume_entry::What;

    use super::read;

    #[test]
    fn a_volume_is_read_with_its_links() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(dir.path().join("..1")).expect("a folder");
        fs::write(dir.path().join("..1/key"), "value").expect("a file");
        symlink("..1", dir.path().join("..data")).expect("a link");
        let mut entries = read(dir.path()).expect("read").expect("small");
        entries.sort_by(|one, other| one.path.cmp(&other.path));
        let paths: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths, ["..1", "..1/key", "..data"]);
        assert_eq!(entries[1].what, Some(What::File(b"value".to_vec())));
        assert_eq!(entries[2].what, Some(What::Link("..1".to_owned())));
    }

    #[test]
    fn a_large_volume_is_not_copied() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::File::create(dir.path().join("large")).expect("a file").set_len(3 << 20).expect("its size");
        assert_eq!(read(dir.path()).expect("read"), None);
    }
}
