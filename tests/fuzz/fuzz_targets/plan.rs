//! OCI specs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sandbox::fuzz::plan(data));
