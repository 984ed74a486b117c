//! Seccomp profiles in Docker's format: rules that apply by capability and architecture become the plain list of an OCI spec.
//! Without a profile of the user's own it is `seccomp/default.json`.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
};
use serde::Deserialize;
use serde_json::json;

const DEFAULT_PROFILE: &str = include_str!("seccomp/default.json");

/// A profile as Docker documents it; an OCI `linux.seccomp` object is one too.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: LinuxSeccompAction,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<Arch>,
    #[serde(default)]
    arch_map: Vec<Architecture>,
    #[serde(default)]
    flags: Vec<LinuxSeccompFilterFlag>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Architecture {
    architecture: Arch,
    #[serde(default)]
    sub_architectures: Vec<Arch>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    names: Vec<String>,
    /// The old form of a rule for one call.
    #[serde(default)]
    name: String,
    action: LinuxSeccompAction,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<LinuxSeccompArg>>,
    #[serde(default)]
    includes: Condition,
    #[serde(default)]
    excludes: Condition,
}

/// All of `includes` must hold; any of `excludes` rules out.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(default)]
    caps: Vec<Capability>,
    #[serde(default)]
    arches: Vec<String>,
    min_kernel: Option<String>,
}

/// The profile for a container with these capabilities: Docker's default, or that of a file.
pub(crate) fn profile(file: Option<&Path>, capabilities: &Capabilities) -> Result<LinuxSeccomp> {
    let Some(path) = file else { return resolve(DEFAULT_PROFILE, capabilities) };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("--security-opt seccomp={}: cannot read the profile", path.display()))?;
    resolve(&text, capabilities).with_context(|| format!("--security-opt seccomp={}: bad profile", path.display()))
}

fn resolve(text: &str, capabilities: &Capabilities) -> Result<LinuxSeccomp> {
    let profile: Profile = serde_json::from_str(text)?;
    if !profile.architectures.is_empty() && !profile.arch_map.is_empty() {
        bail!("`architectures` and `archMap` exclude each other");
    }
    let mut architectures = profile.architectures;
    if let Some(found) = profile.arch_map.iter().find(|entry| Some(entry.architecture) == native()) {
        architectures.push(found.architecture);
        architectures.extend(&found.sub_architectures);
    }
    let mut syscalls = Vec::new();
    for rule in profile.syscalls.into_iter().filter(|rule| rule.applies(capabilities)) {
        let names = if rule.name.is_empty() { rule.names } else { vec![rule.name] };
        if names.is_empty() {
            bail!("a rule names no system call");
        }
        let args = rule.args.filter(|args| !args.is_empty());
        syscalls.push(json!({ "names": names, "action": rule.action, "errnoRet": rule.errno_ret, "args": args }));
    }
    let seccomp = json!({
        "defaultAction": profile.default_action,
        "defaultErrnoRet": profile.default_errno_ret,
        "architectures": architectures,
        "flags": profile.flags,
        "syscalls": syscalls,
    });
    Ok(serde_json::from_value(seccomp)?)
}

impl Rule {
    /// The guest's kernel is newer than any `minKernel` that profiles name.
    fn applies(&self, capabilities: &Capabilities) -> bool {
        let here = arch_names();
        let (includes, excludes) = (&self.includes, &self.excludes);
        includes.caps.iter().all(|capability| capabilities.contains(capability))
            && (includes.arches.is_empty() || includes.arches.iter().any(|arch| here.contains(arch.as_str())))
            && !excludes.caps.iter().any(|capability| capabilities.contains(capability))
            && !excludes.arches.iter().any(|arch| here.contains(arch.as_str()))
            && excludes.min_kernel.is_none()
    }
}

/// The guest's architecture is the host's.
fn native() -> Option<Arch> {
    match std::env::consts::ARCH {
        "x86_64" => Some(Arch::ScmpArchX86_64),
        "aarch64" => Some(Arch::ScmpArchAarch64),
        _ => None,
    }
}

/// Docker's names of the architecture and of those below it.
fn arch_names() -> HashSet<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => ["amd64", "x86", "x32"].into(),
        "aarch64" => ["arm64", "arm"].into(),
        _ => HashSet::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Actions of the rules for a call, with their error numbers.
    fn rules(call: &str, capabilities: &[Capability]) -> Vec<(LinuxSeccompAction, Option<u32>)> {
        let set: Capabilities = capabilities.iter().copied().collect();
        let profile = profile(None, &set).expect("the default profile");
        let named = profile.syscalls().clone().unwrap_or_default();
        let named = named.into_iter().filter(|rule| rule.names().iter().any(|name| name == call));
        named.map(|rule| (rule.action(), rule.errno_ret())).collect()
    }

    const ALLOWED: (LinuxSeccompAction, Option<u32>) = (LinuxSeccompAction::ScmpActAllow, None);
    const REFUSED: (LinuxSeccompAction, Option<u32>) = (LinuxSeccompAction::ScmpActErrno, Some(1));

    #[test]
    fn calls_are_allowed_by_capability() {
        assert_eq!(rules("read", &[]), [ALLOWED]);
        assert_eq!(rules("mount", &[]), [REFUSED]);
        assert_eq!(rules("mount", &[Capability::SysAdmin]), [ALLOWED]);
        assert_eq!(rules("bpf", &[Capability::Bpf]), [ALLOWED]);
        assert_eq!(rules("keyctl", &[Capability::SysAdmin]), [REFUSED]);
        assert_eq!(rules("clone3", &[]), [(LinuxSeccompAction::ScmpActErrno, Some(38))]);
        assert_eq!(rules("clone3", &[Capability::SysAdmin]), [ALLOWED]);
        assert_eq!(rules("not_yet_invented", &[]), []);
    }

    /// The agent has its program ready. To write the file anew: `UPDATE_SNAPSHOT=1 cargo test -p vmrun the_agent_knows`.
    #[test]
    fn the_agent_knows_the_profile_of_dockers_capabilities() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../agent/src/child/seccomp/default.json");
        let profile =
            profile(None, &crate::spec::DEFAULT_CAPABILITIES.into_iter().collect()).expect("the default profile");
        let text = serde_json::to_string(&profile).expect("JSON") + "\n";
        if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
            std::fs::write(path, &text).expect("written");
        }
        assert_eq!(text, std::fs::read_to_string(path).expect("a snapshot"));
    }

    #[test]
    fn clone_is_allowed_without_namespaces_only() {
        assert_eq!(rules("clone", &[]).iter().filter(|rule| **rule == ALLOWED).count(), 1);
        assert_eq!(rules("clone", &[]).iter().filter(|rule| **rule == REFUSED).count(), 7);
        assert_eq!(rules("clone", &[Capability::SysAdmin]), [ALLOWED]);
    }

    #[test]
    fn no_rule_contradicts_another() {
        let everything = [Capability::SysAdmin, Capability::Bpf, Capability::Perfmon, Capability::Syslog];
        for capabilities in [&[][..], &everything[..]] {
            let set: Capabilities = capabilities.iter().copied().collect();
            let profile = profile(None, &set).expect("the default profile");
            let plain = profile.syscalls().iter().flatten().filter(|rule| rule.args().is_none());
            let (allowed, refused): (Vec<_>, Vec<_>) =
                plain.partition(|rule| rule.action() == LinuxSeccompAction::ScmpActAllow);
            let allowed: HashSet<&String> = allowed.iter().flat_map(|rule| rule.names()).collect();
            let both: Vec<_> = refused.iter().flat_map(|rule| rule.names()).filter(|n| allowed.contains(n)).collect();
            assert!(both.is_empty(), "{both:?}");
        }
    }

    #[test]
    fn profile_of_the_user_may_be_dockers_or_an_oci_object() {
        let set = Capabilities::new();
        let old =
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"name":"chmod","action":"SCMP_ACT_ERRNO","args":[]}]}"#;
        let rules = resolve(old, &set).expect("a profile").syscalls().clone().expect("rules");
        assert_eq!((rules[0].names()[0].as_str(), rules[0].args().is_none()), ("chmod", true));
        assert!(resolve(r#"{"syscalls":[]}"#, &set).is_err());
        assert!(resolve(r#"{"defaultAction":"SCMP_ACT_NONSENSE"}"#, &set).is_err());
        assert!(resolve("nonsense", &set).is_err());
    }
}
