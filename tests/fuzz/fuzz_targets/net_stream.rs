//! What the other side of a stream socket writes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::fuzz::net_stream(data));
