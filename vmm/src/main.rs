//! The VMM process.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main(vmm::jail::enter)
}
