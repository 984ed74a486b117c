//! `vmrun`: run OCI containers, each in its own microVM. Parses the command line, calls one function per command, and turns
//! what it returns into an exit status as Docker does: the command's own, 125 when `run` or `exec` itself failed, 1 when
//! another command did.

mod check;
mod cli;
mod client;
mod container;
mod control;
mod cp;
mod detach;
mod device_rate;
mod exec;
mod exec_process;
mod image;
mod images;
mod inspect;
mod install;
mod log;
mod logs;
mod network;
mod port_forward;
mod ps;
mod record;
mod remove;
mod run;
mod seccomp;
mod signals;
mod spec;
mod stats;
mod stdio;
mod stop;
mod user;
mod volume;

#[cfg(any(test, fuzzing))]
pub use image::fuzz;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Parser as _;
use cli::{Cli, Command};
use install::{InstallTarget, UninstallTarget};
use record::Folders;
use run::Place;

/// vmrun itself failed to run a command.
const EXIT_VMRUN_FAILED: u8 = 125;
/// Another of vmrun's commands failed.
const EXIT_FAILED: u8 = 1;

/// The program: does what its command line asks for.
#[must_use]
pub fn main() -> ExitCode {
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
        .with_writer(io::stderr)
        // Its own complaint about a closed standard error is a panic.
        .log_internal_errors(false)
        .init();
    let supervise = cli.supervise;
    let failed =
        if matches!(cli.command, Command::Run(_) | Command::Exec(_)) { EXIT_VMRUN_FAILED } else { EXIT_FAILED };
    match dispatch(cli) {
        Ok(code) => code.into(),
        // `vmrun logs box | head -1`
        Err(error) if is_broken_pipe(&error) => failed.into(),
        Err(error) if supervise => {
            detach::report_failed(failed, &error, "");
            failed.into()
        }
        Err(error) => {
            complain(&format!("{error:#}"));
            failed.into()
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    let folders = Folders { root: cli.root, data_root: cli.data_root, cgroup_parent: cli.cgroup_parent };
    match cli.command {
        Command::Run(args) => run_container(&folders, *args, cli.supervise),
        Command::Exec(args) => exec::exec(&folders.root, args),
        Command::Ps(args) => ps::ps(&folders.root, &args),
        Command::Logs(args) => logs::logs(&folders.root, &args),
        Command::Inspect(args) => inspect::inspect(&folders.root, &args.names),
        Command::Kill { signal, containers } => stop::kill(&folders.root, &signal, &containers.names),
        Command::Stop { patience_s, signal, containers } => {
            stop::stop(&folders.root, signal.as_deref(), patience_s, &containers.names)
        }
        Command::Wait(args) => stop::wait(&folders.root, &args.names),
        Command::Pause(args) => stop::pause(&folders.root, &args.names),
        Command::Unpause(args) => stop::unpause(&folders.root, &args.names),
        Command::Cp { archive, source, destination } => cp::cp(&folders.root, archive, &source, &destination),
        Command::PortForward { address, name, ports } => {
            port_forward::port_forward(&folders.root, &name, address, &ports)
        }
        Command::Rm { force, containers } => remove::rm(&folders.root, force, &containers.names),
        Command::Stats(args) => stats::stats(&folders.root, &args),
        Command::Pull { quiet, plain_http, image } => {
            images::pull(&folders.data_root, &image, image::OpenOptions { quiet, plain_http, ..Default::default() })
        }
        Command::Images { json, quiet } => images::images(&folders.data_root, json, quiet),
        Command::Rmi { force, images } => images::rmi(&folders.root, &folders.data_root, &images, force),
        Command::Load { input, quiet } => images::load(&folders.data_root, input, quiet),
        Command::Gc => remove::gc(&folders),
        Command::Install { target: InstallTarget::Containerd(args) } => install::install(&args),
        Command::Uninstall { target: UninstallTarget::Containerd(args) } => install::uninstall(&args),
        Command::Check { security, json } => check::check(security, &folders.root, json),
        Command::UnpackLayer { compression, target } => image::unpack_child(&compression, &target),
        Command::Completions { shell } => {
            let mut command = <Cli as clap::CommandFactory>::command();
            clap_complete::generate(shell, &mut command, "vmrun", &mut io::stdout());
            Ok(0)
        }
    }
}

fn run_container(folders: &Folders, args: cli::RunArgs, supervise: bool) -> anyhow::Result<u8> {
    let place = if supervise { Place::Supervisor } else { Place::Foreground };
    if supervise {
        detach::enter_session()?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(run::run(folders, args, place));
    // A thread may still wait for a reader that has stalled.
    runtime.shutdown_background();
    outcome
}

/// Calls `act` for each container, and says which of them it failed for.
fn for_each(names: &[String], mut act: impl FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<u8> {
    let mut code = 0;
    for name in names {
        if let Err(error) = act(name) {
            if is_broken_pipe(&error) {
                return Err(error);
            }
            complain(&format!("{error:#}"));
            code = EXIT_FAILED;
        }
    }
    Ok(code)
}

/// Says what went wrong. `eprintln!` would panic when nobody reads any more, and leave a container without its owner.
fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "vmrun: {text}");
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Twice as many hexadecimal digits as bytes; 6 bytes make one of Docker's short ids.
fn random_hex(byte_count: usize) -> String {
    let mut bytes = vec![0_u8; byte_count.min(256)];
    // getrandom(2) gives up to 256 bytes whole.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
