//! What is left of root: the rights over files that serving shares needs, in our user namespace only; limits.

use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, dumpable_behavior, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

use super::namespaces::Host;
use super::{JailError, check, refused};

/// A share's files have owners, modes and capabilities, which the guest's users set as they may on a disk.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP);

/// No core dump, which would hold the guest's memory; more processes and threads than a VM has.
const LIMITS: [(Resource, u64); 2] = [(Resource::Core, 0), (Resource::Nproc, 1024)];

/// Drops all but the rights over files.
pub(super) fn drop_all_but_files(host: &Host) -> Result<(), JailError> {
    for capability in capability_numbers().filter(|capability| !KEPT.contains(*capability)) {
        match remove_capability_from_bounding_set(capability) {
            // The first that this kernel does not know: there are no more.
            Err(Errno::INVAL) => break,
            removed => removed.map_err(refused("bound the capabilities"))?,
        }
    }
    clear_ambient_capability_set().map_err(refused("clear the ambient capabilities"))?;
    let kept = CapabilitySets { effective: KEPT, permitted: KEPT, inheritable: CapabilitySet::empty() };
    set_capabilities(None, kept).map_err(refused("drop capabilities"))?;
    set_no_new_privs(true).map_err(refused("refuse new privileges"))?;
    for (resource, limit) in LIMITS {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) }).map_err(refused("set a limit"))?;
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(refused("refuse to be traced"))?;
    read_back(&host.read("status").map_err(refused("read the capabilities"))?)
}

/// `status` is `/proc/self/status`, which says in one call what `prctl(2)` says of one capability at a time.
fn read_back(status: &str) -> Result<(), JailError> {
    let value = |name| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
    let number = |name, radix| value(name).and_then(|value| u64::from_str_radix(value, radix).ok());
    let none = CapabilitySet::empty();
    for (name, wanted) in [("CapInh", none), ("CapPrm", KEPT), ("CapEff", KEPT), ("CapBnd", KEPT), ("CapAmb", none)] {
        check("dropping capabilities", number(name, 16) == Some(wanted.bits()))?;
    }
    check("refusing new privileges", number("NoNewPrivs", 10) == Some(1))?;
    for (resource, limit) in LIMITS {
        check("setting a limit", getrlimit(resource).maximum == Some(limit))?;
    }
    let dumpable = dumpable_behavior().map_err(refused("read whether we can be traced"))?;
    check("refusing to be traced", dumpable == DumpableBehavior::NotDumpable)
}

/// Each capability that there can be. A kernel knows those below a number of its own, and says `EINVAL` to the others.
fn capability_numbers() -> impl Iterator<Item = CapabilitySet> {
    (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number))
}

#[cfg(test)]
mod tests {
    use super::{KEPT, read_back};

    fn status(inherited: &str, bounding: &str, no_new_privs: u8) -> String {
        let kept = format!("{:016x}", KEPT.bits());
        format!(
            "CapInh:\t{inherited}\nCapPrm:\t{kept}\nCapEff:\t{kept}\nCapBnd:\t{bounding}\nCapAmb:\t0\nNoNewPrivs:\t{no_new_privs}\n"
        )
    }

    /// How far reading back comes in a process that is not confined.
    fn step_of(status: &str) -> String {
        read_back(status).expect_err("this process is not confined").to_string()
    }

    #[test]
    fn what_was_not_dropped_is_found() {
        let kept = format!("{:016x}", KEPT.bits());
        assert!(step_of(&status("0", "1ffffffffff", 1)).contains("dropping capabilities"));
        assert!(step_of(&status("1", &kept, 1)).contains("dropping capabilities"));
        assert!(step_of(&status("0", &kept, 0)).contains("refusing new privileges"));
        assert!(step_of(&status("0", &kept, 1)).contains("setting a limit"));
        assert!(step_of("").contains("dropping capabilities"));
    }
}
