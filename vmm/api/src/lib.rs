//! What a VM is, and how its VMM is controlled: plain types shared by `vmm` and its callers.
//!
//! The caller spawns `vmm --config-fd N`, where fd N holds a [`VmConfig`] as JSON. Everything the VMM needs is handed over
//! as an open file descriptor that the child inherits; a [`Fd`] in the configuration names it. The VMM opens nothing by
//! name except `/dev/kvm`, when no descriptor for it is given.

pub mod control;
pub mod fds;
pub mod net;
pub mod probe;

use serde::{Deserialize, Serialize};

use net::NetConfig;

/// A file descriptor number that the VMM inherits from its parent.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Fd(pub i32);

/// One virtual machine, complete.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name of the sandbox, for log lines.
    pub name: String,
    /// `/dev/kvm`, or nothing to let the VMM open it.
    pub kvm: Option<Fd>,
    /// `cgroup.procs` of the cgroup that the VMM joins before it takes memory, open for writing; without it, it stays where it is.
    pub cgroup: Option<Fd>,
    /// Number of vCPUs, 1..=[`MAX_VCPUS`].
    pub vcpus: u8,
    /// How many of them the guest starts at boot, 1..=`vcpus`; it can bring the others up later.
    pub boot_vcpus: u8,
    /// Guest RAM in MiB, [`MIN_MEMORY_MIB`]..=[`MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// The guest kernel: an uncompressed ELF `vmlinux` with a PVH note.
    pub kernel: Fd,
    /// The guest's root file system: an EROFS image of a multiple of 2 MiB. Guests execute it in place, so it must not change
    /// while one runs.
    pub root_image: Option<Fd>,
    /// Words added to the kernel command line that the VMM composes.
    pub cmdline: String,
    /// Where the guest's serial console goes; without it only the last lines are kept, for error reports.
    pub console: Option<Fd>,
    /// Connected stream socket of [`control`]. When its peer closes it the VM ends: its owner is gone.
    pub control: Fd,
    /// Whether the guest has an entropy device: it needs one where its CPU has no RDRAND.
    pub entropy: bool,
    /// The vsock device, if the guest has one.
    pub vsock: Option<VsockConfig>,
    /// Shared directories, one virtio-fs device each.
    pub shares: Vec<ShareConfig>,
    /// Network interfaces.
    pub networks: Vec<NetConfig>,
}

impl VmConfig {
    /// Every descriptor that it names.
    #[must_use]
    pub fn fds(&self) -> Vec<Fd> {
        let one = [Some(self.kernel), Some(self.control), self.kvm, self.cgroup, self.root_image, self.console];
        let ports = self.vsock.iter().flat_map(|vsock| &vsock.host_ports).map(|port| port.socket);
        let shares = self.shares.iter().map(|share| share.root);
        let networks = self.networks.iter().flat_map(|network| network.fds.iter().copied());
        one.into_iter().flatten().chain(ports).chain(shares).chain(networks).collect()
    }
}

/// Most vCPUs of one VM.
pub const MAX_VCPUS: u8 = 64;
/// Least guest RAM, in MiB: kernel and agent need about 40.
pub const MIN_MEMORY_MIB: u32 = 64;
/// Most guest RAM, in MiB (1 TiB).
pub const MAX_MEMORY_MIB: u32 = 1 << 20;

/// The virtio socket device (VIRTIO 1.2, 5.10).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context id of the guest, 3 or more.
    pub guest_cid: u32,
    /// Host ports that the guest may connect to; every other port is answered with a reset.
    pub host_ports: Vec<HostPort>,
}

/// A host port that the guest may connect to.
///
/// For each connection the VMM makes a stream socket pair and sends one end over `socket` by `SCM_RIGHTS`, with the guest's
/// source port as a 4-byte little-endian payload (see [`fds`]).
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HostPort {
    /// The vsock port.
    pub port: u32,
    /// Our end of a `SOCK_SEQPACKET` Unix socket pair.
    pub socket: Fd,
}

/// A directory of the host that the guest mounts by its tag.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// Mount tag, 1 to 36 bytes (VIRTIO 1.2, 5.11.4).
    pub tag: String,
    /// The directory, opened with `O_PATH`. Read-only is a property of its mount.
    pub root: Fd,
    /// How long the guest may trust what it cached.
    pub cache: CachePolicy,
    /// Refuse whatever writes, also where the mounts below the directory would allow it.
    #[serde(default)]
    pub read_only: bool,
}

/// What a guest may cache of a share.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CachePolicy {
    /// Nothing: every access reaches the host.
    Never,
    /// Data and attributes, for one second; re-validated on open.
    #[default]
    Auto,
    /// As `Auto` for what is in use, and nothing of what is not, so that the VMM holds no descriptor that would keep the host from
    /// unmounting it: for a share below which mounts come and go. They are plain directories of one file system to the guest.
    InUse,
    /// Everything, until evicted: only for a share that nobody else writes to.
    Always,
}
