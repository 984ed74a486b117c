//! The containers of the guest and their processes: made by a child each, remembered until they are deleted.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use agent_api::message::{self, WaitReply};
use command_fds::{CommandFdExt as _, FdMapping};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::fs::MemfdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{Winsize, tcsetwinsize};
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::cgroup::Cgroup;
use crate::id;
use crate::reaper::Reaper;
use crate::streams;

/// Folder of the bundles and console sockets.
const BUNDLE_DIR: &str = "/run/agent/bundles";

/// Why a request about a container failed.
#[derive(Debug, Error)]
pub(crate) enum ContainerError {
    #[error(transparent)]
    Id(#[from] id::InvalidId),
    #[error("{what} {id} exists already")]
    Exists { what: &'static str, id: String },
    #[error("no such {what}: {id}")]
    NotFound { what: &'static str, id: String },
    #[error("{0} is not supported in a guest")]
    Unsupported(&'static str),
    #[error("not valid OCI JSON")]
    Json(#[from] serde_json::Error),
    /// The child's own words.
    #[error("{0}")]
    Child(String),
    #[error("cannot {action}")]
    Io { action: &'static str, source: io::Error },
}

/// Every container, by id.
#[derive(Clone)]
pub(crate) struct Containers {
    reaper: Reaper,
    table: Arc<Mutex<HashMap<String, Entry>>>,
}

#[derive(Default)]
struct Entry {
    /// By exec id; the container's init has the empty one.
    processes: HashMap<String, Process>,
}

struct Process {
    pid: i32,
    exited: watch::Receiver<Option<WaitReply>>,
    stdin: Option<JoinHandle<()>>,
    terminal: Option<OwnedFd>,
}

/// What a new process reads and writes.
struct Stdio3 {
    fds: [OwnedFd; 3],
    feeder: Option<JoinHandle<()>>,
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> ContainerError {
    move |source| ContainerError::Io { action, source }
}

impl Containers {
    pub(crate) fn new(reaper: Reaper) -> Self {
        Self { reaper, table: Arc::default() }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a container whose init waits for [`Self::start`].
    pub(crate) async fn create(&self, request: &message::CreateContainerRequest) -> Result<i32, ContainerError> {
        let id = id::check(&request.container_id)?.to_owned();
        let mut spec: Spec = serde_json::from_slice(&request.spec)?;
        refuse_unsupported(&spec)?;
        if self.table().contains_key(&id) {
            return Err(ContainerError::Exists { what: "container", id });
        }
        spec.set_hooks(None);
        let bundle = Path::new(BUNDLE_DIR).join(&id);
        fs::create_dir_all(&bundle).map_err(failed("make the bundle"))?;
        fs::create_dir_all(crate::child::STATE_DIR).map_err(failed("make the state folder"))?;
        fs::write(bundle.join("config.json"), serde_json::to_vec(&spec)?).map_err(failed("write the bundle"))?;
        let terminal = spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal).unwrap_or(false);
        let bundle_path = bundle.display().to_string();
        let spawned = self.spawn(&id, "", &["create", &id, &bundle_path], terminal, &request.stdio).await;
        match spawned {
            Ok(process) => {
                let pid = process.pid;
                self.table().entry(id).or_default().processes.insert(String::new(), process);
                Ok(pid)
            }
            Err(error) => {
                self.clean_up(&id).await;
                Err(error)
            }
        }
    }

    pub(crate) async fn start(&self, container_id: &str) -> Result<(), ContainerError> {
        self.pid(container_id, "")?;
        self.run_child(&["start", container_id], None).await.map(drop)
    }

    pub(crate) async fn exec(&self, request: &message::ExecRequest) -> Result<i32, ContainerError> {
        let (id, exec_id) = (id::check(&request.container_id)?.to_owned(), id::check(&request.exec_id)?.to_owned());
        self.pid(&id, "")?;
        if self.pid(&id, &exec_id).is_ok() {
            return Err(ContainerError::Exists { what: "exec", id: exec_id });
        }
        let process: oci_spec::runtime::Process = serde_json::from_slice(&request.process)?;
        let path = Path::new(BUNDLE_DIR).join(&id).join(format!("{exec_id}.json"));
        fs::write(&path, &request.process).map_err(failed("write the process"))?;
        let file = path.display().to_string();
        let terminal = process.terminal().unwrap_or(false);
        let spawned = self.spawn(&id, &exec_id, &["exec", &id, &file], terminal, &request.stdio).await;
        // Read once, by the child.
        let _ = fs::remove_file(&path);
        let spawned = spawned?;
        let pid = spawned.pid;
        self.table().entry(id).or_default().processes.insert(exec_id, spawned);
        Ok(pid)
    }

    /// Waits for a process to exit.
    pub(crate) async fn wait(&self, container_id: &str, exec_id: &str) -> Result<WaitReply, ContainerError> {
        let mut exited = self.with_process(container_id, exec_id, |process| process.exited.clone())?;
        let found = exited.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
        found.ok_or_else(|| ContainerError::NotFound { what: "process", id: exec_id.to_owned() })
    }

    pub(crate) fn pid(&self, container_id: &str, exec_id: &str) -> Result<i32, ContainerError> {
        self.with_process(container_id, exec_id, |process| process.pid)
    }

    pub(crate) fn exited(&self, container_id: &str, exec_id: &str) -> Result<bool, ContainerError> {
        self.with_process(container_id, exec_id, |process| process.exited.borrow().is_some())
    }

    pub(crate) fn close_stdin(&self, container_id: &str, exec_id: &str) -> Result<(), ContainerError> {
        self.with_process(container_id, exec_id, |process| {
            if let Some(feeder) = process.stdin.take() {
                feeder.abort();
            }
        })
    }

    pub(crate) fn resize(
        &self,
        container_id: &str,
        exec_id: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), ContainerError> {
        let resized = self.with_process(container_id, exec_id, |process| {
            process.terminal.as_ref().map(|terminal| set_size(terminal, rows, columns))
        })?;
        resized.unwrap_or(Ok(())).map_err(failed("resize the terminal"))
    }

    /// Removes a container, or forgets an exec.
    pub(crate) async fn delete(&self, container_id: &str, exec_id: &str, force: bool) -> Result<(), ContainerError> {
        if !exec_id.is_empty() {
            self.pid(container_id, exec_id)?;
            if let Some(entry) = self.table().get_mut(container_id) {
                entry.processes.remove(exec_id);
            }
            return Ok(());
        }
        if force {
            // Nothing to kill is as good.
            let _ = Cgroup::of(container_id).kill();
            self.wait(container_id, "").await?;
        }
        self.clean_up(container_id).await;
        self.table().remove(container_id);
        Ok(())
    }

    async fn clean_up(&self, container_id: &str) {
        let _ = self.run_child(&["delete", container_id], None).await;
        Cgroup::of(container_id).remove();
        let _ = fs::remove_dir_all(Path::new(BUNDLE_DIR).join(container_id));
    }

    fn with_process<T>(
        &self,
        container_id: &str,
        exec_id: &str,
        work: impl FnOnce(&mut Process) -> T,
    ) -> Result<T, ContainerError> {
        let mut table = self.table();
        let not_found = |what, id: &str| ContainerError::NotFound { what, id: id.to_owned() };
        let entry = table.get_mut(container_id).ok_or_else(|| not_found("container", container_id))?;
        let process = entry.processes.get_mut(exec_id).ok_or_else(|| not_found("exec", exec_id))?;
        Ok(work(process))
    }

    /// Makes a process by a child step; `step` lacks the console argument.
    async fn spawn(
        &self,
        container_id: &str,
        exec_id: &str,
        step: &[&str],
        terminal: bool,
        stdio: &message::Stdio,
    ) -> Result<Process, ContainerError> {
        let dial = failed("dial a stream");
        let input = streams::dial(stdio.stdin).await.map_err(&dial)?;
        let output = streams::dial(stdio.stdout).await.map_err(&dial)?;
        let errors = streams::dial(stdio.stderr).await.map_err(&dial)?;
        let mut arguments = step.to_vec();
        let (pid, feeder, master) = if terminal {
            let console = PathBuf::from(format!("/run/agent/console-{container_id}-{exec_id}.sock"));
            let listener = UnixListener::bind(&console).map_err(failed("make the console socket"))?;
            let path = console.display().to_string();
            arguments.push(&path);
            let null = || streams::drain(None);
            let fds = [null(), null(), null()].into_iter().collect::<io::Result<Vec<_>>>().map_err(&dial)?;
            let output_of_child = self.run_child(&arguments, fds.try_into().ok());
            let (master, pid) = tokio::join!(receive_terminal(&listener), output_of_child);
            let _ = fs::remove_file(&console);
            let pid = pid?;
            let master = master.map_err(failed("get the terminal"))?;
            set_size(&master, stdio.rows, stdio.columns).map_err(failed("resize the terminal"))?;
            let kept = master.try_clone().map_err(failed("keep the terminal"))?;
            streams::connect_terminal(master, input, output).map_err(&dial)?;
            (pid, None, Some(kept))
        } else {
            let (stdin, feeder) = streams::feed(input).map_err(&dial)?;
            let stdout = streams::drain(output).map_err(&dial)?;
            let stderr = streams::drain(errors).map_err(&dial)?;
            arguments.push("");
            let stdio = Stdio3 { fds: [stdin, stdout, stderr], feeder };
            (self.run_child(&arguments, Some(stdio.fds)).await?, stdio.feeder, None)
        };
        let pid: i32 = pid.trim().parse().map_err(|_| ContainerError::Child(format!("no process id in {pid:?}")))?;
        Ok(Process { pid, exited: self.watch(container_id, pid), stdin: feeder, terminal: master })
    }

    fn watch(&self, container_id: &str, pid: i32) -> watch::Receiver<Option<WaitReply>> {
        let (sender, receiver) = watch::channel(None);
        let (reaper, cgroup) = (self.reaper.clone(), Cgroup::of(container_id));
        tokio::spawn(async move {
            let exit_code = reaper.wait(pid).await.into();
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let exited_at_ns = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
            let reply = WaitReply { exit_code, exited_at_ns, oom_killed: cgroup.oom_killed(), ..Default::default() };
            // Nobody may be interested any more.
            let _ = sender.send(Some(reply));
        });
        receiver
    }

    /// Runs a step in a child; returns what it printed.
    async fn run_child(&self, arguments: &[&str], fds: Option<[OwnedFd; 3]>) -> Result<String, ContainerError> {
        let spawn = failed("start a child");
        // Files rather than pipes: a process that inherits one keeps nobody waiting.
        let memory_file = || Ok(File::from(rustix::fs::memfd_create("child", MemfdFlags::CLOEXEC)?));
        let (mut stdout, mut stderr) = (memory_file().map_err(&spawn)?, memory_file().map_err(&spawn)?);
        let mut command = Command::new("/proc/self/exe");
        command.arg("child").args(arguments).env_clear().stdin(Stdio::null());
        command.stdout(stdout.try_clone().map_err(&spawn)?).stderr(stderr.try_clone().map_err(&spawn)?);
        if let Some(fds) = fds {
            let mappings = (3..).zip(fds).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect();
            command.fd_mappings(mappings).map_err(|_| spawn(io::ErrorKind::InvalidInput.into()))?;
        }
        let child = command.spawn().map_err(&spawn)?;
        drop(command);
        let pid = i32::try_from(child.id()).unwrap_or_default();
        let code = self.reaper.wait(pid).await;
        let text = |file: &mut File| -> io::Result<String> {
            file.rewind()?;
            let mut bytes = Vec::new();
            file.take(64 << 10).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        if code != 0 {
            return Err(ContainerError::Child(classify(text(&mut stderr).map_err(&spawn)?, code)));
        }
        text(&mut stdout).map_err(&spawn)
    }
}

/// Marks the two failures that have exit statuses of their own (127 and 126).
fn classify(text: String, code: u8) -> String {
    if text.is_empty() {
        return format!("the child exited with {code} and said nothing");
    }
    let lower = text.to_lowercase();
    if lower.contains("not found") && lower.contains("executable")
        || lower.contains("no such file or directory") && lower.contains("exec")
    {
        return format!("exec-not-found: {text}");
    }
    if lower.contains("permission") && lower.contains("exec") {
        return format!("exec-not-executable: {text}");
    }
    text
}

/// What `libcontainer` does not do, or what means nothing in a guest.
fn refuse_unsupported(spec: &Spec) -> Result<(), ContainerError> {
    if spec.hooks().is_some() {
        return Err(ContainerError::Unsupported("hooks"));
    }
    let Some(linux) = spec.linux() else { return Ok(()) };
    if linux.intel_rdt().is_some() {
        return Err(ContainerError::Unsupported("linux.intelRdt"));
    }
    if linux.seccomp().as_ref().is_some_and(|seccomp| seccomp.listener_path().is_some()) {
        return Err(ContainerError::Unsupported("linux.seccomp.listenerPath"));
    }
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    if namespaces.iter().any(|ns| ns.typ() == LinuxNamespaceType::Network && ns.path().is_some()) {
        return Err(ContainerError::Unsupported("a network namespace by path"));
    }
    Ok(())
}

/// Waits for `libcontainer` to send the terminal's master.
async fn receive_terminal(listener: &UnixListener) -> io::Result<OwnedFd> {
    // The child may fail before it connects; its own error is the one that is reported.
    let accepted = tokio::time::timeout(std::time::Duration::from_secs(10), listener.accept()).await;
    let (stream, _) = accepted.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    stream
        .async_io(tokio::io::Interest::READABLE, || {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut name = [0; 256];
            recvmsg(stream.as_fd(), &mut [io::IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
            let mut fds = control.drain().filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            });
            fds.next().and_then(|mut fds| fds.next()).ok_or_else(|| io::ErrorKind::InvalidData.into())
        })
        .await
}

fn set_size(terminal: &OwnedFd, rows: u32, columns: u32) -> io::Result<()> {
    let short = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    let size = Winsize { ws_row: short(rows), ws_col: short(columns), ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}
