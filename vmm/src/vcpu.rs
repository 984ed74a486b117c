//! One thread per vCPU: run the guest, carry its accesses to the buses, stop when told.
//!
//! ```text
//!   Running ──pause──► Paused ──resume──► Running ──exit reason──► thread ends, the VM ends
//! ```

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_api::control::{ExitReason, Stats};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch::registers;
use crate::bus::Bus;
use crate::event_loop::lock;
use crate::exit::ExitSignal;
use crate::gathered::GatheredWrites;
use crate::jail::{Jail, ThreadKind};
use crate::kvm;

/// The two address spaces of the guest's devices.
pub struct Buses {
    /// Ports.
    pub pio: Bus,
    /// Memory.
    pub mmio: Arc<Bus>,
    /// Writes that come before the next access to a device.
    pub gathered: GatheredWrites,
}

impl Buses {
    /// Brings gathered writes to their devices.
    fn settle(&self) {
        self.gathered.take(|address, data| {
            // No device of memory lies so low.
            let bus = if address <= u16::MAX.into() { &self.pio } else { &*self.mmio };
            bus.write(address, data);
        });
    }
}

/// Exits from the guest to us.
#[derive(Default)]
pub struct ExitCounts {
    port: AtomicU64,
    mmio: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
}

/// Whether vCPUs may run, and how many of them stand still.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    paused: bool,
    standing: usize,
}

/// All vCPUs of the VM.
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    counts: Arc<ExitCounts>,
    buses: Arc<Buses>,
}

/// Longest wait for every vCPU to stand still after a pause was asked for.
const PAUSE_DEADLINE: Duration = Duration::from_secs(2);
/// A signal that arrives just before `KVM_RUN` is lost, so it is sent again after this time.
const KICK_INTERVAL: Duration = Duration::from_millis(5);

impl Vcpus {
    /// Starts a thread for each vCPU; they run the guest from [`Self::resume`] on.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn start(vcpus: Vec<VcpuFd>, buses: Arc<Buses>, exit: &ExitSignal, jail: &Jail) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), ignore_kick)?;
        let gate = Arc::new(Gate::default());
        lock(&gate.state).paused = true;
        let counts = Arc::new(ExitCounts::default());
        let mut threads = Vec::new();
        for (index, fd) in vcpus.into_iter().enumerate() {
            let mut vcpu = Vcpu {
                index,
                fd,
                last_access: Access::None,
                buses: buses.clone(),
                gate: gate.clone(),
                counts: counts.clone(),
                exit: exit.clone(),
            };
            let jail = jail.clone();
            threads.push(thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
                jail.confine(ThreadKind::Vcpu);
                vcpu.run();
                // The process is about to end. Ending a thread takes calls that a vCPU has no other use for.
                loop {
                    thread::park();
                }
            })?);
        }
        Ok(Self { threads, gate, counts, buses })
    }

    /// Stops every vCPU until [`Self::resume`].
    ///
    /// # Errors
    /// `TimedOut` when one does not stand still in time; the others are resumed then.
    pub fn pause(&self) -> io::Result<()> {
        let mut state = lock(&self.gate.state);
        state.paused = true;
        let attempts = PAUSE_DEADLINE.as_millis() / KICK_INTERVAL.as_millis();
        for _ in 0..attempts {
            if state.standing == self.threads.len() {
                return Ok(());
            }
            for thread in &self.threads {
                thread.kill(SIGRTMIN())?;
            }
            let waited = self.gate.changed.wait_timeout(state, KICK_INTERVAL);
            state = waited.map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
        state.paused = false;
        self.gate.changed.notify_all();
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Lets vCPUs run again.
    pub fn resume(&self) {
        lock(&self.gate.state).paused = false;
        self.gate.changed.notify_all();
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn count(&self) -> u8 {
        u8::try_from(self.threads.len()).unwrap_or(u8::MAX)
    }

    /// Whether vCPUs are stopped.
    #[must_use]
    pub fn paused(&self) -> bool {
        lock(&self.gate.state).paused
    }

    /// Exits so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            port_exits: self.counts.port.load(Ordering::Relaxed),
            mmio_exits: self.counts.mmio.load(Ordering::Relaxed),
            interrupted_exits: self.counts.interrupted.load(Ordering::Relaxed),
            other_exits: self.counts.other.load(Ordering::Relaxed),
            unclaimed_accesses: self.buses.pio.unclaimed() + self.buses.mmio.unclaimed(),
        }
    }
}

/// Being interrupted is all that a kick is for.
extern "C" fn ignore_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

struct Vcpu {
    index: usize,
    fd: VcpuFd,
    last_access: Access,
    buses: Arc<Buses>,
    gate: Arc<Gate>,
    counts: Arc<ExitCounts>,
    exit: ExitSignal,
}

impl Vcpu {
    fn run(&mut self) {
        let mut port_exits = 0;
        loop {
            self.stand_still_while_paused();
            if let Some(reason) = self.run_once() {
                self.exit.end(reason);
                return;
            }
            // A write to the reset line ends the VM; a guest that ran on would try its other ways to reset.
            let count = self.counts.port.load(Ordering::Relaxed);
            if count != port_exits && self.exit.is_given() {
                return;
            }
            port_exits = count;
        }
    }

    fn stand_still_while_paused(&self) {
        let mut state = lock(&self.gate.state);
        if !state.paused {
            return;
        }
        state.standing += 1;
        self.gate.changed.notify_all();
        while state.paused {
            state = self.gate.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.standing -= 1;
    }

    /// Runs the guest until its next exit; returns why the VM ends, if it does.
    fn run_once(&mut self) -> Option<ExitReason> {
        let detail = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                self.last_access = Access::Port(port);
                count(&self.counts.port);
                self.buses.settle();
                self.buses.pio.read(port.into(), data);
                return None;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                self.last_access = Access::Port(port);
                count(&self.counts.port);
                self.buses.settle();
                self.buses.pio.write(port.into(), data);
                return None;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.last_access = Access::Memory(address);
                count(&self.counts.mmio);
                self.buses.settle();
                self.buses.mmio.read(address, data);
                return None;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.last_access = Access::Memory(address);
                count(&self.counts.mmio);
                self.buses.settle();
                self.buses.mmio.write(address, data);
                return None;
            }
            Ok(VcpuExit::Intr) => return self.interrupted(),
            Err(error) if interrupts(error) => return self.interrupted(),
            Ok(VcpuExit::Shutdown) => None,
            Ok(VcpuExit::SystemEvent(..)) => return Some(ExitReason::GuestReset),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Some(format!("entry failed on CPU {cpu}, reason {reason:#x}")),
            Ok(VcpuExit::InternalError) => Some(kvm::describe_internal_error(&mut self.fd)),
            Ok(other) => Some(format!("unexpected exit {other:?}")),
            Err(error) => Some(format!("KVM_RUN: {error}")),
        };
        count(&self.counts.other);
        let registers = format!("vCPU {}: {}, {}", self.index, registers::describe(&self.fd), self.last_access);
        Some(match detail {
            Some(detail) => ExitReason::KvmError { detail: format!("{detail}; {registers}") },
            None => ExitReason::TripleFault { registers },
        })
    }

    /// A kick has done its work.
    fn interrupted(&self) -> Option<ExitReason> {
        count(&self.counts.interrupted);
        None
    }
}

/// A vCPU's last access to a device: where it was, when its registers no longer say so.
enum Access {
    None,
    Port(u16),
    Memory(u64),
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("no access to a device yet"),
            Self::Port(port) => write!(f, "last access to a device: port {port:#x}"),
            Self::Memory(address) => write!(f, "last access to a device: address {address:#x}"),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn interrupts(error: kvm_ioctls::Error) -> bool {
    matches!(io::Error::from(error).kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}
