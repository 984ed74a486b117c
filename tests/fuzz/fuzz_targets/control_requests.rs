//! Requests on the control socket of a VMM.
#![no_main]

use vmm_api::control::Request;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let again = serde_json::to_vec(&request).expect("it can be written");
        assert_eq!(serde_json::from_slice::<Request>(&again).expect("and read again"), request);
    }
});
