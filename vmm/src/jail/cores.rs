//! Cores of the host without company: while a thread of ours runs on a core, its other threads run ours or nothing (core
//! scheduling), so nobody learns of anybody by what one core has in common, its caches first of all.

use std::fs;

use rustix::io::Errno;
use rustix::process::getpid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie, create_core_scheduling_cookie};

use super::{JailError, check, refused};

/// Whether cores of the host run several threads at a time.
const SMT_ACTIVE: &str = "/sys/devices/system/cpu/smt/active";

/// Who runs beside us.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Company {
    /// Nobody but us.
    Ours,
    /// Nobody: a core runs one thread at a time.
    None,
    /// Anybody: this kernel cannot keep others away (`CONFIG_SCHED_CORE`, Linux 5.14).
    Anybody,
}

/// Takes a cookie, which every thread that is made from now on has too. The kernel lets threads share a core when theirs is the same.
pub(super) fn keep_to_ourselves() -> Result<(), JailError> {
    let created = create_core_scheduling_cookie(getpid(), CoreSchedulingScope::ThreadGroup);
    match company(created, || fs::read_to_string(SMT_ACTIVE).unwrap_or_default())? {
        Company::Ours => {
            let cookie = core_scheduling_cookie(getpid(), CoreSchedulingScope::Thread);
            let cookie = cookie.map_err(refused("read the cookie of core scheduling"))?;
            check("keeping others off our cores", cookie != 0)?;
        }
        Company::None => tracing::debug!("a core runs one thread at a time, so none is shared"),
        Company::Anybody => {
            tracing::warn!("this kernel has no core scheduling: threads of others may share a core with the VM's");
        }
    }
    Ok(())
}

/// What the kernel's answer means. The one of a kernel without core scheduling says nothing about the processor.
fn company(created: Result<(), Errno>, smt_active: impl FnOnce() -> String) -> Result<Company, JailError> {
    match created {
        Ok(()) => Ok(Company::Ours),
        Err(Errno::NODEV) => Ok(Company::None),
        Err(Errno::INVAL) if smt_active().trim() == "0" => Ok(Company::None),
        Err(Errno::INVAL) => Ok(Company::Anybody),
        Err(error) => Err(refused("keep others off our cores")(error)),
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::{Company, company};

    fn of(created: Result<(), Errno>, smt_active: &str) -> Company {
        company(created, || smt_active.to_owned()).expect("known")
    }

    #[test]
    fn what_cannot_be_had_is_told_from_what_is_not_needed() {
        assert_eq!(of(Ok(()), "1\n"), Company::Ours);
        assert_eq!(of(Err(Errno::NODEV), ""), Company::None);
        assert_eq!(of(Err(Errno::INVAL), "0\n"), Company::None);
        assert_eq!(of(Err(Errno::INVAL), "1\n"), Company::Anybody);
        assert_eq!(of(Err(Errno::INVAL), ""), Company::Anybody);
    }

    #[test]
    fn any_other_answer_ends_the_process() {
        for errno in [Errno::PERM, Errno::NOMEM, Errno::SRCH] {
            let error = company(Err(errno), String::new).expect_err("refused").to_string();
            assert_eq!(error, "cannot confine the VMM: cannot keep others off our cores");
        }
    }
}
