//! `vmrun run`: one container in one microVM, owned by this process from beginning to end, in the foreground or as the
//! supervisor of a detached container.

use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use oci_spec::runtime::{Process, Spec};
use sandbox::artifacts::Artifacts;
use sandbox::cgroup::HostCgroup;
use sandbox::network::Network;
use sandbox::plan::{self, ShareTags, VmSize, Volume};
use sandbox::share::{self, Rootfs, Share};
use sandbox::socket;
use sandbox::state::Status;
use sandbox::{BootRequest, CachePolicy, CallError, ProcessId, ProcessStreams, Sandbox, WantedStreams};
use tokio::net::UnixStream;

use crate::cli::RunArgs;
use crate::container::{Container, Ending};
use crate::image::{Image, PullPolicy};
use crate::log::{Log, LogStream, Stream};
use crate::record::{Folders, Record, Wanted, now_ms};
use crate::signals::{self, Signals};
use crate::{EXIT_VMRUN_FAILED, complain, control, detach, image, network, random_hex, spec, stdio, user};

/// Time that a guest has to boot. Generous: an emulated host takes seconds.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// Time that output has to be read after somebody wanted the container dead.
const DRAIN_DEADLINE: Duration = Duration::from_millis(500);
/// Time that those who asked have to take their answers.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);
/// What the cause of a missing cgroup follows.
const NO_CGROUP: &str = "the host cannot limit what the VM costs (--allow-degraded=cgroup runs it nevertheless)";
/// What follows the end of a VM that the host's kernel killed.
const OUT_OF_MEMORY: &str =
    ": it took more memory of the host than its size allows, which counts what it writes to a tmpfs of the host";
/// Exit status of a command that `--timeout` ended, as timeout(1) has it.
const EXIT_TIMEOUT: u8 = 124;
/// So many requests to end make us end, as with Docker.
const PATIENCE: u32 = 3;

/// Where this process runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    /// The caller waits, and has our output.
    Foreground,
    /// We are the supervisor of a detached container.
    Supervisor,
}

/// Runs a container to its end.
pub(crate) async fn run(folders: &Folders, args: RunArgs, place: Place) -> Result<u8> {
    let start = Instant::now();
    if place == Place::Foreground && !args.detach {
        stdio::check_terminal(args.interactive, args.tty)?;
    }
    let size = plan::vm_size(args.cpus, args.memory)?;
    let io_limits = args.io.limits(&args.allow_degraded)?;
    let artifacts = Artifacts::find()?;
    let stop_signal = args.stop_signal.as_deref().map(signals::parse).transpose()?;
    if !rustix::process::geteuid().is_root() {
        bail!("vmrun makes mounts and needs root: run it with sudo");
    }
    let mut options = args.open_options();
    if place == Place::Supervisor {
        // The caller has asked the registry.
        options.pull = PullPolicy::Missing;
    }
    let image = image::open(&args.image, &folders.data_root, options)?;
    if args.detach && place == Place::Foreground {
        return detach::launch();
    }
    let image_signal = image.stop_signal.as_deref().map(signals::parse).transpose()?;
    let stop_signal = stop_signal.or(image_signal).unwrap_or(signals::SIGTERM);
    let name = args.name.clone().unwrap_or_else(|| random_hex(6));
    let command = spec::command(&args, &image)?;
    let wanted = Wanted {
        name: &name,
        image: &args.image,
        command: &command,
        auto_remove: args.rm,
        degraded: &args.allow_degraded,
        io_limits: &io_limits,
    };
    let record = Record::create(folders, wanted)?;
    let run = Run { args, image, name, command, size, artifacts, stop_signal, place, start };
    tokio::task::LocalSet::new().run_until(run.own(record)).await
}

/// Everything that is known before the VM starts.
struct Run {
    args: RunArgs,
    image: Image,
    name: String,
    command: Vec<String>,
    size: VmSize,
    artifacts: Artifacts,
    stop_signal: u32,
    place: Place,
    start: Instant,
}

/// What goes into a VM.
struct Prepared {
    spec: Spec,
    tree: OwnedFd,
    shares: Vec<Share>,
    /// Of the host, by their names in the guest.
    sockets: Vec<(String, Volume)>,
    network: Network,
    at: Duration,
}

/// A command that runs.
struct Started {
    sandbox: Sandbox,
    tree: OwnedFd,
    sockets: Vec<(String, Volume)>,
    process: Process,
    copying: Copying,
    timing: String,
}

/// A command that does not run, and the exit status that says so.
struct NotStarted {
    exit_code: u8,
    error: anyhow::Error,
}

impl<E: Into<anyhow::Error>> From<E> for NotStarted {
    fn from(error: E) -> Self {
        Self { exit_code: EXIT_VMRUN_FAILED, error: error.into() }
    }
}

impl Run {
    /// From an empty record to an exited container, or to nothing.
    async fn own(self, record: Record) -> Result<u8> {
        match self.start(&record).await {
            Ok(started) => self.attend(record, started).await,
            Err(NotStarted { exit_code, error }) => {
                let said = detach::logged(&record.data_dir());
                record.remove()?;
                match self.place {
                    Place::Foreground => complain(&format!("{error:#}")),
                    Place::Supervisor => detach::report_failed(exit_code, &error, &said),
                }
                Ok(exit_code)
            }
        }
    }

    async fn start(&self, record: &Record) -> Result<Started, NotStarted> {
        if self.place == Place::Supervisor {
            detach::log_to(&record.data_dir())?;
        }
        let prepared = self.prepare(record)?;
        let console = self.args.console.then(|| io::stderr().as_fd().try_clone_to_owned()).transpose()?;
        let cgroup = record.create_cgroup(self.size).context(NO_CGROUP)?;
        let sandbox = Sandbox::boot(BootRequest {
            name: self.name.clone(),
            size: self.size,
            shares: prepared.shares,
            network: prepared.network,
            cgroup: cgroup.as_ref().map(HostCgroup::procs).transpose()?,
            console,
            artifacts: self.artifacts.clone(),
            deadline: BOOT_DEADLINE,
        })
        .await?;
        if cgroup.is_some_and(|cgroup| !cgroup.holds(sandbox.vmm_pid())) {
            sandbox.stop().await;
            return Err(anyhow!("the VMM did not join its cgroup").into());
        }
        record.update(|state| state.vmm_pid = Some(sandbox.vmm_pid()))?;
        match self.start_command(record, &sandbox, &prepared.spec, &prepared.sockets).await {
            Ok((copying, created)) => {
                let timing = self.timing(&sandbox, prepared.at, created);
                let process = prepared.spec.process().clone().unwrap_or_default();
                let Prepared { tree, sockets, .. } = prepared;
                Ok(Started { sandbox, tree, sockets, process, copying, timing })
            }
            Err(error) => {
                sandbox.stop().await;
                Err(error)
            }
        }
    }

    /// The root file system, with a directory for each volume of the image.
    fn rootfs_tree(&self, record: &Record) -> Result<OwnedFd> {
        let (image, scratch) = (&self.image, record.dir().scratch());
        let (layer_dir, writable) = (image.layer_dir.clone(), Some(record.data_dir()));
        let layers = |lower, writable| Rootfs::Layers { lower, layer_dir: layer_dir.clone(), writable };
        if !self.args.read_only {
            let tree = share::rootfs_tree(layers(image.layers.clone(), writable), &scratch)?;
            image.make_volumes(&tree)?;
            return Ok(tree);
        }
        let mut lower = image.layers.clone();
        if !image.volumes.is_empty() {
            // What is made now is the topmost layer of the read-only root.
            image.make_volumes(&share::rootfs_tree(layers(lower.clone(), writable), &scratch)?)?;
            lower.insert(0, record.data_dir().join("upper"));
        }
        let rootfs = match lower.as_slice() {
            [only] => Rootfs::Directory { path: layer_dir.join(only), read_only: true },
            _ => layers(lower, None),
        };
        Ok(share::rootfs_tree(rootfs, &scratch)?)
    }

    /// The spec and the trees that it needs.
    fn prepare(&self, record: &Record) -> Result<Prepared> {
        let (args, image, scratch) = (&self.args, &self.image, record.dir().scratch());
        let tree = self.rootfs_tree(record)?;
        let wanted = args.user.as_deref().or(image.user.as_deref()).filter(|user| !user.is_empty());
        let user = user::resolve(&tree, wanted.unwrap_or("0"))?;
        let spec = spec::container(args, image, &user, &self.name, &self.command)?;
        let named = |(number, socket)| (format!("s{number}"), socket);
        let sockets: Vec<(String, Volume)> = (0..).zip(socket::sockets(&spec)).map(named).collect();
        let guest_path = |(name, socket): &(String, Volume)| (socket.clone(), plan::guest_memory_volume(name));
        let in_guest = sockets.iter().map(guest_path).collect();
        let tags = ShareTags::only();
        let mut planned = plan::plan(spec, &tags, &in_guest)?;
        if args.init {
            plan::add_init(&mut planned.spec);
        }
        let mut shares = vec![Share::of_tree(&tags.rootfs, tree.try_clone()?, CachePolicy::Always)];
        for (share, volumes) in planned.volumes {
            shares.push(share::volumes_share(&tags, share, volumes, &scratch)?);
        }
        let mut network = network::create(args, self.size.vcpus, &record.data_dir())?;
        if image.bundle.is_none() && network::is_wished(args) {
            network::tell(args, &self.name, &mut network, &mut planned.spec, &tree);
        }
        Ok(Prepared { spec: planned.spec, tree, shares, sockets, network, at: self.start.elapsed() })
    }

    async fn start_command(
        &self,
        record: &Record,
        sandbox: &Sandbox,
        spec: &Spec,
        sockets: &[(String, Volume)],
    ) -> Result<(Copying, Duration), NotStarted> {
        record.write_spec(spec)?;
        for (name, socket) in sockets {
            sandbox.add_socket(name, &socket.source).await.map_err(|e| refused(e, "create"))?;
        }
        let terminal = self.args.tty.then(stdio::window_size);
        let wanted = WantedStreams { stdin: self.args.interactive, output: true, terminal };
        let streams = sandbox.create(&self.name, spec, wanted).await.map_err(|e| refused(e, "create"))?;
        let created = self.start.elapsed();
        let copying = self.copy_streams(record, streams)?;
        sandbox.start(&self.name).await.map_err(|e| refused(e, "start"))?;
        Ok((copying, created))
    }

    fn copy_streams(&self, record: &Record, streams: ProcessStreams) -> Result<Copying> {
        let log = match self.args.log.limits()? {
            Some(limits) => Some(Log::create(&record.data_dir(), limits).context("cannot make the log")?),
            None => None,
        };
        let raw = if self.args.tty && self.place == Place::Foreground { stdio::RawTerminal::enter()? } else { None };
        let mut copying = Copying { held_stdin: None, outputs: Vec::new(), _raw: raw };
        match (streams.stdin.map(blocking).transpose()?, self.place) {
            (Some(stdin), Place::Foreground) => stdio::copy_stdin(stdin)?,
            // Nobody writes to it, but it stays open.
            (stdin, _) => copying.held_stdin = stdin,
        }
        let outputs = [
            (streams.stdout, io::stdout().as_fd().try_clone_to_owned()?, Stream::Stdout),
            (streams.stderr, io::stderr().as_fd().try_clone_to_owned()?, Stream::Stderr),
        ];
        for (stream, output, name) in outputs {
            let output = Some(output).filter(|_| self.place == Place::Foreground);
            let log = log.clone().map(|log| LogStream::new(log, name));
            if let Some(stream) = stream.map(blocking).transpose()? {
                copying.outputs.push(stdio::copy_output(stream, stdio::Sink { output, log })?);
            }
        }
        Ok(copying)
    }

    /// Answers others and waits until the container is over; then keeps or removes its record.
    async fn attend(&self, record: Record, started: Started) -> Result<u8> {
        let Started { sandbox, tree, sockets, process, mut copying, timing } = started;
        let listener = control::listen(&record.control_socket())?;
        record.update(|state| {
            state.started_at_ms = Some(now_ms());
            state.status = Status::Running;
        })?;
        let init = ProcessId::init(&self.name);
        let container = Rc::new(Container::new(sandbox, record, init, process, tree, self.stop_signal));
        tokio::task::spawn_local(control::serve(listener, container.clone()));
        let followed = container.clone();
        tokio::task::spawn_local(async move { followed.sandbox.follow_network().await });
        let reporting = container.clone();
        tokio::task::spawn_local(async move { reporting.sandbox.report_free_pages().await });
        for (name, socket) in sockets {
            let served = container.clone();
            tokio::task::spawn_local(async move { served.sandbox.serve_socket(&name, &socket.source).await });
        }
        if self.place == Place::Supervisor
            && let Err(error) = detach::report_started(&self.name, self.args.timing.then(|| timing.clone()))
        {
            tracing::warn!(error = format!("{error:#}"), "the container is removed");
            container.kill().await;
        }
        let mut signals = Signals::listen()?;
        let mut ending = self.wait(&container, &mut signals).await;
        copying.finish(&container, &mut signals).await;
        container.sandbox.stop().await;
        container.sandbox.leave_network().await;
        drop(copying);
        let status = Status::Exited { exit_code: ending.exit_code, oom_killed: ending.oom_killed };
        if let Some(error) = &mut ending.error {
            if container.record.cgroup().is_some_and(|cgroup| cgroup.was_out_of_memory()) {
                error.push_str(OUT_OF_MEMORY);
            }
            complain(error);
        }
        if self.args.rm {
            container.record.remove()?
        } else {
            container.record.keep(status, ending.error)?
        }
        container.announce(ending.exit_code);
        // Somebody may have asked and not read the answer.
        let _ = tokio::time::timeout(ANSWER_DEADLINE, container.all_answered()).await;
        if self.args.timing && self.place == Place::Foreground {
            // Nobody may read it any more.
            let _ = io::stderr().write_all(timing.as_bytes());
        }
        Ok(ending.exit_code)
    }

    /// Waits for the command, passing signals and window sizes on.
    async fn wait(&self, container: &Rc<Container>, signals: &mut Signals) -> Ending {
        let ended = container.ended();
        let timeout = async {
            match self.args.timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(ended, timeout);
        let mut requests_to_end = 0;
        loop {
            let signal = tokio::select! {
                ending = &mut ended => return ending,
                () = &mut timeout => break,
                signal = signals.next() => signal,
            };
            requests_to_end += u32::from(signals::asks_to_end(signal));
            let container = container.clone();
            let (place, patience) = (self.place, Duration::from_secs(self.args.stop_timeout));
            // On the side: a guest that does not answer must not keep us from noticing its end.
            tokio::task::spawn_local(async move {
                let outcome = match signal {
                    signals::SIGWINCH => return pass_window_size(&container).await,
                    signal if signals::asks_to_end(signal) && requests_to_end >= PATIENCE => {
                        container.kill().await;
                        Ok(())
                    }
                    signal if place == Place::Supervisor && signals::asks_to_end(signal) => {
                        container.stop(None, patience).await
                    }
                    // Our terminal is gone, and the command's with it.
                    signals::SIGHUP => container.stop(Some(signals::SIGHUP), patience).await,
                    signal => container.signal(signal).await,
                };
                if let Err(error) = outcome {
                    tracing::warn!(error = format!("{error:#}"), signal, "a signal did not reach the command");
                }
            });
        }
        container.kill().await;
        let ending = ended.await;
        let error = Some(format!(
            "the command was killed after {} (--timeout)",
            humantime::format_duration(self.args.timeout.unwrap_or_default(),)
        ));
        Ending { exit_code: EXIT_TIMEOUT, error, ..ending }
    }

    fn timing(&self, sandbox: &Sandbox, prepared: Duration, created: Duration) -> String {
        let boot = sandbox.times();
        let stages = [
            (prepared, "image and shares ready"),
            (prepared + boot.spawn, "VMM spawned"),
            (prepared + boot.agent_ready, "guest booted, agent ready"),
            (prepared + boot.configured, "guest configured"),
            (created, "container created"),
            (self.start.elapsed(), "container started"),
        ];
        let lines = stages.map(|(at, stage)| format!("  {:>6}  {stage}\n", at.as_millis()));
        format!("start of {}, in ms since vmrun began:\n{}", self.name, lines.concat())
    }
}

async fn pass_window_size(container: &Container) {
    let (rows, columns) = stdio::window_size();
    container.resize(rows, columns).await;
}

fn refused(error: CallError, step: &'static str) -> NotStarted {
    match error {
        CallError::Refused { message, .. } => NotStarted {
            exit_code: spec::start_failure_code(&message),
            error: anyhow!("cannot start the command: {message}"),
        },
        other => anyhow::Error::from(other).context(format!("cannot {step} the container")).into(),
    }
}

fn blocking(stream: UnixStream) -> io::Result<std::os::unix::net::UnixStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// The copying of a container's streams, on threads of their own; our terminal is raw for as long.
struct Copying {
    held_stdin: Option<std::os::unix::net::UnixStream>,
    outputs: Vec<stdio::Output>,
    _raw: Option<stdio::RawTerminal>,
}

impl Copying {
    /// Waits until every byte is written, but not for a reader that stalls when the container is wanted dead.
    async fn finish(&mut self, container: &Container, signals: &mut Signals) {
        self.held_stdin = None;
        let outputs = std::mem::take(&mut self.outputs);
        let all = async {
            for output in outputs {
                output.finish().await;
            }
        };
        let impatient = async {
            tokio::select! {
                () = container.kill_asked() => tokio::time::sleep(DRAIN_DEADLINE).await,
                () = signals.asked_to_end() => {}
            }
        };
        tokio::select! {
            () = all => {}
            () = impatient => {}
        }
    }
}
