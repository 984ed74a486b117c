//! FUSE requests of the guest.
#![no_main]

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};

/// Largest file, in bytes: a guest may ask for 2^63.
const MAX_FILE_LEN: u64 = 16 << 20;

libfuzzer_sys::fuzz_target!(
    init: {
        setrlimit(Resource::RLIMIT_FSIZE, MAX_FILE_LEN, MAX_FILE_LEN).expect("a lower limit");
        SigSet::from(Signal::SIGXFSZ).thread_block().expect("a signal mask");
    },
    |data: &[u8]| vmm::fuzz::fuse_requests(data)
);
