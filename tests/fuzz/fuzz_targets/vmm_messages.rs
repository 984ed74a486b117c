//! What a VMM says on its control socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sandbox::fuzz::vmm_messages(data));
