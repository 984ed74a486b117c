//! The VMM, but one kind of its threads has no filter of system calls: the kind whose name this was called by. The story
//! `tests/tests/confinement.rs` must notice. Called by the name `unconfined` it gives nothing up, so that `tests/bench/instructions` can tell
//! what that costs. A program of its own, built as the VMM is: one with debug assertions makes calls that the filters of the others do not
//! have.

use std::path::Path;
use std::process::ExitCode;

use vmm::cli;
use vmm::jail::{self, Jail, ThreadKind};

fn main() -> ExitCode {
    let program = std::env::args_os().next().expect("a name");
    let name = Path::new(&program).file_name().expect("a name").to_string_lossy();
    if name == "unconfined" {
        return cli::main(|| Ok((Jail::default(), jail::mount_for_ram()?)));
    }
    let kind = ThreadKind::ALL.into_iter().find(|kind| format!("{kind:?}") == name).expect("a kind of threads");
    cli::main(|| jail::enter().map(|(jail, ram)| (jail.without(kind), ram)))
}
