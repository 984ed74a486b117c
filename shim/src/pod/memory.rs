//! Volumes that are memory on the host are memory of the guest instead: `emptyDir` with `medium: Memory`, whole or in parts
//! (`subPath`), and `/dev/shm`. They have the size and the owner of the host's, belong to the pod, and last as long as its VM.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use oci_spec::runtime::{Mount, Spec};
use sandbox::message::{MemoryVolumeRequest, Ownership};
use sandbox::plan::{self, GUEST_SHM, Volume};
use sandbox::share::{Mounted, mount_of, mount_table};

use super::Pod;
use crate::error::TaskError;
use crate::vm::Vm;

/// Part of the path of every `emptyDir` that the kubelet makes.
const EMPTY_DIR: &str = "/kubernetes.io~empty-dir/";
/// Size of the shared memory of a pod for which the host has none, as the CRI plugin makes it.
const SHM_BYTES: u64 = 64 << 20;
const SHM_OWNERSHIP: (u32, u32, u32) = (0o1777, 0, 0);

/// Where a mount leads.
#[derive(Debug, Eq, PartialEq)]
struct InMemory {
    /// Path of the volume on the host.
    root: PathBuf,
    /// Path in the volume; empty for all of it.
    folder: PathBuf,
}

impl Pod {
    /// Makes the guest's counterparts of a spec's mounts that are memory; returns their guest paths.
    pub(super) async fn add_memory_volumes(&self, vm: &Vm, spec: &Spec) -> Result<HashMap<Volume, PathBuf>, TaskError> {
        let table = mount_table().map_err(TaskError::host("read the table of mounts"))?;
        let mut guest_paths = HashMap::new();
        for mount in spec.mounts().iter().flatten() {
            let Some(volume) = Volume::of(mount) else { continue };
            let Some(found) = find(mount, &volume.source, &table) else { continue };
            let (name, _) = self.memory_volumes.of(&found.root);
            vm.sandbox.add_memory_volume(&request(&name, &volume.source, &found)).await?;
            guest_paths.insert(volume, plan::guest_memory_volume(&name).join(&found.folder));
        }
        Ok(guest_paths)
    }
}

/// Names that volumes of the host have in the guest, the same for every container of the pod.
pub(super) struct VolumeNames {
    prefix: char,
    sources: Mutex<Vec<PathBuf>>,
}

impl VolumeNames {
    pub(super) fn new(prefix: char) -> Self {
        Self { prefix, sources: Mutex::default() }
    }

    /// The name, and whether it is new.
    pub(super) fn of(&self, source: &Path) -> (String, bool) {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let known = sources.iter().position(|known| known == source);
        let index = known.unwrap_or_else(|| {
            sources.push(source.to_owned());
            sources.len() - 1
        });
        (format!("{}{index}", self.prefix), known.is_none())
    }
}

/// The volume that a mount leads to, if that is memory and the pod's.
fn find(mount: &Mount, source: &Path, table: &[Mounted]) -> Option<InMemory> {
    let at = mount_of(table, source)?;
    let whole = |mounted: &&Mounted| mounted.device == at.device && mounted.root == Path::new("/");
    let is_empty_dir = |mounted: &&Mounted| mounted.mount_point.to_string_lossy().contains(EMPTY_DIR);
    if at.fstype == "tmpfs"
        && let Some(volume) = table.iter().filter(whole).find(is_empty_dir)
    {
        let below = source.strip_prefix(&at.mount_point).ok()?;
        let folder = at.root.strip_prefix("/").ok()?.join(below);
        return Some(InMemory { root: volume.mount_point.clone(), folder });
    }
    // The pod's own, and not the host's, which a pod with `hostIPC` asks for.
    let is_shm = mount.destination() == Path::new(GUEST_SHM) && source != Path::new(GUEST_SHM);
    is_shm.then(|| InMemory { root: source.to_owned(), folder: PathBuf::new() })
}

fn request(name: &str, source: &Path, found: &InMemory) -> MemoryVolumeRequest {
    let is_tmpfs = |path: &Path| rustix::fs::statfs(path).ok().filter(|stat| stat.f_type == TMPFS_MAGIC);
    let size_bytes = is_tmpfs(&found.root).map_or(SHM_BYTES, |stat| {
        let unit = u64::try_from(stat.f_bsize).unwrap_or_default();
        stat.f_blocks.saturating_mul(unit)
    });
    let root = if is_tmpfs(&found.root).is_some() { ownership_at(&found.root) } else { owned(SHM_OWNERSHIP) };
    MemoryVolumeRequest {
        name: name.to_owned(),
        size_bytes,
        root: Some(root).into(),
        folder: found.folder.display().to_string(),
        folder_ownership: Some(ownership_at(source)).into(),
        ..Default::default()
    }
}

/// That of a path of the host; a path that is not there has what the kubelet gives a folder.
fn ownership_at(path: &Path) -> Ownership {
    fs::metadata(path).map_or_else(|_| owned((0o777, 0, 0)), |found| ownership(&found))
}

pub(super) fn ownership(found: &Metadata) -> Ownership {
    owned((found.mode() & 0o7777, found.uid(), found.gid()))
}

fn owned((mode, uid, gid): (u32, u32, u32)) -> Ownership {
    Ownership { mode, uid, gid, ..Default::default() }
}

/// statfs(2).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use oci_spec::runtime::MountBuilder;
    use sandbox::share::Mounted;

    use super::{InMemory, find};

    const VOLUME: &str = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache";
    const PART: &str = "/var/lib/kubelet/pods/u/volume-subpaths/cache/main/0";

    fn found(source: &str, destination: &str) -> Option<InMemory> {
        let mounted = |device: &str, root: &str, mount_point: &str, fstype: &str| Mounted {
            device: device.to_owned(),
            root: PathBuf::from(root),
            mount_point: PathBuf::from(mount_point),
            fstype: fstype.to_owned(),
            ..Mounted::default()
        };
        let table = [
            mounted("8:1", "/", "/", "ext4"),
            mounted("0:40", "/", "/run", "tmpfs"),
            mounted("0:41", "/", VOLUME, "tmpfs"),
            mounted("0:41", "/a b/c", PART, "tmpfs"),
            mounted("0:42", "/", "/run/pod/shm", "tmpfs"),
            mounted("8:1", "/hidden", "/hidden/kubernetes.io~empty-dir/cache", "ext4"),
            mounted("0:43", "/", "/hidden/kubernetes.io~empty-dir/cache", "tmpfs"),
        ];
        let mount = MountBuilder::default().destination(destination).source(source).typ("bind").build().expect("mount");
        find(&mount, Path::new(source), &table)
    }

    fn in_memory(root: &str, folder: &str) -> Option<InMemory> {
        Some(InMemory { root: PathBuf::from(root), folder: PathBuf::from(folder) })
    }

    #[test]
    fn an_empty_dir_in_memory_is_found_whole_and_in_parts() {
        assert_eq!(found(VOLUME, "/cache"), in_memory(VOLUME, ""));
        assert_eq!(found(&format!("{VOLUME}/x"), "/cache"), in_memory(VOLUME, "x"));
        assert_eq!(found(PART, "/cache"), in_memory(VOLUME, "a b/c"));
        assert_eq!(found(VOLUME, "/dev/shm"), in_memory(VOLUME, ""));
        let over_another = "/hidden/kubernetes.io~empty-dir/cache";
        assert_eq!(found(over_another, "/cache"), in_memory(over_another, ""));
    }

    #[test]
    fn other_memory_of_the_host_is_shared_as_it_is() {
        assert_eq!(found("/run/something", "/mnt"), None);
        assert_eq!(found("/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/disk", "/mnt"), None);
        assert_eq!(found("/run/pod/shm", "/mnt"), None);
    }

    #[test]
    fn the_shared_memory_of_a_pod_is_its_own() {
        assert_eq!(found("/run/pod/shm", "/dev/shm"), in_memory("/run/pod/shm", ""));
        assert_eq!(found("/dev/shm", "/dev/shm"), None);
    }
}
