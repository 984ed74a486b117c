//! The archive of an image's layer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmrun::fuzz::layer(data));
