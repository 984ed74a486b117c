//! `vmrun`: run OCI containers, each in its own microVM. Parses the command line, calls one function per command, and turns
//! what it returns into an exit status as Docker does: the command's own, or 125 when vmrun itself failed.

mod check;
mod cli;
mod control;
mod exec;
mod image;
mod list;
mod run;
mod seccomp;
mod spec;
mod stdio;
mod user;

use std::process::ExitCode;

use clap::Parser as _;
use cli::{Cli, Command};

/// vmrun itself failed.
const EXIT_VMRUN_FAILED: u8 = 125;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers; everything else is a mistake. A closed stderr changes neither.
            let _ = error.print();
            return if error.use_stderr() { EXIT_VMRUN_FAILED.into() } else { ExitCode::SUCCESS };
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(&cli.log_level))
        .with_writer(std::io::stderr)
        .init();
    match dispatch(cli) {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("vmrun: {error:#}");
            EXIT_VMRUN_FAILED.into()
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match cli.command {
        Command::Run(args) => runtime.block_on(run::run(&cli.root, &cli.data_root, *args)),
        Command::Exec(args) => exec::exec(&cli.root, args),
        Command::Ps { all, json } => list::ps(&cli.root, all, json),
        Command::Kill { signal, names } => list::kill(&cli.root, &signal, &names),
        Command::Gc => list::gc(&cli.root, &cli.data_root),
        Command::Check { json } => check::check(json),
        Command::UnpackLayer { compression, target } => image::unpack_child(&compression, &target),
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut <Cli as clap::CommandFactory>::command(),
                "vmrun",
                &mut std::io::stdout(),
            );
            Ok(0)
        }
    }
}
