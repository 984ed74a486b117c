//! The VMM process: read the configuration, build the machine, run it, say how it ended.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::IntoRawFd as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmm::control::report_exit;
use vmm::inherited::{self, InheritedFds};
use vmm::machine::Machine;
use vmm::memory::Backing;
use vmm::{jail, kvm};
use vmm_api::control::{Exit, ExitReason};
use vmm_api::{Fd, VmConfig};

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
        Some(config_fd) if !cli.probe => run(config_fd),
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

fn run(config_fd: i32) -> Result<u8> {
    raise_descriptor_limit().context("cannot raise the limit of open files")?;
    let mut fds = InheritedFds::default();
    let config = File::from(fds.take(Fd(config_fd)).context("--config-fd is not an open descriptor")?);
    // At once: a parser that reads from a file asks the kernel for each byte.
    let config = io::read_to_string(config).context("cannot read the configuration")?;
    let config: VmConfig = serde_json::from_str(&config).context("cannot understand the configuration")?;
    inherited::close_others(&config).context("cannot close what nobody handed over")?;
    let control = fds.take(config.control).context("the control socket is not an open descriptor")?;
    let control = UnixStream::from(control);
    control.set_nonblocking(true)?;
    report_panics(control.try_clone()?);
    let exit = match build(config, &mut fds) {
        Ok(machine) => machine.run(&control).context("cannot run the VM")?,
        Err(error) => {
            let detail = format!("{error:#}");
            Exit { reason: ExitReason::VmmError { detail }, console_tail: String::new() }
        }
    };
    let code = exit.reason.code();
    report_exit(&control, exit);
    Ok(code)
}

/// Confines the process, then builds the VM from what it holds.
fn build(mut config: VmConfig, fds: &mut InheritedFds) -> Result<Machine> {
    if let Some(fd) = config.cgroup {
        // What is charged before stays with the cgroup of the owner.
        let mut procs = File::from(fds.take(fd).context("the cgroup is not an open descriptor")?);
        procs.write_all(b"0").context("cannot join the cgroup of the VM")?;
    }
    if config.kvm.is_none() {
        // The new root has no devices.
        config.kvm = Some(Fd(kvm::open_device()?.into_raw_fd()));
    }
    let backing = Backing::of_host();
    let jail = jail::enter()?;
    // The kernel ends us with the thread that spawned us, even when we are stopped or stuck. A closed control socket, by which
    // we notice in any other case, needs our event loop. Changing credentials would have cleared it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .context("cannot ask to die with the owner")?;
    Ok(Machine::build(&config, fds, jail, backing)?)
}

fn print_probe() -> Result<u8> {
    println!("{}", serde_json::to_string(&vmm::probe::probe())?);
    Ok(0)
}

/// A panic is a fault of ours: the owner learns of it before the process aborts.
fn report_panics(control: UnixStream) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let detail = format!("this is a bug in vmm: {panic}");
        report_exit(&control, Exit { reason: ExitReason::VmmError { detail }, console_tail: String::new() });
        print(panic);
    }));
}

/// Shares hold a descriptor for each inode that the guest knows; the soft limit is made for programs that use select(2).
fn raise_descriptor_limit() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(())
}
