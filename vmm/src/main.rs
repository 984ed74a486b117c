//! The VMM process: what its command line asks for.

use std::io;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use vmm::{jail, process};

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

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt().with_max_level(cli.log_level).with_writer(io::stderr).init();
    let outcome = match cli.config_fd {
        Some(config_fd) if !cli.probe => process::run(config_fd, jail::enter).map_err(Into::into),
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
    println!("{}", serde_json::to_string(&vmm::probe::probe())?);
    Ok(0)
}
