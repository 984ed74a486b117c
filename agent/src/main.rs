//! PID 1 of the guest: boots user space, dials the host and serves the protocol on that connection.
//!
//! Whatever ends this process ends the VM: a failed boot and a lost connection both reset the machine.

mod boot;
mod bundle;
mod cgroup;
mod child;
mod container;
mod copied_volume;
mod copy;
mod devices;
mod events;
mod forward;
mod hotplug;
mod id;
mod init;
mod memory_volume;
mod network;
mod process;
mod processes;
mod reaper;
mod refuse;
mod server;
mod share;
mod socket_volume;
mod step;
mod streams;
mod sys;
mod sysctl;
mod terminal;

use std::panic;
use std::process::ExitCode;

use anyhow::Context as _;

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    if arguments.get(1).map(String::as_str) == Some("child") {
        return Ok(child::run(&arguments[2..]));
    }
    if arguments.get(1).map(String::as_str) == Some("init") {
        return init::run();
    }
    anyhow::ensure!(rustix::process::getpid().is_init(), "the agent runs only as PID 1 of a guest");
    // The console of a quiet guest takes what is written to it and shows nothing.
    panic::set_hook(Box::new(|panic| sys::log_to_kernel(&format!("agent: {panic}"))));
    if let Err(error) = run() {
        sys::log_to_kernel(&format!("agent: {error:#}"));
    }
    sys::reset_machine().context("reset the machine")?;
    Ok(ExitCode::FAILURE)
}

fn run() -> anyhow::Result<()> {
    boot::prepare_root().context("prepare the guest")?;
    init::show().context("show the init")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(server::serve()).context("serve the host")
}
