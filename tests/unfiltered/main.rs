//! The VMM, but one kind of its threads has no filter of system calls: the kind whose name this was called by. The story
//! `tests/tests/confinement.rs` must notice. Called by the name `unconfined` it gives nothing up, so that `tests/bench/instructions` can tell
//! what that costs. A program of its own, built as the VMM is: one with debug assertions makes calls that the filters of the others do not
//! have.

use std::path::Path;
use std::process::ExitCode;

use vmm::jail::{self, Jail, ThreadKind};
use vmm::process;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let name = Path::new(&arguments[0]).file_name().expect("a name").to_string_lossy();
    let config_fd = arguments.iter().skip_while(|argument| *argument != "--config-fd").nth(1).expect("--config-fd FD");
    let config_fd = config_fd.parse().expect("a number");
    if name == "unconfined" {
        return process::run(config_fd, || Ok((Jail::default(), jail::mount_for_ram()?))).expect("the VM runs").into();
    }
    let kind = ThreadKind::ALL.into_iter().find(|kind| format!("{kind:?}") == name).expect("a kind of threads");
    process::run(config_fd, || jail::enter().map(|(jail, ram)| (jail.without(kind), ram))).expect("the VM runs").into()
}
