//! What an agent sends in place of its answers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sandbox::fuzz::agent_answers(data));
