//! The bare machine: ports, physical memory, model-specific registers, exceptions. All unsafe code is here; every access is to a place
//! that is either a device's or the attacks' own memory, so nothing can break this program's own state.
#![expect(unsafe_code, reason = "there is no operating system below")]

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

global_asm!(include_str!("boot.s"));

/// Memory for the attacks: below is this program, from the first megabyte on.
pub const OWN_MEMORY: u64 = 0x200_0000;
const ADAPTERS: Range<u64> = 0xc_0000..0x10_0000;
/// First address behind the RAM of the VM that the story makes.
pub const RAM_END: u64 = 0x800_0000;
/// The root image, which the story makes of 2 MiB.
pub const ROOT_IMAGE: u64 = 0xe000_0000;
/// First address behind it.
pub const ROOT_IMAGE_END: u64 = 0xe020_0000;

#[unsafe(no_mangle)]
static RESUME_AT: AtomicU64 = AtomicU64::new(0);
#[unsafe(no_mangle)]
static FAULTED: AtomicBool = AtomicBool::new(false);

unsafe extern "C" {
    static exception_stubs: u8;
}

/// A number that memory, a port or a register holds.
pub trait Width: Copy + Default {
    /// Reads a port.
    fn read_port(port: u16) -> Self;
    /// Writes a port.
    fn write_port(self, port: u16);
}

macro_rules! width {
    ($type:ty, $register:tt, $in:literal, $out:literal) => {
        impl Width for $type {
            fn read_port(port: u16) -> Self {
                let value: $type;
                // SAFETY: ports belong to the VMM; no one of them changes this program's memory.
                unsafe { asm!($in, in("dx") port, out($register) value) };
                value
            }

            fn write_port(self, port: u16) {
                // SAFETY: as above.
                unsafe { asm!($out, in("dx") port, in($register) self) };
            }
        }
    };
}

width!(u8, "al", "in al, dx", "out dx, al");
width!(u16, "ax", "in ax, dx", "out dx, ax");
width!(u32, "eax", "in eax, dx", "out dx, eax");

/// Writes the same bytes to a port `count` times with one instruction.
pub fn write_port_string(port: u16, bytes: &[u8]) {
    // SAFETY: reads exactly `bytes`.
    unsafe { asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _) };
}

/// Reads physical memory or a device's register.
pub fn read<T: Copy>(address: u64) -> T {
    assert!(address >= OWN_MEMORY || ADAPTERS.contains(&address));
    // SAFETY: the address is mapped and not this program's; what is there has no invalid values for an integer.
    unsafe { (address as *const T).read_volatile() }
}

/// Writes physical memory or a device's register.
pub fn write<T: Copy>(address: u64, value: T) {
    assert!(address >= OWN_MEMORY || ADAPTERS.contains(&address));
    // SAFETY: as above.
    unsafe { (address as *mut T).write_volatile(value) };
}

/// Runs one instruction between two labels; true when it did not fault.
macro_rules! guarded {
    ($instruction:literal, $($operand:tt)*) => {{
        FAULTED.store(false, Ordering::SeqCst);
        // SAFETY: a fault continues behind the instruction; the instruction itself touches no memory of this program.
        unsafe {
            asm!(
                "lea {resume}, [rip + 2f]",
                "mov [RESUME_AT], {resume}",
                $instruction,
                "2:",
                "mov qword ptr [RESUME_AT], 0",
                resume = out(reg) _,
                $($operand)*
            )
        };
        !FAULTED.load(Ordering::SeqCst)
    }};
}

/// Reads a model-specific register; nothing when that faults.
pub fn read_msr(register: u32) -> Option<u64> {
    let (low, high): (u32, u32);
    let ran = guarded!("rdmsr", in("ecx") register, lateout("eax") low, lateout("edx") high);
    ran.then_some(u64::from(high) << 32 | u64::from(low))
}

/// Writes a model-specific register; false when that faults.
pub fn write_msr(register: u32, value: u64) -> bool {
    guarded!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32)
}

/// Reads a performance counter; nothing when that faults.
pub fn read_counter(counter: u32) -> Option<u64> {
    let (low, high): (u32, u32);
    let ran = guarded!("rdpmc", in("ecx") counter, lateout("eax") low, lateout("edx") high);
    ran.then_some(u64::from(high) << 32 | u64::from(low))
}

/// The four registers of a CPUID leaf.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let result = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// Calls the hypervisor; nothing when the instruction faults.
pub fn hypercall(intel: bool, number: u64, argument: u64) -> Option<u64> {
    let (mut result, mut scratch) = (number, argument);
    let ran = if intel {
        guarded!("vmcall", inout("rax") result, inout("rcx") argument => _, inout("rdx") scratch)
    } else {
        guarded!("vmmcall", inout("rax") result, inout("rcx") argument => _, inout("rdx") scratch)
    };
    let _ = scratch;
    ran.then_some(result)
}

/// An instruction that a guest should not have or that has unusual effects.
#[derive(Clone, Copy, Debug)]
pub enum Odd {
    /// Starts SVM.
    Vmrun,
    /// Leaves VMX.
    Vmxoff,
    /// Leaves system management mode.
    Rsm,
    /// Writes back all caches.
    Wbinvd,
    /// Drops all caches.
    Invd,
    /// Waits for a write.
    Mwait,
    /// Sets an extended control register.
    Xsetbv,
    /// Undefined.
    Ud2,
}

/// Runs it; false when it faults.
pub fn run_odd(odd: Odd) -> bool {
    match odd {
        Odd::Vmrun => guarded!("vmrun rax", in("rax") OWN_MEMORY),
        Odd::Vmxoff => guarded!("vmxoff",),
        Odd::Rsm => guarded!("rsm",),
        Odd::Wbinvd => guarded!("wbinvd",),
        Odd::Invd => guarded!("invd",),
        Odd::Mwait => guarded!("mwait", in("eax") 0, in("ecx") 0),
        Odd::Xsetbv => guarded!("xsetbv", in("ecx") 0xffff, in("eax") u32::MAX, in("edx") u32::MAX),
        Odd::Ud2 => guarded!("ud2",),
    }
}

#[repr(C, align(16))]
struct Gates(UnsafeCell<[[u64; 2]; 32]>);
// SAFETY: there is one CPU, and nothing uses the table before `load_gates` has filled it.
unsafe impl Sync for Gates {}
static GATES: Gates = Gates(UnsafeCell::new([[0; 2]; 32]));

/// Sends exceptions to the stubs of `boot.s`.
pub fn load_gates() {
    const STUB_LEN: u64 = 16;
    const INTERRUPT_GATE: u64 = 0x8e00 << 32 | 8 << 16;
    let first = &raw const exception_stubs as u64;
    let mut gates = [[0; 2]; 32];
    for (gate, number) in gates.iter_mut().zip(0..) {
        let stub = first + number * STUB_LEN;
        *gate = [(stub >> 16 & 0xffff) << 48 | INTERRUPT_GATE | (stub & 0xffff), stub >> 32];
    }
    // SAFETY: the one reference to it; no exception has a gate yet.
    unsafe { *GATES.0.get() = gates };
    let [l0, l1]: [u8; 2] = 511_u16.to_le_bytes();
    let mut pointer = [l0, l1, 0, 0, 0, 0, 0, 0, 0, 0];
    pointer[2..].copy_from_slice(&(GATES.0.get() as u64).to_le_bytes());
    // SAFETY: the table lives for ever, and each gate leads to code.
    unsafe { asm!("lidt [{}]", in(reg) pointer.as_ptr()) };
}

/// Resets the machine by the keyboard controller's line: the VM ends.
pub fn reset() -> ! {
    0xfe_u8.write_port(0x64);
    halt()
}

/// Does nothing any more: the VM stays for whoever looks at it.
pub fn halt() -> ! {
    loop {
        // SAFETY: waits for nothing.
        unsafe { asm!("hlt") };
    }
}

/// What compiled code refers to: copies, by bytes since speed is of no interest here, and unwinding, which never happens.
mod compiler_calls {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    extern "C" fn rust_eh_personality() {}

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        // SAFETY: the caller's two areas of `len` bytes.
        unsafe { asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _) };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
        // SAFETY: the caller's area of `len` bytes.
        unsafe { asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") len => _) };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        if (to as usize) <= from as usize {
            // SAFETY: the caller's areas; copying upward does not overwrite what is still to be read.
            return unsafe { memcpy(to, from, len) };
        }
        let (last_to, last_from) = (to.wrapping_add(len).wrapping_sub(1), from.wrapping_add(len).wrapping_sub(1));
        // SAFETY: as above, downward; the direction flag is cleared again.
        unsafe {
            asm!("std; rep movsb; cld", inout("rdi") last_to => _, inout("rsi") last_from => _, inout("rcx") len => _)
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
        for at in 0..len {
            // SAFETY: the caller's area of `len` bytes.
            let a = unsafe { left.wrapping_add(at).read_volatile() };
            // SAFETY: as above.
            let b = unsafe { right.wrapping_add(at).read_volatile() };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
        // SAFETY: the same contract.
        unsafe { memcmp(left, right, len) }
    }
}
