//! Leaves this process alone with what it was handed: called once by `main`, before the VM is made and before any other thread.
//! Every step is read back, and one that does not hold ends the process. Opens nothing for the VM and knows nothing of it.
//!
//! ```text
//!   cores ─► namespaces ─► an empty root ─► a user namespace ─► privileges and limits ─► filters of system calls, thread by thread
//! ```

use std::io;
use std::os::fd::OwnedFd;

use rustix::thread::{CapabilitySet, capabilities};
use thiserror::Error;

mod cores;
mod namespaces;
mod privileges;
mod root;
mod seccomp;

pub use root::mount_for_ram;
use seccomp::Filters;
pub use seccomp::ThreadKind;

/// Why the process is not confined.
#[derive(Debug, Error)]
pub enum JailError {
    /// The kernel refused.
    #[error("cannot confine the VMM: cannot {step}")]
    Refused {
        /// What was tried.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel agreed, but what is read back says otherwise.
    #[error("cannot confine the VMM: {step} had no effect")]
    NoEffect {
        /// What was tried.
        step: &'static str,
    },
}

/// What is left to do thread by thread; the default leaves threads as they are, for tests that run a VM in their own process.
#[derive(Clone, Debug, Default)]
pub struct Jail {
    filters: Option<Filters>,
}

impl Jail {
    /// Leaves the calling thread, for good, the system calls of its kind.
    ///
    /// # Panics
    /// When the kernel refuses a filter: what the thread was to do is not done without one.
    pub fn confine(&self, kind: ThreadKind) {
        if let Some(filters) = self.filters
            && let Err(error) = filters.apply(kind)
        {
            panic!("cannot confine a thread: {error}");
        }
    }

    /// The same, but one kind of threads keeps the system calls that it inherits: for the story that must notice.
    #[must_use]
    pub fn without(self, kind: ThreadKind) -> Self {
        Self { filters: self.filters.map(|_| Filters::without(kind)) }
    }
}

/// Gives up everything but the open descriptors, and makes one: a mount of a tmpfs for guest RAM, which takes rights that are given
/// up. The process must have one thread.
///
/// # Errors
/// The first step that fails; the process is then half confined and must end.
pub fn enter() -> Result<(Jail, OwnedFd), JailError> {
    cores::keep_to_ourselves()?;
    let host = namespaces::Host::open()?;
    // Namespaces that the host owns give no rights to us even as root of a user namespace, so they come first. Who may not
    // make such needs the user namespace before.
    let administers_host =
        capabilities(None).map_err(refused("read the capabilities"))?.effective.contains(CapabilitySet::SYS_ADMIN);
    if !administers_host {
        host.enter_user_namespace()?;
    }
    host.leave()?;
    root::replace()?;
    let ram = mount_for_ram()?;
    if administers_host {
        host.enter_user_namespace()?;
    }
    privileges::drop_all_but_files(&host)?;
    drop(host);
    Ok((Jail { filters: Some(Filters::default()) }, ram))
}

/// Names the step that a system call is part of.
fn refused<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> JailError {
    move |source| JailError::Refused { step, source: source.into() }
}

/// What is read back must be so.
fn check(step: &'static str, holds: bool) -> Result<(), JailError> {
    if holds { Ok(()) } else { Err(JailError::NoEffect { step }) }
}
