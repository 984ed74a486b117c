//! The boot recipe, top to bottom. This file only calls: tables, registers and loops live elsewhere.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Bytes as _, GuestAddress};
use vmm_api::VmConfig;
use vmm_api::control::{Exit, ExitReason};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::{cpuid, layout, mptable, pvh, registers};
use crate::bus::Bus;
use crate::control::Control;
use crate::device_thread::DeviceThread;
use crate::event_loop::{EventSet, EventSource, Registry};
use crate::exit::ExitSignal;
use crate::gathered::GatheredWrites;
use crate::inherited::InheritedFds;
use crate::jail::{Jail, ThreadKind};
use crate::kernel::{self, KernelError};
use crate::kvm::{self, KvmError};
use crate::legacy::i8042::{self, I8042};
use crate::legacy::serial::{self, ConsoleTail, SerialConsole};
use crate::memory::{Backing, MemoryError};
use crate::networks::{NetworkError, Networks};
use crate::root_image::{RootImage, RootImageError};
use crate::signals;
use crate::vcpu::{Buses, Vcpus};
use crate::virtio::GuestMemory;
use crate::virtio::fs::{Fs, FsError, Rules};
use crate::virtio::pci::{PciBus, PciError};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError};

/// Why a VM was not built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The configuration is out of range.
    #[error("bad configuration: {0}")]
    Config(&'static str),
    /// A descriptor of the configuration is unusable.
    #[error("descriptor for {what} is not usable")]
    Inherited {
        /// What it was for.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The root image.
    #[error(transparent)]
    RootImage(#[from] RootImageError),
    /// A boot table.
    #[error("cannot write the boot tables to guest RAM")]
    Tables(#[from] vm_memory::GuestMemoryError),
    /// The PCI bus.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A share.
    #[error("cannot serve the share {tag:?}")]
    Share {
        /// Its tag.
        tag: String,
        /// Why.
        source: FsError,
    },
    /// The vsock device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A network interface.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The host refused something.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A VM that is ready to run.
pub struct Machine {
    // The VM's memory slots point into `_memory`.
    _vm: Arc<VmFd>,
    _memory: Arc<GuestMemory>,
    vcpus: Vec<VcpuFd>,
    buses: Arc<Buses>,
    pci: Arc<PciBus>,
    networks: Networks,
    registry: Registry,
    exit: ExitSignal,
    tail: ConsoleTail,
    jail: Jail,
}

impl Machine {
    /// Builds the VM of `config`; its threads will be confined by `jail`.
    ///
    /// # Errors
    /// Each variant of [`BuildError`].
    pub fn build(config: &VmConfig, fds: &mut InheritedFds, jail: Jail, backing: &Backing) -> Result<Self, BuildError> {
        check(config)?;
        let host = |action| move |source| BuildError::Host { action, source };
        let mut take = |what, fd| fds.take(fd).map_err(|source| BuildError::Inherited { what, source });
        let registry = Registry::create().map_err(host("make the event loop"))?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(host("make an eventfd"))?;
        let exit = ExitSignal::new(wake.try_clone().map_err(host("make an eventfd"))?);
        watch(&registry, wake).map_err(host("watch an eventfd"))?;
        // Before the first thread, which inherits what is blocked.
        signals::watch(&registry, exit.clone()).map_err(host("watch for signals"))?;
        let device_thread = DeviceThread::start(jail.clone()).map_err(host("start a thread"))?;

        let kvm = kvm::open(config.kvm.map(|fd| take("KVM", fd)).transpose()?)?;
        let memory = backing.create(config.memory_mib)?;
        let root_image = match config.root_image {
            Some(fd) => Some(RootImage::map(take("the root image", fd)?)?),
            None => None,
        };
        let vm = kvm::create_vm(&kvm, &memory, root_image)?;
        let entry = kernel::load_kernel(&memory, take("the kernel", config.kernel)?, backing)?;
        kernel::write_command_line(&memory, config)?;
        pvh::write_start_info(&memory, root_image.map(|image| image.size))?;
        memory.write_slice(&mptable::build(config.vcpus), GuestAddress(layout::MP_TABLE))?;
        let vcpus = create_vcpus(&kvm, &vm, config.vcpus, entry)?;

        let mmio = Arc::new(Bus::default());
        let pci = Arc::new(PciBus::new(vm.clone(), memory.clone(), mmio.clone(), device_thread));
        if config.entropy {
            pci.add("rng", Box::new(Rng::new(registry.clone())))?;
        }
        if let Some(vsock) = &config.vsock {
            let mut host_ports = Vec::new();
            for port in &vsock.host_ports {
                host_ports.push((port.port, take("a vsock port", port.socket)?));
            }
            pci.add("vsock", Box::new(Vsock::new(vsock, host_ports, registry.clone())?))?;
        }
        for share in &config.shares {
            let root = take("a share", share.root)?;
            let rules = Rules { cache: share.cache, read_only: share.read_only };
            add_share(&pci, &share.tag, root, rules, config.vcpus)?;
        }
        let mut networks = Networks::new(pci.clone(), registry.clone());
        for network in &config.networks {
            let fds = network.fds.iter().map(|fd| take("a network interface", *fd)).collect::<Result<_, _>>()?;
            networks.add(network.device.clone(), fds)?;
        }
        let tail = ConsoleTail::default();
        let console = config.console.map(|fd| take("the console", fd)).transpose()?.map(File::from);
        let pio = port_bus(&pci, SerialConsole::new(tail.clone(), console), exit.clone());
        let gathered = GatheredWrites::create(&kvm, &vm, &vcpus[0], &pci.gatherable())?;
        let buses = Arc::new(Buses { pio, mmio, gathered });
        Ok(Self { _vm: vm, _memory: memory, vcpus, buses, pci, networks, registry, exit, tail, jail })
    }

    /// Runs the VM to its end.
    ///
    /// # Errors
    /// When the host refuses a thread or the event loop.
    pub fn run(self, control: &UnixStream) -> io::Result<Exit> {
        let vcpus = Arc::new(Vcpus::start(self.vcpus, self.buses, &self.exit, &self.jail)?);
        let (socket, registry) = (control.try_clone()?, self.registry.clone());
        let control = Control::new(socket, vcpus.clone(), self.pci, self.networks, registry, self.exit.clone());
        let fd = control.as_raw_fd();
        self.registry.add(fd, EventSet::IN, 0, Arc::new(Mutex::new(control)))?;
        self.jail.confine(ThreadKind::EventLoop);
        // The guest's first instruction comes after this.
        vcpus.resume();
        self.registry.run(|| self.exit.reason().is_some())?;
        let reason = self.exit.reason().unwrap_or(ExitReason::OwnerGone);
        Ok(Exit { reason, console_tail: self.tail.text() })
    }
}

fn check(config: &VmConfig) -> Result<(), BuildError> {
    if !(1..=vmm_api::MAX_VCPUS).contains(&config.vcpus) {
        return Err(BuildError::Config("vcpus must be 1 to 64"));
    }
    if !(1..=config.vcpus).contains(&config.boot_vcpus) {
        return Err(BuildError::Config("boot_vcpus must be 1 to vcpus"));
    }
    if !(vmm_api::MIN_MEMORY_MIB..=vmm_api::MAX_MEMORY_MIB).contains(&config.memory_mib) {
        return Err(BuildError::Config("memory_mib must be 64 to 1048576"));
    }
    Ok(())
}

fn create_vcpus(kvm: &kvm_ioctls::Kvm, vm: &VmFd, count: u8, entry: u64) -> Result<Vec<VcpuFd>, BuildError> {
    let supported = kvm::supported_cpuid(kvm)?;
    let ioctl = |ioctl| move |source| KvmError::Ioctl { ioctl, source };
    let mut vcpus = Vec::new();
    for index in 0..count {
        let vcpu = vm.create_vcpu(index.into()).map_err(ioctl("KVM_CREATE_VCPU"))?;
        kvm::set_cpuid(&vcpu, &cpuid::of_vcpu(&supported, index, count))?;
        registers::set_common(&vcpu).map_err(ioctl("setting MSRs"))?;
        if index == 0 {
            registers::set_boot_registers(&vcpu, entry).map_err(ioctl("setting registers"))?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// Plugs a shared directory in.
///
/// # Errors
/// [`BuildError::Share`] and [`BuildError::Pci`].
pub(crate) fn add_share(
    pci: &PciBus,
    tag: &str,
    root: OwnedFd,
    rules: Rules,
    vcpu_count: u8,
) -> Result<(), BuildError> {
    let name = tag.to_owned();
    let opened = pci.device_thread().call(move || Fs::open(&name, root, rules, vcpu_count));
    let fs = opened.map_err(|source| BuildError::Share { tag: tag.to_owned(), source })?;
    Ok(pci.add(&share_name(tag), Box::new(fs))?)
}

/// What the bus calls the share `tag`.
pub(crate) fn share_name(tag: &str) -> String {
    format!("share {tag}")
}

fn port_bus(pci: &Arc<PciBus>, console: SerialConsole, exit: ExitSignal) -> Bus {
    let pio = Bus::default();
    pio.insert(serial::PORT, serial::PORT_COUNT, Arc::new(Mutex::new(console)));
    pio.insert(i8042::PORT, i8042::PORT_COUNT, Arc::new(Mutex::new(I8042::new(exit))));
    pci.attach(&pio);
    pio
}

/// Wakes the loop; what woke it is read elsewhere.
struct Wake(EventFd);

impl EventSource for Wake {
    fn on_event(&mut self, _token: u64, _ready: EventSet) {
        // Only resets the counter.
        let _ = self.0.read();
    }
}

fn watch(registry: &Registry, wake: EventFd) -> io::Result<()> {
    let fd = std::os::fd::AsRawFd::as_raw_fd(&wake);
    registry.add(fd, EventSet::IN, 0, Arc::new(Mutex::new(Wake(wake))))
}
