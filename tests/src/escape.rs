//! What the VMM that was taken over (`bin/escape.rs`) tells its story.

use serde::{Deserialize, Serialize};

/// One attempt.
#[derive(Debug, Deserialize, Serialize)]
pub struct Tried {
    /// By which kind of thread, as `Debug` prints it.
    pub thread: String,
    /// What, or the number of a system call whose arguments mean nothing.
    pub attempt: String,
    /// What became of it.
    pub became: Became,
}

/// What became of an attempt.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Became {
    /// It succeeded.
    Done,
    /// The kernel refused, with this error number.
    Refused(i32),
    /// The filter of system calls ended the process.
    Ended,
}
