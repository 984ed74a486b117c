//! The `/init` of a kernel benchmark: prints the time stamp counter, which counts instructions under QEMU's `-icount shift=0`, and
//! resets the machine. Compiled by `kernel-boot`, not by cargo.
#![allow(unsafe_code, reason = "reads the time stamp counter; makes one system call")]

use std::arch::{asm, x86_64::_rdtsc};

fn main() {
    // SAFETY: RDTSC has no precondition in user mode: no kernel here sets CR4.TSD.
    println!("instructions {}", unsafe { _rdtsc() });
    // reboot(2): the two magic numbers and LINUX_REBOOT_CMD_RESTART.
    // SAFETY: the call does not return when it succeeds and touches no memory of this process.
    unsafe {
        asm!("syscall", in("rax") 169, in("rdi") 0xfee1_dead_u32, in("rsi") 672_274_793_u32, in("rdx") 0x0123_4567,
            lateout("rax") _, out("rcx") _, out("r11") _)
    };
}
