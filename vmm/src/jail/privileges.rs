//! What is left of root: the rights over files that serving shares needs, in our user namespace only; limits.

use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, dumpable_behavior, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_ambient_set, capability_is_in_bounding_set,
    clear_ambient_capability_set, no_new_privs, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

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
pub(super) fn drop_all_but_files() -> Result<(), JailError> {
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
    read_back(&kept)
}

fn read_back(kept: &CapabilitySets) -> Result<(), JailError> {
    check("dropping capabilities", capabilities(None).map_err(refused("read the capabilities"))? == *kept)?;
    for capability in capability_numbers() {
        match capability_is_in_bounding_set(capability) {
            Err(Errno::INVAL) => break,
            bound => check(
                "bounding the capabilities",
                bound.map_err(refused("read the bounding set"))? == KEPT.contains(capability),
            )?,
        }
    }
    // What is not permitted is not ambient, and no more than these is permitted.
    for capability in KEPT.iter() {
        let ambient = capability_is_in_ambient_set(capability).map_err(refused("read the ambient set"))?;
        check("clearing the ambient capabilities", !ambient)?;
    }
    check("refusing new privileges", no_new_privs().map_err(refused("read no_new_privs"))?)?;
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
