//! From a profile of the OCI specification to a program for the kernel, by libseccomp. The build script has this file too.

use std::collections::HashSet;

use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator, LinuxSyscall,
};

/// A filter of the guest's only ABI: the numbers of x32 and of 32-bit programs are what its kernel says of them, not there. So a
/// profile's architectures say nothing.
pub(super) fn filter(otherwise: ScmpAction) -> Result<ScmpFilterContext, SeccompError> {
    let mut filter = ScmpFilterContext::new(otherwise)?;
    filter.set_act_badarch(ScmpAction::Errno(libc::ENOSYS))?;
    // `process.noNewPrivileges` decides.
    filter.set_ctl_nnp(false)?;
    // A call is found by halves.
    filter.set_ctl_optimize(2)?;
    Ok(filter)
}

/// The filter that a profile describes.
pub(super) fn of_profile(profile: &LinuxSeccomp) -> Result<ScmpFilterContext, SeccompError> {
    let otherwise = action(profile.default_action(), profile.default_errno_ret());
    let mut filter = filter(otherwise)?;
    for flag in profile.flags().iter().flatten() {
        match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => filter.set_ctl_log(true),
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => filter.set_ctl_tsync(true),
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => filter.set_ctl_ssb(true),
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => filter.set_ctl_waitkill(true),
        }?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret());
        // libseccomp refuses what changes nothing.
        if action != otherwise {
            add(&mut filter, action, rule)?;
        }
    }
    Ok(filter)
}

/// Without names that the library does not know: their calls are decided as any other. Several conditions on one argument are
/// alternatives, as with `runc`.
fn add(filter: &mut ScmpFilterContext, action: ScmpAction, rule: &LinuxSyscall) -> Result<(), SeccompError> {
    let conditions: Vec<_> = rule.args().iter().flatten().map(condition).collect();
    let mut arguments = HashSet::new();
    let is_each_alone = !rule.args().iter().flatten().all(|arg| arguments.insert(arg.index()));
    let alternatives = if is_each_alone { conditions.chunks(1).collect() } else { vec![&conditions[..]] };
    for call in rule.names().iter().filter_map(|name| ScmpSyscall::from_name(name).ok()) {
        for conditions in &alternatives {
            filter.add_rule_conditional(action, call, conditions)?;
        }
    }
    Ok(())
}

fn condition(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // `value` is the mask, `valueTwo` what is left.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or_default())
        }
    };
    ScmpArgCompare::new(u32::try_from(arg.index()).unwrap_or(u32::MAX), operator, value)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> ScmpAction {
    let errno = errno.unwrap_or(libc::EPERM.unsigned_abs());
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.cast_signed()),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(u16::try_from(errno).unwrap_or(u16::MAX)),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        // `refuse.rs` has refused it: nobody would listen.
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
    }
}
