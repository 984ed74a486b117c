//! Filters of system calls: what each kind of thread may make is in `lists.rs`, and compiled when the VMM is built.

use std::borrow::Cow;
use std::io;

use seccompiler::{apply_filter, sock_filter};

use kind::OWN_PROCESS;
pub use kind::ThreadKind;

mod kind;
#[cfg(test)]
mod lists;
#[cfg(test)]
mod program;

/// The program of each kind, in the order of [`ThreadKind::ALL`].
#[expect(clippy::unreadable_literal, reason = "nobody reads them")]
static PROGRAMS: [&[sock_filter]; ThreadKind::ALL.len()] = include!(concat!(env!("OUT_DIR"), "/programs.rs"));

/// Filters of all kinds but one, if one is left out, for a story only.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Filters {
    left_out: Option<ThreadKind>,
}

impl Filters {
    /// Confines the calling thread, and all that it starts.
    pub(super) fn apply(self, kind: ThreadKind) -> io::Result<()> {
        if self.left_out == Some(kind) {
            return Ok(());
        }
        apply_filter(&program_of(kind)).map_err(io::Error::other)
    }

    /// The same, but nothing is taken from one kind.
    pub(super) fn without(kind: ThreadKind) -> Self {
        Self { left_out: Some(kind) }
    }
}

/// Of whoever has it compiled, it does not know the process.
fn program_of(kind: ThreadKind) -> Cow<'static, [sock_filter]> {
    let mut program = Cow::Borrowed(PROGRAMS[kind as usize]);
    for index in 0..program.len() {
        if program[index].k == OWN_PROCESS {
            program.to_mut()[index].k = std::process::id();
        }
    }
    program
}

#[cfg(test)]
mod tests;
