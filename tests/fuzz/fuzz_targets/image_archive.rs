//! An archive of an image.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmrun::fuzz::image_archive(data));
