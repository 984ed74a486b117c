//! Loads the kernel into guest RAM and composes the command line.

use std::fs::File;
use std::os::fd::OwnedFd;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader as _, KernelLoaderResult};
use thiserror::Error;
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryError};
use vmm_api::VmConfig;

use crate::arch::layout::{COMMAND_LINE, COMMAND_LINE_MAX, HIMEM_START};
use crate::memory::Backing;
use crate::virtio::GuestMemory;

/// Why a kernel cannot be booted.
#[derive(Debug, Error)]
pub enum KernelError {
    /// Not an ELF file, or one that does not fit.
    #[error("cannot load the guest kernel: it must be an uncompressed vmlinux that fits into guest RAM")]
    Load(#[source] linux_loader::loader::Error),
    /// The kernel has no PVH entry.
    #[error("the guest kernel has no PVH note: build it with CONFIG_PVH")]
    NoPvh,
    /// Guest RAM refused a write.
    #[error("cannot write to guest RAM")]
    Write(#[source] GuestMemoryError),
    /// The command line is too long.
    #[error("the kernel command line of {len} bytes is longer than {COMMAND_LINE_MAX}")]
    CommandLine {
        /// Its length.
        len: usize,
    },
}

/// Always on the command line. `reboot=k` resets through the keyboard controller, `panic=-1` does it at once; the MP table
/// is all the firmware there is, configuration space of PCI needs no probing and is read from its copy, and there is no chipset whose
/// quirks have to be known early. A kernel that finds one CPU would take out each LOCK prefix, with a switch of page tables for
/// each, and put them back when it finds more: `noreplace-smp`. What is free is reported from 128 KiB (32 pages) on. Interfaces
/// that nobody asked for (`tunl0`, `dummy0`, `ifb0`, ...) would be seen in each container.
const COMMAND_LINE_BASE: &str = "reboot=k panic=-1 pci=conf1,copy=0xd0000,lastbus=0,noearly i8042.noaux i8042.nokbd i8042.nopnp i8042.dumbkbd \
     random.trust_cpu=on tsc=reliable no_timer_check noreplace-smp cryptomgr.notests \
     fb_tunnels=none dummy.numdummies=0 ifb.numifbs=0 page_reporting.page_reporting_order=5";
/// Without a console nothing is printed until something goes wrong: the early console costs exits only for messages that
/// are printed, and a panic's last words reach the ring. The first program's `/dev/console` takes words and has none.
const COMMAND_LINE_QUIET: &str =
    "quiet loglevel=1 8250.nr_uarts=0 earlycon=uart8250,io,0x3f8 keep_bootcon console=ttynull";
const COMMAND_LINE_CONSOLE: &str = "console=ttyS0 8250.nr_uarts=1 earlycon=uart8250,io,0x3f8";
/// The root image, executed in place.
const COMMAND_LINE_ROOT: &str = "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always init=/init";

/// Loads the kernel; returns its PVH entry.
///
/// # Errors
/// [`KernelError::Load`] and [`KernelError::NoPvh`].
pub fn load_kernel(memory: &GuestMemory, kernel: OwnedFd, backing: &Backing) -> Result<u64, KernelError> {
    let mut file = File::from(kernel);
    backing.prepare(memory);
    let KernelLoaderResult { pvh_boot_cap, .. } =
        Elf::load(memory, None, &mut file, Some(GuestAddress(HIMEM_START))).map_err(KernelError::Load)?;
    match pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok(entry.raw_value()),
        _ => Err(KernelError::NoPvh),
    }
}

/// Writes the command line.
///
/// # Errors
/// [`KernelError::CommandLine`] and [`KernelError::Write`].
pub fn write_command_line(memory: &GuestMemory, config: &VmConfig) -> Result<(), KernelError> {
    memory.write_slice(&command_line(config)?, GuestAddress(COMMAND_LINE)).map_err(KernelError::Write)
}

/// The command line with its final zero.
fn command_line(config: &VmConfig) -> Result<Vec<u8>, KernelError> {
    let console = if config.console.is_some() { COMMAND_LINE_CONSOLE } else { COMMAND_LINE_QUIET };
    let mut line = format!("{COMMAND_LINE_BASE} {console}");
    if config.root_image.is_some() {
        line = format!("{line} {COMMAND_LINE_ROOT}");
    }
    if config.boot_vcpus < config.vcpus {
        line.push_str(&format!(" maxcpus={}", config.boot_vcpus));
    }
    let mut line = format!("{line} {}", config.cmdline).trim_end().to_owned().into_bytes();
    line.push(0);
    if line.len() > COMMAND_LINE_MAX {
        return Err(KernelError::CommandLine { len: line.len() });
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;

    use vmm_api::{Fd, VmConfig};

    use super::{Backing, COMMAND_LINE_MAX, KernelError, command_line, load_kernel};
    use crate::arch::layout::PCI_CONFIG_COPY;

    fn config(vcpus: u8, boot_vcpus: u8, cmdline: String) -> VmConfig {
        VmConfig {
            name: String::new(),
            kvm: None,
            vcpus,
            boot_vcpus,
            memory_mib: 64,
            cgroup: None,
            kernel: Fd(3),
            root_image: None,
            cmdline,
            console: None,
            control: Fd(4),
            entropy: false,
            vsock: None,
            shares: Vec::new(),
            networks: Vec::new(),
        }
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(bytes).expect("written");
        file
    }

    #[test]
    fn a_command_line_that_would_be_cut_is_refused() {
        let error = command_line(&config(1, 1, "x".repeat(COMMAND_LINE_MAX))).expect_err("refused");
        assert!(matches!(error, KernelError::CommandLine { .. }));
    }

    #[test]
    fn the_kernel_is_told_where_the_copy_of_configuration_space_is() {
        let line = String::from_utf8(command_line(&config(1, 1, String::new())).expect("short")).expect("text");
        assert!(line.contains(&format!("pci=conf1,copy={PCI_CONFIG_COPY:#x},")), "{line}");
    }

    #[test]
    fn vcpus_beyond_the_first_ones_stay_offline() {
        let line = |vcpus, boot_vcpus| {
            String::from_utf8(command_line(&config(vcpus, boot_vcpus, "last".to_owned())).expect("short"))
                .expect("text")
        };
        assert!(line(8, 2).ends_with(" maxcpus=2 last\0"));
        assert!(!line(8, 8).contains("maxcpus"));
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let memory = crate::memory::create(64).expect("memory");
        let refused = |bytes: &[u8]| load_kernel(&memory, file(bytes).into(), &Backing::Small).expect_err("refused");
        assert!(matches!(refused(b""), KernelError::Load(_)));
        assert!(matches!(refused(&[0x1f, 0x8b, 8, 0]), KernelError::Load(_)));
        assert!(matches!(refused(&[0x7f; 4096]), KernelError::Load(_)));
    }
}
