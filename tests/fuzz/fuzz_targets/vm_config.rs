//! The configuration of a VM.
#![no_main]

use vmm_api::VmConfig;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(config) = serde_json::from_slice::<VmConfig>(data) {
        let again = serde_json::to_vec(&config).expect("it can be written");
        assert_eq!(serde_json::from_slice::<VmConfig>(&again).expect("and read again"), config);
        assert!(config.fds().contains(&config.control));
    }
});
