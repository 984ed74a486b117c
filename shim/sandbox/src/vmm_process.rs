//! The VMM process: spawn it, hand over descriptors, learn how it ended, kill it.
//!
//! The VMM lives as long as this side of its control socket is open: when we die, it ends. The kill path needs neither the
//! agent nor the streams.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use agent_api::{CONTROL_PORT, STREAM_PORT};
use command_fds::{CommandFdExt as _, FdMapping};
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::{UnixDatagram, UnixStream};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use vmm_api::control::{Exit, ExitReason, Message, Reply, Request};
use vmm_api::net::NetConfig;
use vmm_api::{Fd, HostPort, ShareConfig, VmConfig, VsockConfig};

use crate::network::Interface;
use crate::pid_namespace;
use crate::plan::VmSize;
use crate::share::Share;
use crate::text;
use crate::vmm_control::VmmControl;
use crate::vmm_words;
use crate::{BootError, CallError, ControlError};

/// What a VMM is spawned with.
pub(crate) struct Spawn {
    pub(crate) program: PathBuf,
    pub(crate) name: String,
    pub(crate) size: VmSize,
    pub(crate) kvm: OwnedFd,
    pub(crate) kernel: OwnedFd,
    pub(crate) root_image: OwnedFd,
    pub(crate) cgroup: Option<OwnedFd>,
    pub(crate) console: Option<OwnedFd>,
    pub(crate) shares: Vec<Share>,
    pub(crate) networks: Vec<Interface>,
}

/// A running VMM.
pub(crate) struct VmmProcess {
    pid: u32,
    control: VmmControl,
    ended: watch::Receiver<Option<Exit>>,
    killer: std::sync::Arc<tokio::sync::Notify>,
}

/// The guest's two ports: connections that it makes arrive here as descriptors.
pub(crate) struct Ports {
    control: UnixDatagram,
    pub(crate) streams: UnixDatagram,
}

impl Ports {
    /// Waits for the agent's first connection.
    pub(crate) async fn accept_agent(&self) -> io::Result<UnixStream> {
        let stream = accept(&self.control).await?;
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream)
    }
}

/// Waits for the next connection that the VMM passes on.
pub(crate) async fn accept(port: &UnixDatagram) -> io::Result<std::os::unix::net::UnixStream> {
    let mut source_port = [0; 4];
    let (_, mut fds) =
        port.async_io(tokio::io::Interest::READABLE, || vmm_api::fds::recv(port.as_fd(), &mut source_port)).await?;
    fds.pop().map(Into::into).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Time that the VMM has to say why it ended, after the connection to the agent broke.
const REASON_DEADLINE: Duration = Duration::from_secs(2);
/// Longest wait for a VMM that was told to end, before it is killed.
const END_DEADLINE: Duration = Duration::from_millis(1500);
/// Longest wait for the control socket before that.
const TELL_DEADLINE: Duration = Duration::from_millis(200);
/// Longest line of the control socket, in bytes: the console's tail is the longest part of one.
const MAX_LINE_LEN: u64 = 1 << 20;
/// Answers that may wait for whoever asked.
const MAX_UNREAD_REPLIES: usize = 16;

impl VmmProcess {
    /// Spawns the VMM; it begins to boot at once.
    pub(crate) fn spawn(spawn: Spawn) -> Result<(Self, Ports), BootError> {
        let host = |action| move |source: io::Error| BootError::Host { action, source };
        let (control, vmm_control) = UnixStream::pair().map_err(host("make the control socket"))?;
        let vmm_control = vmm_control.into_std().map_err(host("make the control socket"))?;
        vmm_control.set_nonblocking(false).map_err(host("make the control socket"))?;
        let (agent_port, vmm_agent_port) = port_pair().map_err(host("make the agent's port"))?;
        let (stream_port, vmm_stream_port) = port_pair().map_err(host("make the stream port"))?;

        let mut passed = Passed::default();
        let config = VmConfig {
            name: spawn.name,
            kvm: Some(passed.add(spawn.kvm)),
            vcpus: spawn.size.vcpus,
            boot_vcpus: spawn.size.vcpus,
            memory_mib: spawn.size.memory_mib,
            kernel: passed.add(spawn.kernel),
            root_image: Some(passed.add(spawn.root_image)),
            cmdline: String::new(),
            cgroup: spawn.cgroup.map(|fd| passed.add(fd)),
            console: spawn.console.map(|fd| passed.add(fd)),
            control: passed.add(vmm_control.into()),
            entropy: !std::arch::is_x86_feature_detected!("rdrand"),
            vsock: Some(VsockConfig {
                guest_cid: 3,
                host_ports: vec![
                    HostPort { port: CONTROL_PORT, socket: passed.add(vmm_agent_port) },
                    HostPort { port: STREAM_PORT, socket: passed.add(vmm_stream_port) },
                ],
            }),
            shares: spawn
                .shares
                .into_iter()
                .map(|Share { tag, root, cache, read_only, .. }| ShareConfig {
                    tag,
                    root: passed.add(root),
                    cache,
                    read_only,
                })
                .collect(),
            networks: spawn
                .networks
                .into_iter()
                .map(|Interface { device, fds }| NetConfig {
                    device,
                    fds: fds.into_iter().map(|fd| passed.add(fd)).collect(),
                })
                .collect(),
        };
        let config_fd = passed.add(config_file(&config).map_err(host("write the VM's configuration"))?);

        let mut command = Command::new(&spawn.program);
        command.arg("--config-fd").arg(config_fd.0.to_string());
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        // An interrupt at the terminal is for the container; its owner passes it on.
        command.process_group(0);
        command.fd_mappings(passed.0).map_err(|_| BootError::Host {
            action: "hand descriptors to the VMM",
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        let child = pid_namespace::of_child(|| command.spawn())
            .map_err(|source| BootError::Spawn { path: spawn.program, source })?;
        drop(command);
        Ok((Self::watch(child, control), Ports { control: agent_port, streams: stream_port }))
    }

    fn watch(child: Child, control: UnixStream) -> Self {
        let (messages, requests) = control.into_split();
        let (ended_tx, ended) = watch::channel(None);
        let killer = std::sync::Arc::new(tokio::sync::Notify::new());
        let pid = child.id().unwrap_or_default();
        let (answered, replies) = mpsc::channel(MAX_UNREAD_REPLIES);
        tokio::spawn(watch_child(child, messages, answered, killer.clone(), ended_tx));
        Self { pid, control: VmmControl::new(requests, replies), ended, killer }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks the VMM for something; see [`VmmControl::ask`].
    pub(crate) async fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, ControlError> {
        self.control.ask(request, fds).await
    }

    /// Waits for the end of the VM.
    pub(crate) async fn ended(&self) -> Exit {
        let mut ended = self.ended.clone();
        let found = ended.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
        found.unwrap_or_else(|| unexplained("its watcher is gone".to_owned()))
    }

    /// An answer of the agent, or why there is none: a broken connection says less than how the VM ended.
    pub(crate) async fn explain<T>(&self, answer: Result<T, CallError>) -> Result<T, CallError> {
        let Err(CallError::Broken { call, detail }) = answer else { return answer };
        match tokio::time::timeout(REASON_DEADLINE, self.ended()).await {
            Ok(exit) => Err(CallError::VmEnded { call, exit: Box::new(exit) }),
            Err(_) => Err(CallError::Broken { call, detail }),
        }
    }

    /// Ends the VM: asks for it, then kills.
    pub(crate) async fn end(&self) {
        // Somebody else's request may hold the socket; the end does not wait for its answer.
        let told = tokio::time::timeout(TELL_DEADLINE, self.control.tell(&Request::Shutdown)).await;
        if told.is_err() || tokio::time::timeout(END_DEADLINE, self.ended()).await.is_err() {
            self.kill().await;
        }
    }

    /// Kills the process and waits until it is gone.
    pub(crate) async fn kill(&self) {
        self.killer.notify_one();
        self.ended().await;
    }
}

/// Reads what the VMM says until it ends, then reaps it.
async fn watch_child(
    mut child: Child,
    messages: tokio::net::unix::OwnedReadHalf,
    answered: mpsc::Sender<Reply>,
    killer: std::sync::Arc<tokio::sync::Notify>,
    ended: watch::Sender<Option<Exit>>,
) {
    let words = child.stderr.take().expect("it was spawned with a pipe");
    let words = tokio::spawn(vmm_words::relay(words, |line| tracing::warn!("VMM: {line}")));
    let mut messages = BufReader::new(messages);
    let mut reported = None;
    let mut line = String::new();
    loop {
        line.clear();
        let mut limited = (&mut messages).take(MAX_LINE_LEN);
        tokio::select! {
            read = limited.read_line(&mut line) => match read {
                Ok(1..) if line.ends_with('\n') => match serde_json::from_str(&line) {
                    Ok(Message::Exited(exit)) => reported = Some(exit),
                    // More answers than questions would be a fault of the VMM; they are dropped.
                    Ok(Message::Reply(reply)) => drop(answered.try_send(reply)),
                    Err(_) => reported = Some(unexplained("it said what nobody understands".to_owned())),
                },
                Ok(1..) => {
                    reported = Some(unexplained(format!("it said more than {MAX_LINE_LEN} bytes at once")));
                    let _ = child.start_kill();
                    break;
                }
                Ok(0) | Err(_) => break,
            },
            () = killer.notified() => {
                let _ = child.start_kill();
                break;
            }
        }
    }
    let status = tokio::select! {
        status = child.wait() => status,
        () = killer.notified() => {
            let _ = child.start_kill();
            child.wait().await
        }
    };
    // Nothing of its namespace of processes is left that could go on.
    let _ = words.await;
    let exit = reported.unwrap_or_else(|| match status {
        Ok(status) => {
            status.signal().map_or_else(|| unexplained(format!("its process ended with {status}")), killed_by)
        }
        Err(error) => unexplained(error.to_string()),
    });
    // Nobody listening means the sandbox was dropped.
    let _ = ended.send(Some(text::clean(exit)));
}

fn killed_by(signal: i32) -> Exit {
    if signal == Signal::SYS.as_raw() {
        let detail = "a thread made a system call that its filter does not have: the host's kernel log has its number, see `dmesg | grep type=1326`";
        return unexplained(detail.to_owned());
    }
    Exit { reason: ExitReason::Signal { signal }, console_tail: String::new() }
}

fn unexplained(detail: String) -> Exit {
    Exit {
        reason: ExitReason::VmmError { detail: format!("the VMM gave no reason: {detail}") },
        console_tail: String::new(),
    }
}

/// Descriptors for the child, numbered from 3.
#[derive(Default)]
struct Passed(Vec<FdMapping>);

impl Passed {
    fn add(&mut self, parent_fd: OwnedFd) -> Fd {
        let child_fd = 3 + i32::try_from(self.0.len()).expect("a few descriptors");
        self.0.push(FdMapping { parent_fd, child_fd });
        Fd(child_fd)
    }
}

fn port_pair() -> io::Result<(UnixDatagram, OwnedFd)> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    // tokio has no type for SEQPACKET; of this one only readiness and the descriptor are used.
    Ok((UnixDatagram::from_std(ours.into())?, theirs))
}

fn config_file(config: &VmConfig) -> io::Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create("vm-config", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(config)?)?;
    file.rewind()?;
    Ok(file.into())
}
