//! The configuration: `/etc/vmrun/config.toml`, then `/etc/vmrun/config.d/*.toml` in the order of their names, each key of a
//! later file replacing that of an earlier one. `VMRUN_CONFIG`, or `ConfigPath` in containerd's configuration, names another
//! file; its drop-ins are in `config.d` beside it.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs, io};

use anyhow::{Context as _, Result};
use sandbox::network::{Policy, RateLimit};
use serde::Deserialize;

/// Names another file than [`DEFAULT_PATH`].
pub(crate) const VARIABLE: &str = "VMRUN_CONFIG";
const DEFAULT_PATH: &str = "/etc/vmrun/config.toml";

/// Everything that can be configured.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// The VMs.
    pub(crate) vm: VmDefaults,
    /// The network of pods.
    pub(crate) network: NetworkRules,
    /// Files that a VM is made from, where they are not beside the program.
    pub(crate) artifacts: ArtifactPaths,
    /// What a pod may ask for.
    pub(crate) annotations: Annotations,
    /// Programs of the host that specs name.
    pub(crate) hooks: HookRules,
    /// The log.
    pub(crate) log: Log,
}

/// A VM whose pod or container names no limits.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct VmDefaults {
    /// Memory for containers, in MiB.
    pub(crate) memory_mib: u32,
    /// Number of vCPUs.
    pub(crate) vcpus: u8,
    /// Time that a guest has to boot, in seconds. To begin a container or a process it has half of that, or 30 s.
    pub(crate) boot_deadline_s: u32,
}

impl Default for VmDefaults {
    fn default() -> Self {
        Self { memory_mib: 1024, vcpus: 1, boot_deadline_s: 60 }
    }
}

impl VmDefaults {
    /// [`Self::boot_deadline_s`].
    pub(crate) fn boot_deadline(&self) -> Duration {
        Duration::from_secs(self.boot_deadline_s.into())
    }
}

/// Limits and rules of each interface of a pod; a limit of 0 is none.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NetworkRules {
    /// Whether a pod can only send from the addresses that CNI gave it.
    pub(crate) anti_spoofing: bool,
    /// What reaches the pod.
    pub(crate) rx: RateLimit,
    /// What it sends.
    pub(crate) tx: RateLimit,
    /// Whether the host's kernel carries the frames of an interface that has none of the above.
    pub(crate) vhost: bool,
}

impl NetworkRules {
    /// As the interfaces have it.
    pub(crate) fn policy(&self) -> Policy {
        Policy { rx_limit: self.rx, tx_limit: self.tx, anti_spoofing: self.anti_spoofing, vhost: self.vhost }
    }
}

/// Files that a VM is made from.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ArtifactPaths {
    /// The VMM.
    pub(crate) vmm: Option<PathBuf>,
    /// The guest's kernel.
    pub(crate) kernel: Option<PathBuf>,
    /// The guest's image.
    pub(crate) rootfs: Option<PathBuf>,
}

impl ArtifactPaths {
    /// The environment variables by which `sandbox` finds them.
    pub(crate) fn variables(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let named = [("VMRUN_VMM", &self.vmm), ("VMRUN_KERNEL", &self.kernel), ("VMRUN_ROOTFS", &self.rootfs)];
        named.into_iter().filter_map(|(variable, path)| path.as_deref().map(|path| (variable, path)))
    }
}

/// What a pod may ask for; each can only make it smaller than the configuration would.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Annotations {
    /// Names that are honoured: `vmrun.memory-mib`, `vmrun.vcpus`.
    pub(crate) allowed: Vec<String>,
}

/// Programs of the host that specs name.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HookRules {
    /// Whether they run; else a spec that has some is refused.
    pub(crate) allowed: bool,
}

/// The log.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Log {
    /// As `tracing` filters: `info`, `debug`, `sandbox=trace`.
    pub(crate) level: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned() }
    }
}

impl Config {
    /// Reads the file that the environment names, or the usual one, which need not be there.
    pub(crate) fn load() -> Result<Self> {
        match env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
            Some(path) => Self::read(Path::new(&path), true),
            None => Self::read(Path::new(DEFAULT_PATH), false),
        }
    }

    /// Reads a file and its drop-ins.
    pub(crate) fn read(path: &Path, must_exist: bool) -> Result<Self> {
        let mut merged = toml::Table::new();
        let drop_ins = path.parent().unwrap_or(Path::new("/")).join("config.d");
        for (file, required) in [(path.to_owned(), must_exist)].into_iter().chain(drop_ins_in(&drop_ins)?) {
            let text = match fs::read_to_string(&file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && !required => continue,
                read => read.with_context(|| format!("cannot read {}", file.display()))?,
            };
            let table = text.parse().with_context(|| format!("{} is not TOML", file.display()))?;
            // Checked alone, so that the message names the file.
            Self::deserialize(toml::Value::Table(toml::Table::clone(&table)))
                .with_context(|| format!("{} has what is not understood", file.display()))?;
            merge(&mut merged, table);
        }
        Ok(Self::deserialize(toml::Value::Table(merged))?)
    }
}

fn drop_ins_in(folder: &Path) -> Result<Vec<(PathBuf, bool)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot read {}", folder.display()))?,
    };
    let paths = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == "toml")).collect();
    files.sort();
    Ok(files.into_iter().map(|file| (file, true)).collect())
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::Config;

    #[test]
    fn later_drop_ins_win_key_by_key() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("config.toml");
        fs::write(&path, "[vm]\nmemory_mib = 300\nvcpus = 2\n").expect("file");
        fs::create_dir(dir.path().join("config.d")).expect("folder");
        fs::write(dir.path().join("config.d/20.toml"), "[vm]\nmemory_mib = 500\n").expect("file");
        fs::write(dir.path().join("config.d/10.toml"), "[vm]\nmemory_mib = 400\n[log]\nlevel = \"debug\"\n")
            .expect("file");
        let config = Config::read(&path, true).expect("read");
        assert_eq!((config.vm.memory_mib, config.vm.vcpus, config.log.level.as_str()), (500, 2, "debug"));
    }

    #[test]
    fn limits_of_the_network_are_those_of_its_interfaces() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("config.toml");
        let text = "[network]\nanti_spoofing = true\nvhost = true\ntx = { bytes_per_s = 1000000, frames_per_s = 0 }\n";
        fs::write(&path, text).expect("file");
        let policy = Config::read(&path, true).expect("read").network.policy();
        assert!(policy.anti_spoofing && policy.vhost);
        assert_eq!((policy.tx_limit.bytes_per_s, policy.rx_limit.bytes_per_s), (1_000_000, 0));
    }

    #[test]
    fn a_misspelled_key_is_named_with_its_file() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("config.toml");
        fs::write(&path, "[vm]\nmemory = 300\n").expect("file");
        let text = format!("{:#}", Config::read(&path, true).expect_err("refused"));
        assert!(text.contains("config.toml") && text.contains("memory"), "{text}");
    }

    #[test]
    fn only_a_file_that_was_asked_for_must_exist() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("absent.toml");
        assert_eq!(Config::read(&path, false).expect("defaults"), Config::default());
        Config::read(&path, true).expect_err("missing");
    }
}
