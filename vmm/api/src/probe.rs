//! What `vmm --probe` prints as JSON: whether this host's KVM runs a guest's kernel code at speed.

use serde::{Deserialize, Serialize};

/// The outcome.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Probe {
    /// A loop ran in the guest's ring 0 to its end.
    Ran {
        /// Instructions of the loop.
        instructions: u64,
        /// How long they took.
        elapsed_us: u64,
        /// Most vCPUs of one VM that KVM allows.
        max_vcpus: u32,
    },
    /// The loop did not end in time: ring 0 is emulated.
    Slow {
        /// Instructions of the loop.
        instructions: u64,
        /// The deadline that passed.
        deadline_ms: u64,
    },
    /// KVM cannot be used.
    Unusable {
        /// The chain of causes.
        detail: String,
    },
}
