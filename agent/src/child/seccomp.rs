//! The filters of system calls that a process of a container gets: the agent's own, then its profile.
//!
//! The agent's own keeps AF_VSOCK for the agent: it leads to the host and knows no network namespaces. A privileged process, with
//! CAP_SYS_ADMIN and without a profile, has asked for everything that the guest has.
//! io_uring makes sockets too, where a profile or the lack of one allows it: the host takes what comes from there for a stream
//! only by an id that no container knows.

use libcontainer::seccomp::initialize_seccomp;
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Arch, Capability, LinuxCapabilities, LinuxNamespaceType, LinuxSeccomp, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, Spec,
};

use super::{namespaces, with_causes};

/// EPERM for AF_VSOCK (40). Of the argument the kernel reads 32 bits. With the numbers of x32, which a filter that does not
/// list them would end the process for.
const WITHOUT_VSOCK: &str = r#"{
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X32"],
    "syscalls": [{
        "names": ["socket", "socketpair"],
        "action": "SCMP_ACT_ERRNO",
        "args": [{ "index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 4294967295, "valueTwo": 40 }]
    }]
}"#;

/// What is loaded before a command of a container is executed.
#[derive(Clone)]
pub(super) struct Filters {
    profile: Option<LinuxSeccomp>,
    is_privileged: bool,
}

impl Filters {
    /// The filters of a process with these capabilities.
    pub(super) fn of(spec: &Spec, capabilities: &LinuxCapabilities) -> Self {
        let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
        let is_admin = capabilities.bounding().as_ref().is_some_and(|set| set.contains(&Capability::SysAdmin));
        let is_of_guest = !namespaces(spec).contains(&LinuxNamespaceType::User);
        let is_privileged = profile.is_none() && is_admin && is_of_guest;
        Self { profile, is_privileged }
    }

    /// Loads them into this thread. Of what several filters answer the kernel obeys the strictest; the profile comes last, for
    /// it may not allow to load another.
    pub(super) fn load(&self) -> Result<(), String> {
        if !self.is_privileged {
            let own =
                serde_json::from_str(WITHOUT_VSOCK).map_err(|error| format!("the agent's own filter: {error}"))?;
            load(&own)?;
        }
        self.profile.as_ref().map_or(Ok(()), load)
    }
}

fn load(profile: &LinuxSeccomp) -> Result<(), String> {
    let profile = for_libcontainer(profile).map_err(|error| format!("cannot read the seccomp profile: {error}"))?;
    let loaded = initialize_seccomp(&profile);
    loaded.map(drop).map_err(|error| format!("cannot load the seccomp profile: {}", with_causes(&error)))
}

/// `libcontainer` 0.7 takes the mask of SCMP_CMP_MASKED_EQ for the value, and the value for the mask: by the profiles of Docker
/// and containerd it would allow `clone` with any flags.
///
/// Calls of 32-bit programs are left out: the guest's kernel has none (CONFIG_IA32_EMULATION), and rules for them cost a container
/// a third of the time that its profile takes.
fn for_libcontainer(profile: &LinuxSeccomp) -> Result<LinuxSeccomp, OciSpecError> {
    let mut profile = profile.clone();
    let architectures = profile.architectures().iter().flatten().copied();
    profile.set_architectures(Some(architectures.filter(|arch| *arch != Arch::ScmpArchX86).collect()));
    let mut rules = profile.syscalls().clone().unwrap_or_default();
    for rule in &mut rules {
        let args: Option<Result<_, _>> = rule.args().as_ref().map(|args| args.iter().map(exchanged).collect());
        rule.set_args(args.transpose()?);
    }
    profile.set_syscalls(Some(rules));
    Ok(profile)
}

fn exchanged(arg: &LinuxSeccompArg) -> Result<LinuxSeccompArg, OciSpecError> {
    if arg.op() != LinuxSeccompOperator::ScmpCmpMaskedEq {
        return Ok(*arg);
    }
    let (mask, value) = (arg.value(), arg.value_two().unwrap_or(0));
    LinuxSeccompArgBuilder::default().index(arg.index()).op(arg.op()).value(value).value_two(mask).build()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use oci_spec::runtime::Capabilities;
    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket, socketpair};
    use rustix::thread::set_no_new_privs;
    use serde_json::{Value, json};

    use super::*;

    fn filters(seccomp: &Value, capabilities: &[Capability], namespace: &str) -> Filters {
        let spec = json!({
            "ociVersion": "1.2.0",
            "root": { "path": "rootfs" },
            "linux": { "namespaces": [{ "type": "mount" }, { "type": namespace }], "seccomp": seccomp }
        });
        let mut sets = LinuxCapabilities::default();
        sets.set_bounding(Some(capabilities.iter().copied().collect::<Capabilities>()));
        Filters::of(&serde_json::from_value(spec).expect("a spec"), &sets)
    }

    /// What becomes of a socket of each family in a thread with these filters.
    fn sockets(filters: Filters, families: [u16; 3]) -> [Option<Errno>; 3] {
        let tried = thread::spawn(move || {
            set_no_new_privs(true).expect("no new privileges");
            filters.load().expect("loaded");
            families.map(|family| socket(AddressFamily::from_raw(family), SocketType::STREAM, None).err())
        });
        tried.join().expect("no panic")
    }

    const AF_UNIX: u16 = 1;
    const AF_VSOCK: u16 = 40;
    /// All bits of AF_VSOCK and one more: what a filter refuses whose mask and value are exchanged.
    const AF_KCM: u16 = 41;

    #[test]
    fn af_vsock_is_closed_whatever_a_profile_allows() {
        let allows_all = json!({ "defaultAction": "SCMP_ACT_ALLOW" });
        let names_sockets = json!({
            "defaultAction": "SCMP_ACT_LOG",
            "syscalls": [{ "names": ["socket"], "action": "SCMP_ACT_ALLOW" }]
        });
        for profile in [Value::Null, allows_all, names_sockets] {
            let [unix, vsock, other] = sockets(filters(&profile, &[], "pid"), [AF_UNIX, AF_VSOCK, AF_KCM]);
            assert_eq!((unix, vsock), (None, Some(Errno::PERM)), "{profile}");
            assert_ne!(other, Some(Errno::PERM), "{profile}");
        }
    }

    #[test]
    fn pairs_of_af_vsock_are_closed_too() {
        let tried = thread::spawn(|| {
            set_no_new_privs(true).expect("no new privileges");
            filters(&Value::Null, &[], "pid").load().expect("loaded");
            socketpair(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::empty(), None).err()
        });
        assert_eq!(tried.join().expect("no panic"), Some(Errno::PERM));
    }

    #[test]
    fn only_a_privileged_process_has_no_filter_of_the_agent() {
        let profile = json!({ "defaultAction": "SCMP_ACT_ALLOW" });
        let admin = [Capability::SysAdmin];
        assert!(filters(&Value::Null, &admin, "pid").is_privileged);
        assert!(!filters(&Value::Null, &[Capability::NetAdmin], "pid").is_privileged);
        assert!(!filters(&Value::Null, &admin, "user").is_privileged);
        assert!(!filters(&profile, &admin, "pid").is_privileged);
    }

    #[test]
    fn a_masked_argument_means_what_the_specification_says() {
        // Refuses what lacks a bit, as profiles do with the flags of clone.
        let profile = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
                "args": [{ "index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 8, "valueTwo": 0 }] }]
        });
        let [unix, _, other] = sockets(filters(&profile, &[], "pid"), [AF_UNIX, AF_VSOCK, AF_KCM]);
        assert_eq!(unix, Some(Errno::OPNOTSUPP));
        assert_ne!(other, Some(Errno::OPNOTSUPP));
    }
}
