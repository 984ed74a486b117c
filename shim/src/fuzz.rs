//! What the fuzzers in `tests/fuzz` call: what users of a cluster write. Compiled for fuzzing and for the unit tests only.

use std::collections::HashMap;

use sandbox::plan::GUEST_OVERHEAD_MIB;

use crate::config::Config;
use crate::cri::{self, Limits, OUR_ANNOTATIONS};

/// Annotations as JSON, where the configuration allows all of ours.
///
/// # Panics
/// When they make a VM that cannot be, or one that is larger than it is without ours.
pub fn annotations(data: &[u8]) {
    let Ok(annotations) = serde_json::from_slice::<HashMap<String, String>>(data) else { return };
    let _ = (cri::role(&annotations), cri::sandbox_id(&annotations));
    let mut config = Config::default();
    let limits = Limits::of_pod(&annotations);
    let without = cri::size(&config, limits, &annotations);
    config.annotations.allowed = OUR_ANNOTATIONS.map(str::to_owned).into();
    match (cri::size(&config, limits, &annotations), without) {
        (Ok(with), Ok(without)) => {
            assert!((GUEST_OVERHEAD_MIB..=without.memory_mib).contains(&with.memory_mib), "{with:?} {without:?}");
            assert!((1..=without.vcpus).contains(&with.vcpus), "{with:?} {without:?}");
        }
        (with, without) => assert_eq!(with, without, "ours neither refuse nor help"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_target_takes_its_bytes() {
        let inputs = [
            r#"{"vmrun.vcpus": "0", "vmrun.memory-mib": "0"}"#,
            r#"{"io.kubernetes.cri.sandbox-memory": "1", "vmrun.memory-mib": "1", "vmrun.vcpus": "256"}"#,
            r#"{"io.kubernetes.cri.sandbox-cpu-quota": "9223372036854775807", "io.kubernetes.cri.sandbox-cpu-period": "1"}"#,
            r#"{"io.kubernetes.cri.sandbox-memory": "9223372036854775807", "io.kubernetes.cri.container-type": "sandbox"}"#,
            "",
        ];
        inputs.into_iter().for_each(|input| super::annotations(input.as_bytes()));
    }
}
