//! The only place that knows which architecture this is.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{cpuid, layout, mptable, msrs, pvh, registers};
