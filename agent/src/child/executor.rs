//! The last act of a container's process: seccomp, capabilities, `execve`, for an init and for an exec alike.
//!
//! `libcontainer` applies the first two to an init only, so both are taken out of its spec (`bundle.rs`) and applied here.
//! The order is runc's: without no_new_privs, loading a filter takes CAP_SYS_ADMIN, so it comes before the capabilities.
//!
//! How a start went is told on a pipe that `execve` closes: nothing at all is a process that died before it came here, one
//! byte is a command that runs, and the byte with a text is why it could not.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use libcontainer::capabilities;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use oci_spec::runtime::{Capabilities, LinuxCapabilities, Mount, Process, Spec};
use rustix::fs::{PROC_SUPER_MAGIC, statfs};

use super::seccomp::Filters;
use crate::sys;

/// Marks a command that is not there: exit status 127.
const NOT_FOUND: &str = "exec-not-found";
/// Marks a command that cannot be executed: exit status 126.
const NOT_EXECUTABLE: &str = "exec-not-executable";
/// Path of a process whose environment has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the executor of `libcontainer` is to do.
#[derive(Clone)]
pub(super) struct Payload {
    capabilities: LinuxCapabilities,
    filters: Filters,
    no_new_privileges: bool,
    start_fd: Option<i32>,
}

impl Payload {
    pub(super) fn of_init(spec: &Spec, start_fd: i32) -> Self {
        let process = spec.process().clone().unwrap_or_default();
        Self { start_fd: Some(start_fd), ..Self::of_exec(spec, &process) }
    }

    /// As with runc, an exec that names no capabilities has the container's.
    pub(super) fn of_exec(spec: &Spec, process: &Process) -> Self {
        let of_container = spec.process().as_ref().and_then(|init| init.capabilities().clone());
        let capabilities = complete(process.capabilities().clone().or(of_container));
        Self {
            filters: Filters::of(spec, &capabilities),
            capabilities,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            start_fd: None,
        }
    }

    fn drop_privileges(&self) -> Result<(), String> {
        if !self.no_new_privileges {
            self.filters.load()?;
        }
        capabilities::drop_privileges(&self.capabilities, create_syscall().as_ref())
            .map_err(|error| format!("cannot set the capabilities: {error}"))?;
        if self.no_new_privileges { self.filters.load() } else { Ok(()) }
    }

    /// Returns only when it fails, with the text for the caller.
    fn execute(&self, process: &Process) -> String {
        let words = process.args().clone().unwrap_or_default();
        let prepared = prepare(&words, process.env().as_deref().unwrap_or_default());
        let (path, arguments, environment) = match prepared {
            Ok(prepared) => prepared,
            Err(cause) => return cause,
        };
        if let Err(error) = sys::reset_signals() {
            return format!("cannot reset the signals: {error}");
        }
        if let Err(cause) = self.drop_privileges() {
            return cause;
        }
        let Ok(file) = CString::new(path.as_os_str().as_encoded_bytes()) else {
            return format!("{NOT_FOUND}: the name of the command holds a zero byte");
        };
        let Err(error) = nix::unistd::execve(&file, &arguments, &environment);
        explain(&path, error)
    }

    /// The pipe stays open until `execve` closes it.
    fn start_pipe(&self) -> Option<File> {
        // SAFETY is with `sys::borrow_fd`: the parent mapped the number, and nobody closes it.
        let fd: BorrowedFd<'_> = sys::borrow_fd(self.start_fd?);
        fd.as_fd().try_clone_to_owned().ok().map(File::from)
    }
}

impl Executor for Payload {
    /// Says early what is plainly wrong; `execve` has the last word.
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().clone().unwrap_or_default();
        let words = process.args().clone().unwrap_or_default();
        // What a container does to its own mounts later is its own affair.
        let proc = if self.start_fd.is_some() { check_proc(spec) } else { Ok(()) };
        let prepared = proc.and_then(|()| prepare(&words, process.env().as_deref().unwrap_or_default()));
        prepared.map(drop).map_err(ExecutorValidationError::ArgValidationError)
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().clone().unwrap_or_default();
        let mut pipe = self.start_pipe();
        if let Some(pipe) = &mut pipe {
            // Nobody reads any more: the agent gave up, and kills this process.
            let _ = pipe.write_all(b"+");
        }
        let cause = self.execute(&process);
        if let Some(pipe) = &mut pipe {
            let _ = pipe.write_all(cause.as_bytes());
        }
        Err(ExecutorError::Other(cause))
    }
}

/// A link of the image may have led a mount to `/proc`, over what is masked and read-only there.
fn check_proc(spec: &Spec) -> Result<(), String> {
    let is_proc = |mount: &Mount| mount.typ().as_deref() == Some("proc") && mount.destination() == Path::new("/proc");
    let is_wanted = spec.mounts().iter().flatten().any(is_proc);
    let is_there = || statfs("/proc").is_ok_and(|found| found.f_type == PROC_SUPER_MAGIC);
    if is_wanted && !is_there() { Err("something else is mounted over /proc".to_owned()) } else { Ok(()) }
}

/// The executor's own words in an error that `libcontainer` has wrapped.
pub(super) fn refusal(text: &str) -> Option<&str> {
    let begin = [NOT_FOUND, NOT_EXECUTABLE].iter().find_map(|marker| text.find(marker))?;
    Some(text[begin..].trim_end_matches('\0'))
}

/// A set that is not named is empty; `libcontainer` would leave it as it is, which is full.
fn complete(sets: Option<LinuxCapabilities>) -> LinuxCapabilities {
    let mut complete = sets.unwrap_or_else(|| {
        let mut none = LinuxCapabilities::default();
        none.set_bounding(None).set_effective(None).set_permitted(None).set_inheritable(None).set_ambient(None);
        none
    });
    let or_empty = |set: &Option<Capabilities>| Some(set.clone().unwrap_or_default());
    let [bounding, effective, permitted] =
        [complete.bounding(), complete.effective(), complete.permitted()].map(or_empty);
    let [inheritable, ambient] = [complete.inheritable(), complete.ambient()].map(or_empty);
    complete.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    complete.set_inheritable(inheritable).set_ambient(ambient);
    complete
}

type Prepared = (PathBuf, Vec<CString>, Vec<CString>);

/// The file to execute, its arguments and its environment.
fn prepare(words: &[String], env: &[String]) -> Result<Prepared, String> {
    let name = words.first().filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| format!("{NOT_FOUND}: the command is empty"))?;
    let path = find(name, env)?;
    let strings = |words: &[String]| -> Result<Vec<CString>, String> {
        let string = |word: &String| CString::new(word.as_bytes());
        words.iter().map(string).collect::<Result<_, _>>().map_err(|_| "a word holds a zero byte".to_owned())
    };
    let mut environment = strings(env)?;
    if !env.iter().any(|variable| variable.starts_with("HOME=")) {
        // `libcontainer` has looked it up in the container's /etc/passwd.
        let home = std::env::var("HOME").unwrap_or_else(|_| "/".to_owned());
        environment.extend(strings(&[format!("HOME={home}")])?);
    }
    Ok((path, strings(words)?, environment))
}

/// A name with a slash is a path; any other is looked for in the PATH of the process.
fn find(name: &str, env: &[String]) -> Result<PathBuf, String> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match check(&path) {
            Ok(()) => Ok(path),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {
                Err(format!("{NOT_FOUND}: exec: \"{name}\": no such file or directory"))
            }
            Err(error) => Err(explain(&path, error)),
        };
    }
    let folders = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let mut refused = None;
    for folder in folders.split(':') {
        // An empty folder is the working directory (environ(7)).
        let path = Path::new(if folder.is_empty() { "." } else { folder }).join(name);
        match check(&path) {
            Ok(()) => return Ok(path),
            Err(Errno::EACCES) => refused = Some(path),
            Err(_) => {}
        }
    }
    Err(match refused {
        Some(path) => explain(&path, Errno::EACCES),
        None => format!("{NOT_FOUND}: exec: \"{name}\": executable file not found in $PATH"),
    })
}

/// Whether somebody may execute the file; whether this process may is for `execve` to say.
fn check(path: &Path) -> Result<(), Errno> {
    let errno = |error: io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    let metadata = fs::metadata(path).map_err(errno)?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    if metadata.permissions().mode() & 0o111 == 0 { Err(Errno::EACCES) } else { Ok(()) }
}

fn explain(path: &Path, error: Errno) -> String {
    let shown = path.display();
    match error {
        Errno::ENOENT if path.exists() => {
            format!("{NOT_FOUND}: exec: \"{shown}\": its interpreter is not there: no such file or directory")
        }
        Errno::ENOENT | Errno::ENOTDIR => format!("{NOT_FOUND}: exec: \"{shown}\": no such file or directory"),
        Errno::ENOEXEC => format!("{NOT_EXECUTABLE}: exec: \"{shown}\": exec format error"),
        Errno::EISDIR => format!("{NOT_EXECUTABLE}: exec: \"{shown}\": is a directory"),
        error => format!("{NOT_EXECUTABLE}: exec: \"{shown}\": {}", error.desc().to_lowercase()),
    }
}

#[cfg(test)]
mod tests {
    use super::{complete, find, refusal};

    #[test]
    fn refusal_is_found_in_what_wraps_it() {
        assert_eq!(refusal("failed: exec-not-found: exec: \"x\"\0\0"), Some("exec-not-found: exec: \"x\""));
        assert_eq!(refusal("failed to prepare rootfs"), None);
    }

    #[test]
    fn command_that_is_not_there_is_told_from_one_that_cannot_run() {
        let folder = tempfile::tempdir().expect("a folder");
        let plain = folder.path().join("plain");
        std::fs::write(&plain, "").expect("a file");
        let at = |path: &std::path::Path| find(&path.display().to_string(), &[]).expect_err("refused");
        assert!(at(&folder.path().join("missing")).starts_with("exec-not-found"));
        assert!(at(&plain.join("below")).starts_with("exec-not-found"));
        assert!(at(&plain).starts_with("exec-not-executable"));
        assert!(at(folder.path()).ends_with("is a directory"));
    }

    #[test]
    fn last_path_of_the_environment_is_searched() {
        let env = ["PATH=/does/not/exist".to_owned(), "PATH=/does/not:/bin".to_owned()];
        assert_eq!(find("sh", &env).expect("sh"), std::path::Path::new("/bin/sh"));
        assert!(find("sh", &env[..1]).expect_err("not there").contains("not found in $PATH"));
    }

    #[test]
    fn capability_set_that_is_not_named_is_empty() {
        let sets = complete(None);
        assert_eq!(sets.bounding().as_ref().map(std::collections::HashSet::len), Some(0));
        assert_eq!(sets.effective().as_ref().map(std::collections::HashSet::len), Some(0));
    }
}
