//! A process of its own for each step that forks: `libcontainer` clones, and cloning a process with a runtime in it is not
//! safe. The parent hands over descriptors 3, 4 and 5 as the container's standard streams; the result goes to standard
//! output, the cause of a failure to standard error.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;

/// Folder of the containers' states, of `libcontainer`.
pub(crate) const STATE_DIR: &str = "/run/agent/state";

/// Runs the step that the arguments name.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["create", id, bundle, console] => create(id, bundle, console),
        ["start", id] => start(id),
        ["exec", id, process, console] => exec(id, process, console),
        ["delete", id] => delete(id),
        _ => Err(anyhow::anyhow!("unknown step")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn builder(id: &str, console: &str) -> Result<ContainerBuilder> {
    let (stdin, stdout, stderr) = (crate::sys::take_fd(3), crate::sys::take_fd(4), crate::sys::take_fd(5));
    let builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(STATE_DIR)?
        .with_console_socket((!console.is_empty()).then(|| PathBuf::from(console)));
    if console.is_empty() { Ok(builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr)) } else { Ok(builder) }
}

fn create(id: &str, bundle: &str, console: &str) -> Result<()> {
    let container = builder(id, console)?.as_init(bundle).with_systemd(false).with_detach(true).build()?;
    let Some(pid) = container.pid() else { bail!("the container has no process") };
    print!("{}", pid.as_raw());
    Ok(())
}

fn start(id: &str) -> Result<()> {
    load(id)?.start().context("cannot start")
}

fn exec(id: &str, process: &str, console: &str) -> Result<()> {
    let pid = builder(id, console)?.as_tenant().with_detach(true).with_process(Some(process)).build()?;
    print!("{}", pid.as_raw());
    Ok(())
}

fn delete(id: &str) -> Result<()> {
    let mut container = load(id)?;
    container.delete(true).context("cannot delete")
}

fn load(id: &str) -> Result<Container> {
    let dir = PathBuf::from(STATE_DIR).join(id);
    fs::metadata(&dir).with_context(|| format!("no state of container {id}"))?;
    Ok(Container::load(dir)?)
}
