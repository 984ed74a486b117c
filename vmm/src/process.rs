//! The life of the process: read the configuration, confine the process, build the machine, run it, say how it ended.

use std::error::Error as StdError;
use std::fs::File;
use std::io::{self, Write as _};
use std::iter;
use std::os::fd::{IntoRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;
use vmm_api::control::{Exit, ExitReason};
use vmm_api::{Fd, VmConfig};

use crate::control::report_exit;
use crate::inherited::{InheritedFds, close_others};
use crate::jail::{Jail, JailError};
use crate::kvm::{self, KvmError};
use crate::machine::{BuildError, Machine};
use crate::memory::{Backing, host_has_large_pages, share_one_heap};

/// Why no VM ran.
#[derive(Debug, Error)]
pub enum RunError {
    /// The host refused.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A descriptor of the configuration is not one.
    #[error("{what} is not an open descriptor")]
    Inherited {
        /// What it was to be.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The configuration is not one.
    #[error("cannot understand the configuration")]
    Configuration(#[from] serde_json::Error),
    /// See [`KvmError`].
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// See [`JailError`].
    #[error(transparent)]
    Jail(#[from] JailError),
    /// See [`BuildError`].
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// Confines the process by `confine`, as [`crate::jail::enter`] does, runs the VM whose configuration is the descriptor `config_fd`,
/// and says how it ended; returns the process's exit status.
///
/// # Errors
/// Where there is nobody to say it to, and what the host refuses.
pub fn run(config_fd: i32, confine: impl FnOnce() -> Result<(Jail, OwnedFd), JailError>) -> Result<u8, RunError> {
    share_one_heap();
    raise_descriptor_limit().map_err(host("raise the limit of open files"))?;
    let mut fds = InheritedFds::default();
    let config = File::from(fds.take(Fd(config_fd)).map_err(inherited("--config-fd"))?);
    // At once: a parser that reads from a file asks the kernel for each byte.
    let config = io::read_to_string(config).map_err(host("read the configuration"))?;
    let config: VmConfig = serde_json::from_str(&config)?;
    close_others(&config).map_err(host("close what nobody handed over"))?;
    let control = fds.take(config.control).map_err(inherited("the control socket"))?;
    let control = UnixStream::from(control);
    control.set_nonblocking(true).map_err(host("use the control socket"))?;
    report_panics(control.try_clone().map_err(host("use the control socket"))?);
    let exit = match build(config, &mut fds, confine) {
        Ok(machine) => machine.run(&control).map_err(host("run the VM"))?,
        Err(error) => {
            let chain = iter::successors(Some(&error as &dyn StdError), |&error| error.source());
            let detail = chain.map(ToString::to_string).collect::<Vec<_>>().join(": ");
            Exit { reason: ExitReason::VmmError { detail }, console_tail: String::new() }
        }
    };
    let code = exit.reason.code();
    report_exit(&control, exit);
    Ok(code)
}

/// Confines the process, then builds the VM from what it holds.
fn build(
    mut config: VmConfig,
    fds: &mut InheritedFds,
    confine: impl FnOnce() -> Result<(Jail, OwnedFd), JailError>,
) -> Result<Machine, RunError> {
    if let Some(fd) = config.cgroup {
        // What is charged before stays with the cgroup of the owner.
        let mut procs = File::from(fds.take(fd).map_err(inherited("the cgroup"))?);
        procs.write_all(b"0").map_err(host("join the cgroup of the VM"))?;
    }
    if config.kvm.is_none() {
        // The new root has no devices.
        config.kvm = Some(Fd(kvm::open_device()?.into_raw_fd()));
    }
    let large_pages = host_has_large_pages();
    let (jail, ram) = confine()?;
    // The kernel ends us with the thread that spawned us, even when we are stopped or stuck. A closed control socket, by which
    // we notice in any other case, needs our event loop. Changing credentials would have cleared it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(host("ask to die with the owner"))?;
    let backing = if large_pages { Backing::Large(ram) } else { Backing::Small };
    Ok(Machine::build(&config, fds, jail, &backing)?)
}

fn host<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> RunError {
    move |source| RunError::Host { action, source: source.into() }
}

fn inherited(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Inherited { what, source }
}

/// A panic is a fault of ours: the owner learns of it before the process aborts.
fn report_panics(control: UnixStream) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let detail = format!("this is a bug in vmm: {panic}");
        report_exit(&control, Exit { reason: ExitReason::VmmError { detail }, console_tail: String::new() });
        print(panic);
    }));
}

/// Shares hold a descriptor for each inode that the guest knows; the soft limit is made for programs that use select(2).
fn raise_descriptor_limit() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(())
}
