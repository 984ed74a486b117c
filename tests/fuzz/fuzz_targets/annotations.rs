//! Annotations of pods.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| containerd_shim_vm_v2::fuzz::annotations(data));
