//! What the command line asks for.

use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::jail::{Jail, JailError};
use crate::{probe, process};

/// Run one microVM. Started by vmrun and by the containerd shim, not by hand.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Number of the open descriptor that holds the configuration as JSON.
    #[arg(long, value_name = "FD", required_unless_present = "probe")]
    config_fd: Option<i32>,
    /// Run no VM, but say as JSON whether this host's KVM can.
    #[arg(long)]
    probe: bool,
    /// What to log on standard error: error, warn, info, debug or trace.
    #[arg(long, default_value = "warn", value_name = "LEVEL")]
    log_level: tracing::Level,
}

/// Does it. A VM runs in a process that `confine` confines, as [`crate::jail::enter`] does.
pub fn main(confine: impl FnOnce() -> Result<(Jail, OwnedFd), JailError>) -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt().with_max_level(cli.log_level).with_writer(io::stderr).init();
    let outcome = match cli.config_fd {
        Some(config_fd) if !cli.probe => process::run(config_fd, confine).map_err(Into::into),
        _ => print_probe(),
    };
    match outcome {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_probe() -> Result<u8> {
    println!("{}", serde_json::to_string(&probe::probe())?);
    Ok(0)
}
