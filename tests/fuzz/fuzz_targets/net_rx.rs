//! Frames of the host, and the guest's buffers for them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::fuzz::net_rx(data));
