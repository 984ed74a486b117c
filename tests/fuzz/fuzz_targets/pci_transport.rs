//! Configuration space and registers of a virtio device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::fuzz::pci_transport(data));
