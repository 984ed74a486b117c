//! The program `containerd-shim-vm-v2`; all of it is in the library beside this, where fuzzers reach it too.

use std::process::ExitCode;

fn main() -> ExitCode {
    containerd_shim_vm_v2::main()
}
