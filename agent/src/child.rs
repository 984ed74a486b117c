//! A process of its own for each step that forks: `libcontainer` clones, and cloning a process with a runtime in it is not
//! safe. The parent hands over descriptors from [`FIRST_FD`] on; the result goes to standard output, the cause of a failure
//! to standard error.

mod copy;
mod error_log;
mod executor;
mod forward;
mod root;
mod seccomp;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::bundle::{Bundle, STATE_DIR};
use crate::{sys, sysctl};
use error_log::ErrorLog;
use executor::Payload;

/// Number of the first descriptor that a step is given: standard input, output and error of the new process, then what the
/// step needs beside them.
pub(crate) const FIRST_FD: i32 = 3;
/// Number of the pipe on which a container's init tells how its start went (see `executor.rs`).
const START_FD: i32 = FIRST_FD + 3;

/// Runs the step that the arguments name.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let log = ErrorLog::install();
    // The agent is exempt from the OOM killer; what it starts is not, unless its spec says so.
    let outcome = fs::write("/proc/self/oom_score_adj", "0").context("cannot reset oom_score_adj").and_then(|()| {
        match words.as_slice() {
            ["create", id, console] => create(id, console),
            ["exec", id, exec_id, console] => exec(id, exec_id, console),
            ["update", cgroup, resources] => update(cgroup, resources),
            ["stat-path", pid, path] => copy::stat_path(pid, path),
            ["copy-out", pid, path, name] => copy::copy_out(pid, path, name),
            ["copy-in", pid, path] => copy::copy_in(pid, path),
            ["forward", pid, port] => forward::forward(pid, port),
            _ => Err(anyhow::anyhow!("unknown step")),
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = format!("{error:#}");
            match executor::refusal(&text) {
                Some(refusal) => eprint!("{refusal}"),
                None => eprint!("{}", log.explain(text.trim_end_matches('\0'))),
            }
            ExitCode::FAILURE
        }
    }
}

fn builder(id: &str, console: &str, payload: Payload) -> Result<ContainerBuilder> {
    let [stdin, stdout, stderr] = [FIRST_FD, FIRST_FD + 1, FIRST_FD + 2].map(sys::take_fd);
    let builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(STATE_DIR)?
        .with_executor(payload)
        .with_console_socket((!console.is_empty()).then(|| PathBuf::from(console)));
    if console.is_empty() { Ok(builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr)) } else { Ok(builder) }
}

fn create(id: &str, console: &str) -> Result<()> {
    let bundle = Bundle::of(id);
    let spec = bundle.spec().context("cannot read the spec")?;
    root::check(&spec)?;
    if let Some(sysctls) = spec.linux().as_ref().and_then(|linux| linux.sysctl().clone()) {
        sysctl::apply_to_guest(&sysctls, &namespaces(&spec))?;
    }
    let payload = Payload::of_init(&spec, START_FD);
    let init = builder(id, console, payload)?.as_init(bundle.path()).with_systemd(false).with_detach(true);
    let Some(pid) = init.build()?.pid() else { bail!("the container has no process") };
    print!("{}", pid.as_raw());
    Ok(())
}

fn namespaces(spec: &Spec) -> Vec<LinuxNamespaceType> {
    let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    listed.iter().map(oci_spec::runtime::LinuxNamespace::typ).collect()
}

fn exec(id: &str, exec_id: &str, console: &str) -> Result<()> {
    let bundle = Bundle::of(id);
    let spec = bundle.spec().context("cannot read the spec")?;
    let process = bundle.exec(exec_id).context("cannot read the process")?;
    let payload = Payload::of_exec(&spec, &process);
    let tenant = builder(id, console, payload)?.as_tenant().with_detach(true);
    let pid = tenant.with_process(Some(bundle.exec_path(exec_id))).build()?;
    print!("{}", pid.as_raw());
    Ok(())
}

/// In a process of its own because the kernel may reclaim for long before a lower limit holds.
fn update(cgroup: &str, resources: &str) -> Result<()> {
    use libcgroups::common::{CgroupConfig, CgroupManager as _, ControllerOpt, create_cgroup_manager};
    let resources = serde_json::from_slice(&fs::read(resources).context("cannot read the resources")?)?;
    let manager = create_cgroup_manager(CgroupConfig {
        cgroup_path: Path::new(cgroup).to_owned(),
        systemd_cgroup: false,
        container_name: String::new(),
    })?;
    let options =
        ControllerOpt { resources: &resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
    manager.apply(&options).context("cannot write the cgroup")
}
