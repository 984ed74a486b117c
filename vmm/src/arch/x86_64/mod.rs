//! What an x86-64 guest finds when it starts: CPUs, tables and registers, without firmware.

pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod msrs;
pub mod pvh;
pub mod registers;
