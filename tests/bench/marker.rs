//! The command of a benchmark: its first instruction is a CPUID of a leaf that nobody else asks for, which a guest cannot do without an
//! exit to KVM, and then it exits. Compiled by `marker`, not by cargo.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a program without a runtime")]

core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "mov eax, 0x4f4b0001", // tests/src/bin/bench/counts.rs and instructions.py know it
    "cpuid",
    "mov eax, 60", // exit(0)
    "xor edi, edi",
    "syscall",
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
