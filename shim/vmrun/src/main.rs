//! The program `vmrun`; all of it is in the library beside this, where fuzzers reach it too.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmrun::main()
}
