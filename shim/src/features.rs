//! `-info` and `-v`: what the runtime is, and which parts of the OCI specification hold in its guests. It runs for each use
//! of the runtime, so it touches nothing.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

/// Name of the features document (Features of the OCI runtime specification) as containerd's clients know it.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Mount options that a container's mounts may have. `rshared` is refused (`shim/sandbox/src/plan.rs`).
const MOUNT_OPTIONS: [&str; 30] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "remount",
    "ro",
    "rprivate",
    "rro",
    "rslave",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
];

/// Prints `-info`.
pub(crate) fn print() -> Result<()> {
    let info = RuntimeInfo {
        name: "io.containerd.vm.v2".to_owned(),
        version: Some(RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..Default::default() }).into(),
        features: Some(Any {
            type_url: FEATURES_TYPE.to_owned(),
            value: serde_json::to_vec(&features())?,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    io::stdout().write_all(&info.write_to_bytes()?).context("cannot answer")
}

/// Prints `-v`.
pub(crate) fn print_version() -> Result<()> {
    writeln!(io::stdout(), "containerd-shim-vm-v2:\n  Version:  {}", env!("CARGO_PKG_VERSION")).context("cannot answer")
}

/// The document. What the agent refuses (`agent/src/refuse.rs`) is not in it.
fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": ["prestart", "createRuntime", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } }
        },
        "annotations": {},
        "potentiallyUnsafeConfigAnnotations": []
    })
}

#[cfg(test)]
mod tests {
    use super::features;

    #[test]
    fn what_is_refused_is_not_promised() {
        let features = features();
        let hooks = features["hooks"].as_array().expect("names");
        assert!(!hooks.iter().any(|hook| hook == "createContainer" || hook == "startContainer"));
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], false);
        assert_eq!(features["linux"]["selinux"]["enabled"], false);
        let options = features["mountOptions"].as_array().expect("names");
        assert!(!options.iter().any(|option| option == "shared" || option == "rshared"));
    }
}
