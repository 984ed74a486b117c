//! Whether this host's KVM runs a guest's kernel code at speed: a short loop in ring 0, timed. `vmrun check` asks for it.
//!
//! An open `/dev/kvm` proves little: a backend without hardware virtualization (kvm_pvm) emulates ring 0 an instruction at a
//! time, and a guest's kernel then needs minutes for its first second.
#![expect(unsafe_code, reason = "a memory slot hands a range of our address space to KVM")]

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::io::Errno;
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryMmap};
use vmm_api::probe::Probe;

use crate::kvm::{self, KvmError};

const CODE_ADDRESS: GuestAddress = GuestAddress(0x1000);
const MEMORY_LEN: usize = 0x2000;
/// Turns of the loop; hardware needs 5 ms, software emulation of a whole CPU 100 ms.
const LOOP_COUNT: u32 = 10_000_000;
/// Two instructions in each turn.
const INSTRUCTION_COUNT: u64 = 2 * LOOP_COUNT as u64;
/// A guest that runs fewer instructions in a second is emulated one by one.
const MIN_INSTRUCTIONS_PER_SECOND: u64 = 20_000_000;
/// When to give up: twice the time that the slowest usable host takes.
const DEADLINE: Duration = Duration::from_millis(2 * 1000 * INSTRUCTION_COUNT / MIN_INSTRUCTIONS_PER_SECOND);

/// Opens KVM and times the loop.
#[must_use]
pub fn probe() -> Probe {
    let kvm = match kvm::open(None) {
        Ok(kvm) => kvm,
        Err(error) => return Probe::Unusable { detail: format!("{:#}", anyhow::Error::from(error)) },
    };
    let max_vcpus = kvm.check_extension_int(Cap::MaxVcpus).unsigned_abs();
    match run_loop(&kvm) {
        Ok(Some(elapsed)) => Probe::Ran {
            instructions: INSTRUCTION_COUNT,
            elapsed_us: u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX),
            max_vcpus,
        },
        Ok(None) => Probe::Slow {
            instructions: INSTRUCTION_COUNT,
            deadline_ms: u64::try_from(DEADLINE.as_millis()).unwrap_or(u64::MAX),
        },
        Err(error) => Probe::Unusable { detail: format!("{:#}", anyhow::Error::from(error)) },
    }
}

/// The time that the loop took, or nothing when it did not end in time.
fn run_loop(kvm: &Kvm) -> Result<Option<Duration>, KvmError> {
    let (memory, vm, mut vcpu) = build(kvm)?;
    let (done, ended) = mpsc::channel();
    // A loop that does not end keeps its thread, with what it runs on, until the process ends.
    let spawned = thread::Builder::new().name("probe".to_owned()).spawn(move || {
        let started = Instant::now();
        let halted = vcpu.run().map(|exit| matches!(exit, VcpuExit::Hlt));
        // Nobody listening means that the deadline has passed.
        let _ = done.send((halted, started.elapsed()));
        drop((vcpu, vm, memory));
    });
    spawned.map_err(|error| failed("starting a thread", error.raw_os_error().unwrap_or_default()))?;
    match ended.recv_timeout(DEADLINE) {
        Ok((Ok(true), elapsed)) => Ok(Some(elapsed)),
        Ok((Ok(false), _)) => Err(failed("running a loop in ring 0", Errno::IO.raw_os_error())),
        Ok((Err(source), _)) => Err(KvmError::Ioctl { ioctl: "KVM_RUN", source }),
        Err(_) => Ok(None),
    }
}

/// A VM of one page of code and one vCPU about to run it.
fn build(kvm: &Kvm) -> Result<(GuestMemoryMmap, VmFd, VcpuFd), KvmError> {
    let ioctl = |ioctl| move |source| KvmError::Ioctl { ioctl, source };
    let no_memory = || failed("making guest memory", Errno::NOMEM.raw_os_error());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).map_err(|_| no_memory())?;
    // Real mode: mov ecx, LOOP_COUNT; again: dec ecx; jnz again; hlt.
    let [a, b, c, d] = LOOP_COUNT.to_le_bytes();
    let code = [0x66, 0xb9, a, b, c, d, 0x66, 0x49, 0x75, 0xfc, 0xf4];
    memory.write_slice(&code, CODE_ADDRESS).map_err(|_| no_memory())?;
    let address = memory.get_host_address(GuestAddress(0)).map_err(|_| no_memory())?;
    let vm = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
    let slot = kvm_userspace_memory_region {
        memory_size: MEMORY_LEN as u64,
        userspace_addr: address.addr() as u64,
        ..Default::default()
    };
    // SAFETY: the range is the mapping of `memory`, which goes where the VM goes and is dropped behind it.
    unsafe { vm.set_user_memory_region(slot) }.map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
    let vcpu = vm.create_vcpu(0).map_err(ioctl("KVM_CREATE_VCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: CODE_ADDRESS.0, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))?;
    Ok((memory, vm, vcpu))
}

fn failed(ioctl: &'static str, errno: i32) -> KvmError {
    KvmError::Ioctl { ioctl, source: kvm_ioctls::Error::new(errno) }
}
