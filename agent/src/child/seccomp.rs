//! The filters of system calls that a process of a container gets: the agent's own, then its profile.
//!
//! Decided: the agent's own and Docker's profile are compiled when the agent is built (`build.rs`). Because: libseccomp takes 8 million
//! instructions for the profile, a twentieth of a start. Instead of: programs that the guest keeps, which the first container has to make.
//!
//! The agent's own keeps AF_VSOCK for the agent: it leads to the host and knows no network namespaces. A privileged process, with
//! CAP_SYS_ADMIN and without a profile, has asked for everything that the guest has.
//! io_uring makes sockets too, where a profile or the lack of one allows it: the host takes what comes from there for a stream
//! only by an id that no container knows.

use oci_spec::runtime::{Capability, LinuxCapabilities, LinuxNamespaceType, LinuxSeccomp, Spec};

use super::namespaces;
use crate::sys;

mod program;

/// EPERM for AF_VSOCK.
const WITHOUT_VSOCK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/without-vsock.bpf"));
/// What `vmrun` sends for a container with Docker's capabilities, and the program for it.
const DEFAULT_PROFILE: &str = include_str!(concat!(env!("OUT_DIR"), "/default.json"));
const DEFAULT_PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/default.bpf"));

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
            sys::load_filter(WITHOUT_VSOCK).map_err(|error| format!("the agent's own filter: {error}"))?;
        }
        let Some(profile) = &self.profile else { return Ok(()) };
        load(profile).map_err(|error| format!("cannot load the seccomp profile: {error}"))
    }
}

fn load(profile: &LinuxSeccomp) -> Result<(), String> {
    if serde_json::to_string(profile).is_ok_and(|text| text == DEFAULT_PROFILE) {
        return sys::load_filter(DEFAULT_PROGRAM).map_err(|error| error.to_string());
    }
    program::of_profile(profile).and_then(|filter| filter.load()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use oci_spec::runtime::Capabilities;
    use rustix::io::Errno;
    use rustix::net::AddressFamily;
    use rustix::net::{SocketFlags, SocketType, socket, socketpair};
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

    #[test]
    fn conditions_hold_together_but_on_one_argument_each_is_enough() {
        let profile = |args| {
            json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["socket", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95, "args": args }]
            })
        };
        let equal = |index: u32, value: u64| json!({ "index": index, "op": "SCMP_CMP_EQ", "value": value });
        let is_refused = |args| {
            sockets(filters(&profile(args), &[], "pid"), [AF_UNIX, AF_VSOCK, AF_KCM])[0] == Some(Errno::OPNOTSUPP)
        };
        let (unix, stream) = (equal(0, u64::from(AF_UNIX)), equal(1, 1));
        assert!(is_refused(json!([])));
        assert!(is_refused(json!([unix, stream])));
        assert!(!is_refused(json!([unix, equal(1, 2)])));
        assert!(is_refused(json!([unix, equal(0, 2)])));
        assert!(!is_refused(json!([equal(0, 2), equal(0, 3)])));
    }
}
