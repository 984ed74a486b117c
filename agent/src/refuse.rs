//! What a spec may ask for and a guest cannot give, by name, before anything is made: `libcontainer` would leave it out
//! silently, or it means nothing here.

use std::collections::HashSet;

use libcontainer::rootfs::utils::{is_bind, parse_mount};
use oci_spec::runtime::{Linux, LinuxNamespaceType, LinuxResources, LinuxSeccompAction, Mount, Process, Spec};

use crate::container::ContainerError;

type Checked = Result<(), ContainerError>;

/// Refuses a field that is there.
fn refuse(is_there: bool, field: &str) -> Checked {
    if is_there { Err(ContainerError::Unsupported(field.to_owned())) } else { Ok(()) }
}

fn is_set(text: &Option<String>) -> bool {
    text.as_deref().is_some_and(|text| !text.is_empty())
}

/// Checks a whole spec.
pub(crate) fn spec(spec: &Spec) -> Checked {
    let process =
        spec.process().as_ref().ok_or_else(|| ContainerError::Invalid("the spec has no process".to_owned()))?;
    self::process(process)?;
    hooks(spec)?;
    refuse(spec.solaris().is_some(), "solaris")?;
    refuse(spec.windows().is_some(), "windows")?;
    refuse(spec.vm().is_some(), "vm")?;
    spec.mounts().iter().flatten().try_for_each(mount)?;
    let Some(linux) = spec.linux() else { return refuse(true, "a spec without linux") };
    self::linux(linux)
}

/// Runtime hooks are the host's; paths of the others would name files of the agent.
fn hooks(spec: &Spec) -> Checked {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    let is_there = |hooks: &Option<Vec<oci_spec::runtime::Hook>>| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty());
    refuse(is_there(hooks.prestart()), "hooks.prestart")?;
    refuse(is_there(hooks.create_runtime()), "hooks.createRuntime")?;
    refuse(is_there(hooks.create_container()), "hooks.createContainer")?;
    refuse(is_there(hooks.start_container()), "hooks.startContainer")?;
    refuse(is_there(hooks.poststart()), "hooks.poststart")?;
    refuse(is_there(hooks.poststop()), "hooks.poststop")
}

/// Checks the process of an init or of an exec.
pub(crate) fn process(process: &Process) -> Checked {
    refuse(is_set(process.selinux_label()), "process.selinuxLabel")?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(ContainerError::Invalid("process.args is empty".to_owned()));
    }
    let mut seen = HashSet::new();
    for limit in process.rlimits().iter().flatten() {
        if !seen.insert(limit.typ().to_string()) {
            return Err(ContainerError::Invalid(format!("process.rlimits has {} twice", limit.typ())));
        }
    }
    Ok(())
}

/// `libcontainer` does not enter the user namespace of a container with an exec.
pub(crate) fn exec_in(spec: &Spec) -> Checked {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    let has_user = namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    refuse(has_user, "an exec in a container with a user namespace")
}

fn linux(linux: &Linux) -> Checked {
    refuse(linux.intel_rdt().is_some(), "linux.intelRdt")?;
    refuse(is_set(linux.mount_label()), "linux.mountLabel")?;
    refuse(linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()), "linux.netDevices")?;
    let flags = linux.personality().as_ref().and_then(|personality| personality.flags().clone());
    refuse(flags.is_some_and(|flags| !flags.is_empty()), "linux.personality.flags")?;
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    if !namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Mount) {
        return refuse(true, "a container without a mount namespace of its own");
    }
    for namespace in namespaces.iter().filter(|namespace| namespace.path().is_some()) {
        // Paths of the guest: of another container's process, or a namespace that the agent keeps.
        let path = namespace.path().clone().unwrap_or_default();
        let of_guest = path.starts_with("/proc") || path.starts_with("/run/");
        refuse(!of_guest, &format!("a {} namespace at {}", namespace.typ(), path.display()))?;
    }
    if let Some(seccomp) = linux.seccomp() {
        refuse(seccomp.listener_path().is_some(), "linux.seccomp.listenerPath")?;
        let mut actions =
            seccomp.syscalls().iter().flatten().map(|rule| rule.action()).chain([seccomp.default_action()]);
        refuse(
            actions.any(|action| action == LinuxSeccompAction::ScmpActNotify),
            "the seccomp action SCMP_ACT_NOTIFY",
        )?;
    }
    linux.resources().as_ref().map_or(Ok(()), resources)
}

/// Options that `libcontainer` does not know are data of the file system, and a bind mount takes no data.
fn mount(mount: &Mount) -> Checked {
    let at = mount.destination().display();
    let known = parse_mount(mount).map_err(|error| ContainerError::Invalid(format!("mount at {at}: {error}")))?;
    for option in &known.data {
        let elsewhere = ["tmpcopyup", "copyup", "nosymfollow", "symfollow", "iversion", "lazytime"];
        let unknown = is_bind(mount) || elsewhere.contains(&option.as_str());
        refuse(unknown, &format!("the option {option:?} of the mount at {at}"))?;
    }
    Ok(())
}

/// Checks limits, of a new container or of an update.
pub(crate) fn resources(resources: &LinuxResources) -> Checked {
    refuse(resources.network().is_some(), "linux.resources.network")?;
    refuse(resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()), "linux.resources.rdma")?;
    if let Some(memory) = resources.memory() {
        refuse(memory.kernel().is_some_and(|limit| limit > 0), "linux.resources.memory.kernel")?;
        refuse(memory.kernel_tcp().is_some_and(|limit| limit > 0), "linux.resources.memory.kernelTCP")?;
        refuse(memory.swappiness().is_some(), "linux.resources.memory.swappiness")?;
        refuse(memory.disable_oom_killer() == Some(true), "linux.resources.memory.disableOOMKiller")?;
    }
    if let Some(cpu) = resources.cpu() {
        refuse(cpu.realtime_runtime().is_some_and(|us| us > 0), "linux.resources.cpu.realtimeRuntime")?;
        refuse(cpu.realtime_period().is_some_and(|us| us > 0), "linux.resources.cpu.realtimePeriod")?;
    }
    if let Some(io) = resources.block_io() {
        refuse(io.leaf_weight().is_some_and(|weight| weight > 0), "linux.resources.blockIO.leafWeight")?;
        // They name disks of the host, which limits the VM by them.
        let throttles = [
            io.throttle_read_bps_device(),
            io.throttle_write_bps_device(),
            io.throttle_read_iops_device(),
            io.throttle_write_iops_device(),
        ];
        let limits_a_disk = throttles.into_iter().flatten().any(|throttles| !throttles.is_empty());
        refuse(limits_a_disk, "linux.resources.blockIO.throttle...")?;
    }
    let mut files = resources.unified().iter().flatten().map(|(file, _)| file);
    if let Some(file) = files.find(|file| file.contains('/') || !file.contains('.') || file.starts_with("cgroup.")) {
        return Err(ContainerError::Invalid(format!("linux.resources.unified has {file:?}")));
    }
    Ok(())
}

/// What a new container may set and an update may not.
pub(crate) fn update(resources: &LinuxResources) -> Checked {
    let devices = resources.devices().as_ref().is_some_and(|devices| !devices.is_empty());
    refuse(devices, "an update of linux.resources.devices")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut value = json!({
            "ociVersion": "1.2.0",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["true"], "cwd": "/" },
            "root": { "path": "rootfs" },
            "linux": { "namespaces": [{ "type": "mount" }], "resources": {} }
        });
        change(&mut value);
        let parsed: Spec = serde_json::from_value(value).expect("a spec");
        spec(&parsed).map_or_else(|error| error.to_string(), |()| "accepted".to_owned())
    }

    #[test]
    fn plain_spec_is_accepted() {
        assert_eq!(refused(|_| {}), "accepted");
    }

    #[test]
    fn field_that_cannot_be_honoured_is_named() {
        let with = |pointer: &str, field: &str, value: serde_json::Value| {
            refused(|spec| spec.pointer_mut(pointer).expect("an object")[field] = value)
        };
        assert!(with("", "hooks", json!({ "poststop": [{ "path": "/x" }] })).starts_with("hooks.poststop"));
        assert!(with("/process", "selinuxLabel", json!("a")).starts_with("process.selinuxLabel"));
        assert!(with("/linux", "intelRdt", json!({})).starts_with("linux.intelRdt"));
        assert!(with("/linux", "mountLabel", json!("a")).starts_with("linux.mountLabel"));
        assert!(with("/linux", "namespaces", json!([{ "type": "pid" }])).contains("mount namespace"));
        let outside = json!([{ "type": "mount" }, { "type": "network", "path": "/var/run/netns/a" }]);
        assert!(with("/linux", "namespaces", outside).contains("/var/run/netns/a"));
        let swappy = json!({ "memory": { "swappiness": 10 } });
        assert!(with("/linux", "resources", swappy).contains("memory.swappiness"));
        let throttle = json!({ "blockIO": { "throttleReadIOPSDevice": [{ "major": 8, "minor": 0, "rate": 1 }] } });
        assert!(with("/linux", "resources", throttle).contains("blockIO.throttle"));
        let escape = json!({ "unified": { "../x/memory.max": "1" } });
        assert!(with("/linux", "resources", escape).contains("unified"));
        let notifies = json!({ "defaultAction": "SCMP_ACT_NOTIFY" });
        assert!(with("/linux", "seccomp", notifies).contains("SCMP_ACT_NOTIFY"));
    }

    #[test]
    fn option_that_a_bind_mount_would_drop_is_named() {
        let with = |typ: &str, options: serde_json::Value| {
            let mount = json!([{ "destination": "/m", "type": typ, "source": "/s", "options": options }]);
            refused(|spec| spec["mounts"] = mount)
        };
        assert!(with("bind", json!(["rbind", "size=1m"])).contains("size=1m"));
        assert!(with("tmpfs", json!(["tmpcopyup"])).contains("tmpcopyup"));
        assert_eq!(with("tmpfs", json!(["size=1m", "mode=700"])), "accepted");
        assert_eq!(with("bind", json!(["rbind", "rro", "rprivate", "nodev"])), "accepted");
    }

    #[test]
    fn limit_that_is_there_twice_is_invalid() {
        let limit = json!({ "type": "RLIMIT_NOFILE", "soft": 1, "hard": 2 });
        let text = refused(|spec| spec["process"]["rlimits"] = json!([limit, limit]));
        assert!(text.contains("RLIMIT_NOFILE twice"), "{text}");
    }
}
