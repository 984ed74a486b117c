//! The virtual machine monitor: one process, one microVM, on KVM.
//!
//! ```text
//!   main ─► process ─► machine (the boot recipe) ─► kvm, memory, kernel, arch (what a VM is made of)
//!                                                ─► vcpu threads ─► bus ─► legacy, virtio::pci ─► virtio devices
//!                                                ─► event_loop (main thread): queue kicks, sockets, control
//! ```
//!
//! Knows no containers. Everything it works on arrives as open descriptors in `vmm_api::VmConfig`.

pub mod arch;
pub mod bus;
pub mod cli;
pub mod control;
pub mod device_thread;
pub mod event_loop;
pub mod exit;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod gathered;
pub mod inherited;
pub mod jail;
pub mod kernel;
pub mod kvm;
pub mod legacy;
pub mod machine;
pub mod memory;
pub mod networks;
pub mod probe;
pub mod process;
pub mod root_image;
pub mod signals;
pub mod vcpu;
pub mod virtio;
