//! Packets of the guest, rings, and sockets of the host.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::fuzz::vsock_packets(data));
