//! `containerd-shim-vm-v2`, the runtime `io.containerd.vm.v2`: one server for each pod, which owns the pod's microVM.
//!
//! Reads the arguments that containerd gives and calls one function for each action. What it prints is the answer that the
//! action has; a failure is one line on standard error.

mod arguments;
mod bootstrap;
mod config;
mod container;
mod cri;
mod delete;
mod error;
mod events;
mod features;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod hooks;
mod logger;
mod metrics;
mod pod;
mod process;
mod record;
mod sandbox_service;
mod server;
mod service;
mod stdio;
mod translate;
mod vm;

use std::io::{self, Write as _};
use std::process::ExitCode;

use arguments::{Action, Arguments};

/// The messages of `proto/`.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

/// The program: does what its arguments ask for.
#[must_use]
pub fn main() -> ExitCode {
    let done = Arguments::parse(std::env::args_os().skip(1)).and_then(|arguments| match arguments.action {
        Action::Start => bootstrap::start(&arguments),
        Action::Serve => server::serve(arguments),
        Action::Delete => delete::delete(&arguments),
        Action::Info => features::print(),
        Action::Version => features::print_version(),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd takes it into the error that its caller sees.
            let _ = writeln!(io::stderr(), "containerd-shim-vm-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}
