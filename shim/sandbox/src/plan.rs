//! PURE: from what the caller wants to the VM and the container that give it. Touches nothing; tested by snapshots.
//!
//! Host paths of bind mounts become entries of a share of volumes, and the spec that goes to the guest names their guest paths
//! instead.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use agent_api::{HOSTS_PATH, INIT_PATH, RESOLV_CONF_PATH, SHARE_DIR};
use oci_spec::runtime::{Mount, Spec};
use thiserror::Error;
use vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

/// Tag of the share that holds the container's root file system.
pub const ROOTFS_TAG: &str = "rootfs";
/// Tag of the share that holds the volumes, as `v0`, `v1`, ..., and the beginning of those of its like.
pub const VOLUMES_TAG: &str = "volumes";

/// Where the guest has its shared memory, and a container that shares it.
pub const GUEST_SHM: &str = "/dev/shm";
/// Path of the init in a container that has one.
const CONTAINER_INIT: &str = "/dev/init";

/// Size of a VM.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct VmSize {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest RAM, in MiB.
    pub memory_mib: u32,
}

/// RAM that the guest's kernel and agent need beside the container's, in MiB.
pub const GUEST_OVERHEAD_MIB: u32 = 96;

/// Tags of a container's shares, for a VM with several containers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ShareTags {
    /// Of its root file system.
    pub rootfs: String,
    /// Of its volumes: see [`Self::of_volumes`].
    pub volumes: String,
}

impl ShareTags {
    /// The tags of the only container of a VM.
    #[must_use]
    pub fn only() -> Self {
        Self { rootfs: ROOTFS_TAG.to_owned(), volumes: VOLUMES_TAG.to_owned() }
    }

    /// Guest path of the root file system.
    #[must_use]
    pub fn guest_rootfs(&self) -> PathBuf {
        Path::new(SHARE_DIR).join(&self.rootfs)
    }

    /// Tag of a share of volumes.
    #[must_use]
    pub fn of_volumes(&self, share: VolumeShare) -> String {
        match share {
            VolumeShare::Private => self.volumes.clone(),
            VolumeShare::Slave => format!("{}-slave", self.volumes),
            VolumeShare::ReadOnlySlave => format!("{}-slave-ro", self.volumes),
        }
    }

    /// Guest path of a volume by its place in [`Plan::volumes`].
    #[must_use]
    pub fn guest_volume(&self, share: VolumeShare, index: usize) -> PathBuf {
        Path::new(SHARE_DIR).join(self.of_volumes(share)).join(format!("v{index}"))
    }
}

/// What becomes of the mounts that the host makes below a volume later (mount_namespaces(7)).
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Propagation {
    /// The container does not see them.
    #[default]
    Private,
    /// They come to the container, and go when the host unmounts them.
    Slave,
}

/// A host path that the container sees.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Volume {
    /// The host path.
    pub source: PathBuf,
    /// Enforced on the host.
    pub read_only: bool,
    /// What becomes of later mounts.
    pub propagation: Propagation,
}

/// Which share a volume is in. A share is one device of the VM, whose rules hold for all of it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum VolumeShare {
    /// Volumes with the mounts that they have at the start.
    Private,
    /// Volumes that later mounts come to.
    Slave,
    /// The same, read-only: the VMM refuses what writes, for a mount that comes later is not read-only by itself.
    ReadOnlySlave,
}

impl Volume {
    /// What a bind mount shows, if it has a source.
    #[must_use]
    pub fn of(mount: &Mount) -> Option<Self> {
        let source = mount.source().clone()?;
        let propagation =
            if has_option(mount, ["slave", "rslave"]) { Propagation::Slave } else { Propagation::Private };
        Some(Self { source, read_only: has_option(mount, ["ro", "rro"]), propagation })
    }

    /// Which share it is in.
    #[must_use]
    pub fn share(&self) -> VolumeShare {
        match (self.propagation, self.read_only) {
            (Propagation::Private, _) => VolumeShare::Private,
            (Propagation::Slave, false) => VolumeShare::Slave,
            (Propagation::Slave, true) => VolumeShare::ReadOnlySlave,
        }
    }
}

/// What to share and what to tell the agent.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Volumes of each share, in the order of their names there.
    pub volumes: BTreeMap<VolumeShare, Vec<Volume>>,
    /// The spec with guest paths.
    pub spec: Spec,
}

/// Why a request cannot be honoured. The host was not touched.
#[derive(Debug, Error, Eq, PartialEq)]
pub enum PlanError {
    /// vCPUs out of range.
    #[error("{asked} CPUs asked for: a VM has 1 to {MAX_VCPUS}")]
    Cpus {
        /// What was asked for.
        asked: String,
    },
    /// Memory out of range.
    #[error("{asked_mib} MiB of memory asked for: a VM has {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB")]
    Memory {
        /// What was asked for.
        asked_mib: u64,
    },
    /// A mount of the spec has no source.
    #[error("bind mount at {} has no source", destination.display())]
    NoSource {
        /// Where it would be mounted.
        destination: PathBuf,
    },
    /// Mounts that the container makes are to come to the host.
    #[error(
        "the mount at {} is to be shared with the host (rshared, Bidirectional), which cannot be, for a guest's mounts are its own: ask for rslave (HostToContainer), by which mounts of the host come to the container",
        destination.display()
    )]
    Shared {
        /// Where it would be mounted.
        destination: PathBuf,
    },
    /// A mount names a place of the host that is never shared.
    #[error("{} of the host cannot be shared with a guest", path.display())]
    Forbidden {
        /// The path.
        path: PathBuf,
    },
}

/// Checks a size in the units of the command line.
///
/// # Errors
/// [`PlanError::Cpus`] and [`PlanError::Memory`].
pub fn vm_size(cpus: f64, container_memory_bytes: u64) -> Result<VmSize, PlanError> {
    let whole = cpus.ceil();
    if !(whole >= 1.0 && whole <= f64::from(MAX_VCPUS)) {
        return Err(PlanError::Cpus { asked: cpus.to_string() });
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1.0 <= whole <= 64.0 was checked")]
    let vcpus = whole as u8;
    let asked_mib = container_memory_bytes.div_ceil(1 << 20).saturating_add(u64::from(GUEST_OVERHEAD_MIB));
    let memory_mib = u32::try_from(asked_mib)
        .ok()
        .filter(|mib| (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(mib))
        .ok_or(PlanError::Memory { asked_mib })?;
    Ok(VmSize { vcpus, memory_mib })
}

/// Guest path of a volume in memory.
#[must_use]
pub fn guest_memory_volume(name: &str) -> PathBuf {
    Path::new(SHARE_DIR).join(name)
}

/// Guest path of the container's root file system.
#[must_use]
pub fn guest_rootfs() -> PathBuf {
    Path::new(SHARE_DIR).join(ROOTFS_TAG)
}

/// Replaces the host paths of a container's `spec` by guest paths, and lists what has to be shared for them. A volume that is in the guest
/// already is taken from where it is, so that containers see one file system there.
///
/// # Errors
/// [`PlanError::NoSource`], [`PlanError::Shared`] and [`PlanError::Forbidden`].
pub fn plan(mut spec: Spec, tags: &ShareTags, in_guest: &HashMap<Volume, PathBuf>) -> Result<Plan, PlanError> {
    let mut volumes = BTreeMap::<VolumeShare, Vec<Volume>>::new();
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let is_bind = mount.typ().as_deref() == Some("bind") || has_option(mount, ["bind", "rbind"]);
        if !is_bind {
            continue;
        }
        if has_option(mount, ["shared", "rshared"]) {
            return Err(PlanError::Shared { destination: mount.destination().clone() });
        }
        let Some(volume) = Volume::of(mount) else {
            return Err(PlanError::NoSource { destination: mount.destination().clone() });
        };
        if mount.destination() == Path::new(GUEST_SHM) {
            // Shared memory is between processes of one kernel: whatever the host has there, the guest has its own.
            mount.set_source(Some(in_guest.get(&volume).cloned().unwrap_or_else(|| GUEST_SHM.into())));
            continue;
        }
        if is_forbidden(&volume.source) {
            return Err(PlanError::Forbidden { path: volume.source });
        }
        let guest_path = in_guest.get(&volume).cloned().unwrap_or_else(|| {
            let share = volume.share();
            let of_share = volumes.entry(share).or_default();
            of_share.push(volume);
            tags.guest_volume(share, of_share.len() - 1)
        });
        mount.set_source(Some(guest_path));
    }
    spec.set_mounts(Some(mounts));
    let mut root = spec.root().clone().unwrap_or_default();
    root.set_path(tags.guest_rootfs());
    spec.set_root(Some(root));
    Ok(Plan { volumes, spec })
}

/// Makes the guest's small init the first process of the container: it runs the command and reaps what that leaves. `spec` has
/// guest paths already. `/dev` is a tmpfs, so this works on a read-only root and leaves no file in it.
pub fn add_init(spec: &mut Spec) {
    let mut mount = Mount::default();
    mount.set_destination(CONTAINER_INIT.into());
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(INIT_PATH.into()));
    mount.set_options(Some(["bind", "ro", "nosuid", "nodev"].map(str::to_owned).to_vec()));
    spec.mounts_mut().get_or_insert_default().push(mount);
    if let Some(process) = spec.process_mut() {
        let command = process.args().clone().unwrap_or_default();
        let words = [CONTAINER_INIT, "init"].map(str::to_owned).into_iter().chain(command);
        process.set_args(Some(words.collect()));
    }
}

/// A file that the agent writes about the network.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GuestFile {
    /// hosts(5).
    Hosts,
    /// resolv.conf(5).
    ResolvConf,
}

impl GuestFile {
    /// Where a container expects it.
    #[must_use]
    pub fn container_path(self) -> &'static str {
        match self {
            Self::Hosts => "/etc/hosts",
            Self::ResolvConf => "/etc/resolv.conf",
        }
    }

    fn guest_path(self) -> &'static str {
        match self {
            Self::Hosts => HOSTS_PATH,
            Self::ResolvConf => RESOLV_CONF_PATH,
        }
    }
}

/// Mounts a file of the agent into the container, unless that has a mount there. `spec` has guest paths already.
pub fn add_guest_file(spec: &mut Spec, file: GuestFile) {
    let mounts = spec.mounts_mut().get_or_insert_default();
    if mounts.iter().any(|mount| mount.destination() == Path::new(file.container_path())) {
        return;
    }
    let mut mount = Mount::default();
    mount.set_destination(file.container_path().into());
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(file.guest_path().into()));
    mount.set_options(Some(["bind", "nosuid", "nodev", "noexec"].map(str::to_owned).to_vec()));
    mounts.push(mount);
}

/// Whether a mount has one of two options.
fn has_option(mount: &Mount, names: [&str; 2]) -> bool {
    mount.options().iter().flatten().any(|option| names.contains(&option.as_str()))
}

/// Kernel interfaces of the host mean nothing, or too much, in a guest.
fn is_forbidden(path: &Path) -> bool {
    path == Path::new("/") || ["/proc", "/sys", "/dev"].iter().any(|top| path.starts_with(top))
}

#[cfg(test)]
mod tests;
