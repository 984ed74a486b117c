//! What the CRI plugin of containerd, and CRI-O, say about pods in annotations of the OCI spec.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context as _, Result};
use oci_spec::runtime::Spec;
use sandbox::plan::{GUEST_OVERHEAD_MIB, PlanError, VmSize, vm_size};
use serde::Deserialize;

use crate::config::Config;

const SANDBOX_ID: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];
const CONTAINER_TYPE: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const OUR_MEMORY: &str = "vmrun.memory-mib";
const OUR_VCPUS: &str = "vmrun.vcpus";
/// Those that are for users.
#[cfg(any(test, fuzzing))]
pub(crate) const OUR_ANNOTATIONS: [&str; 2] = [OUR_MEMORY, OUR_VCPUS];

type Annotations = HashMap<String, String>;

/// What a container is in its pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Role {
    /// The only one of its VM.
    Alone,
    /// The one that stands for the pod, and only waits.
    Pause,
    /// One of a pod's.
    Member,
}

/// The role that the annotations give.
pub(crate) fn role(annotations: &Annotations) -> Role {
    match first(annotations, &CONTAINER_TYPE) {
        Some("sandbox") => Role::Pause,
        Some("container") => Role::Member,
        _ => Role::Alone,
    }
}

fn first<'a>(annotations: &'a Annotations, names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| annotations.get(*name)).map(String::as_str).filter(|value| !value.is_empty())
}

/// The pod's id, if the container is in one.
pub(crate) fn sandbox_id(annotations: &Annotations) -> Option<&str> {
    first(annotations, &SANDBOX_ID)
}

/// The part of a spec that the launcher reads.
#[derive(Deserialize)]
struct SpecAnnotations {
    #[serde(default)]
    annotations: Annotations,
}

/// The pod of the container in this folder; nothing for one that is alone, or a sandbox without a spec.
pub(crate) fn sandbox_of_bundle(bundle: &Path) -> Result<Option<String>> {
    let path = bundle.join("config.json");
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let spec: SpecAnnotations =
        serde_json::from_slice(&text).with_context(|| format!("{} is not a spec", path.display()))?;
    Ok(sandbox_id(&spec.annotations).map(str::to_owned))
}

/// Limits on what runs in a VM; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Limits {
    /// CPUs.
    pub(crate) cpus: f64,
    /// Memory, in bytes.
    pub(crate) memory_bytes: u64,
}

impl Limits {
    /// From a quota and a period, in microseconds, and bytes; what is not positive is no limit.
    pub(crate) fn new(quota_us: i64, period_us: i64, memory_bytes: i64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "microseconds of a second or so")]
        let cpus = if quota_us > 0 && period_us > 0 { quota_us as f64 / period_us as f64 } else { 0.0 };
        Self { cpus, memory_bytes: u64::try_from(memory_bytes).unwrap_or_default() }
    }

    /// Of a whole pod, from the annotations of its sandbox.
    pub(crate) fn of_pod(annotations: &Annotations) -> Self {
        let number = |name| annotations.get(name).and_then(|value| value.parse().ok()).unwrap_or_default();
        Self::new(number(CPU_QUOTA), number(CPU_PERIOD), number(MEMORY))
    }

    /// Of one container.
    pub(crate) fn of_container(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
        let memory = resources.memory().as_ref().and_then(|memory| memory.limit()).unwrap_or_default();
        let cpu = resources.cpu().clone().unwrap_or_default();
        let period = i64::try_from(cpu.period().unwrap_or(100_000)).unwrap_or_default();
        Self::new(cpu.quota().unwrap_or_default(), period, memory)
    }
}

/// The VM for these limits: what they name, the configuration's where they name nothing, or less where an annotation that
/// the configuration allows asks for less.
pub(crate) fn size(config: &Config, limits: Limits, annotations: &Annotations) -> Result<VmSize, PlanError> {
    let cpus = if limits.cpus > 0.0 { limits.cpus } else { f64::from(config.vm.vcpus) };
    let default_bytes = u64::from(config.vm.memory_mib) << 20;
    let memory_bytes = if limits.memory_bytes > 0 { limits.memory_bytes } else { default_bytes };
    let mut size = vm_size(cpus, memory_bytes)?;
    let asked = |name: &str| {
        let is_allowed = config.annotations.allowed.iter().any(|allowed| allowed == name);
        annotations.get(name).filter(|_| is_allowed).and_then(|value| value.parse::<u32>().ok())
    };
    if let Some(memory_mib) = asked(OUR_MEMORY) {
        size.memory_mib = size.memory_mib.min(memory_mib.saturating_add(GUEST_OVERHEAD_MIB));
    }
    if let Some(vcpus) = asked(OUR_VCPUS).and_then(|vcpus| u8::try_from(vcpus).ok()) {
        size.vcpus = size.vcpus.min(vcpus.max(1));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use sandbox::plan::VmSize;

    use super::{Limits, Role, role, size};
    use crate::config::Config;

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn roles_of_containerd_and_cri_o_are_known() {
        assert_eq!(role(&annotations(&[("io.kubernetes.cri.container-type", "sandbox")])), Role::Pause);
        assert_eq!(role(&annotations(&[("io.kubernetes.cri-o.ContainerType", "container")])), Role::Member);
        assert_eq!(role(&annotations(&[])), Role::Alone);
    }

    #[test]
    fn a_pod_has_the_size_of_its_limits_and_the_guest() {
        let pod = annotations(&[
            ("io.kubernetes.cri.sandbox-cpu-quota", "150000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
            ("io.kubernetes.cri.sandbox-memory", "268435456"),
        ]);
        let found = size(&Config::default(), Limits::of_pod(&pod), &pod);
        assert_eq!(found, Ok(VmSize { vcpus: 2, memory_mib: 256 + 96 }));
        let without = size(&Config::default(), Limits::default(), &HashMap::new());
        assert_eq!(without, Ok(VmSize { vcpus: 1, memory_mib: 1024 + 96 }));
    }

    #[test]
    fn an_annotation_counts_when_allowed_and_only_makes_smaller() {
        let mut config = Config::default();
        let asked = annotations(&[("vmrun.memory-mib", "128"), ("vmrun.vcpus", "8")]);
        assert_eq!(size(&config, Limits::default(), &asked).expect("size").memory_mib, 1024 + 96);
        config.annotations.allowed = vec!["vmrun.memory-mib".to_owned(), "vmrun.vcpus".to_owned()];
        let smaller = size(&config, Limits::default(), &asked);
        assert_eq!(smaller, Ok(VmSize { vcpus: 1, memory_mib: 128 + 96 }));
    }
}
