//! `vmrun run`: one container in one microVM, owned by this process from beginning to end.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use sandbox::artifacts::Artifacts;
use sandbox::plan::{self, ROOTFS_TAG, VOLUMES_TAG};
use sandbox::share::{self, Rootfs};
use sandbox::state::{State, StateDir, Status};
use sandbox::{BootRequest, CachePolicy, CallError, ProcessId, ProcessStreams, Sandbox, WantedStreams};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::RunArgs;
use crate::{control, image, spec, stdio, user};

/// Time that a guest has to boot. Generous: an emulated host takes seconds.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);

pub(crate) async fn run(root: &Path, data_root: &Path, args: RunArgs) -> Result<u8> {
    let start = Instant::now();
    let size = plan::vm_size(args.cpus, args.memory)?;
    let artifacts = Artifacts::find()?;
    if !rustix::process::geteuid().is_root() {
        bail!("vmrun makes mounts and needs root: run it with sudo");
    }
    let image = image::open(&args.image, data_root, args.open_options())?;
    let name = args.name.clone().unwrap_or_else(generated_name);
    let dir = StateDir::create(root, &name)?;
    let written = WrittenFiles(data_root.join("containers").join(&name));
    let mut state = State {
        name: name.clone(),
        image: args.image.clone(),
        command: spec::command(&args, &image)?,
        created_at: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
        owner_pid: std::process::id(),
        vmm_pid: None,
        status: Status::Creating,
    };
    let outcome = async {
        dir.write(&state)?;
        let writable = if args.read_only { None } else { Some(written.0.clone()) };
        let rootfs = if image.layers.len() == 1 && args.read_only {
            Rootfs::Directory { path: image.layer_dir.join(&image.layers[0]), read_only: true }
        } else {
            Rootfs::Layers { lower: image.layers.clone(), layer_dir: image.layer_dir.clone(), writable }
        };
        let tree = share::rootfs_tree(rootfs, &dir.scratch())?;
        image.make_volumes(&tree, args.read_only)?;
        let user = user::resolve(
            &tree,
            args.user.as_deref().or(image.user.as_deref()).filter(|u| !u.is_empty()).unwrap_or("0"),
        )?;
        let planned = plan::plan(spec::container(&args, &image, &user, &name, &state.command)?)?;
        let mut shares = vec![(ROOTFS_TAG.to_owned(), tree, CachePolicy::Always)];
        if !planned.volumes.is_empty() {
            let volumes = share::volumes_tree(planned.volumes, &dir.scratch())?;
            shares.push((VOLUMES_TAG.to_owned(), volumes, CachePolicy::Auto));
        }
        let prepared = start.elapsed();
        let console = args.console.then(|| io::stderr().as_fd().try_clone_to_owned()).transpose()?;
        let request = BootRequest { name: name.clone(), size, shares, console, artifacts, deadline: BOOT_DEADLINE };
        let sandbox = Rc::new(Sandbox::boot(request).await?);
        state.vmm_pid = Some(sandbox.vmm_pid());
        let booted = Booted { sandbox: sandbox.clone(), name: &name, args: &args, dir: &dir, start, prepared };
        let outcome = tokio::task::LocalSet::new().run_until(booted.run_container(&planned.spec, &mut state)).await;
        sandbox.stop().await;
        outcome
    }
    .await;
    dir.remove()?;
    outcome
}

/// A sandbox that is up, with what its container needs.
struct Booted<'a> {
    sandbox: Rc<Sandbox>,
    name: &'a str,
    args: &'a RunArgs,
    dir: &'a StateDir,
    start: Instant,
    prepared: Duration,
}

impl Booted<'_> {
    async fn run_container(&self, spec: &oci_spec::runtime::Spec, state: &mut State) -> Result<u8> {
        let terminal = self.args.tty.then(stdio::window_size);
        let wanted = WantedStreams { stdin: self.args.interactive, output: true, terminal };
        let created = self.sandbox.create(self.name, spec, wanted).await;
        let streams = match created {
            Ok(streams) => streams,
            Err(CallError::Refused { message, .. }) => return Ok(spec::report_start_failure(&message)),
            Err(error) => return Err(error).context("cannot create the container"),
        };
        let created_at = self.start.elapsed();
        let raw = if self.args.tty { stdio::RawTerminal::enter()? } else { None };
        let threads = copy_streams(streams)?;
        if let Err(error) = self.sandbox.start(self.name).await {
            drop(raw);
            return match error {
                CallError::Refused { message, .. } => Ok(spec::report_start_failure(&message)),
                other => Err(other).context("cannot start the container"),
            };
        }
        let started_at = self.start.elapsed();
        state.status = Status::Running;
        self.dir.write(state)?;
        let socket = self.dir.path().join("control.sock");
        let (sandbox, name) = (self.sandbox.clone(), self.name.to_owned());
        tokio::task::spawn_local(async move {
            if let Err(error) = control::serve(&socket, sandbox, name).await {
                tracing::warn!(error = format!("{error:#}"), "the control socket is not served");
            }
        });
        let code = self.wait().await?;
        tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| drop(thread.join()))).await?;
        drop(raw);
        if self.args.timing {
            self.print_times(created_at, started_at);
        }
        Ok(code)
    }

    /// Waits for the command, passing signals and window sizes on.
    async fn wait(&self) -> Result<u8> {
        let id = ProcessId::init(self.name);
        let exit = self.sandbox.wait(&id);
        tokio::pin!(exit);
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut quit = signal(SignalKind::quit())?;
        let mut window = signal(SignalKind::window_change())?;
        loop {
            let signal = tokio::select! {
                exit = &mut exit => {
                    let exit = exit.context("lost the container")?;
                    return Ok(u8::try_from(exit.exit_code).unwrap_or(u8::MAX));
                }
                exit = self.sandbox.ended() => bail!("the VM ended while the command ran: {}", exit.reason),
                _ = interrupt.recv() => SignalKind::interrupt(),
                _ = terminate.recv() => SignalKind::terminate(),
                _ = hangup.recv() => SignalKind::hangup(),
                _ = quit.recv() => SignalKind::quit(),
                _ = window.recv() => {
                    let (rows, columns) = stdio::window_size();
                    drop(self.sandbox.resize(&id, rows, columns).await);
                    continue;
                }
            };
            let number = u32::try_from(signal.as_raw_value()).unwrap_or_default();
            if let Err(error) = self.sandbox.signal(&id, number, false).await {
                tracing::warn!(%error, "a signal did not reach the command");
            }
        }
    }

    fn print_times(&self, created: Duration, started: Duration) {
        let boot = self.sandbox.times();
        let at = |d: Duration| (self.prepared + d).as_millis();
        eprintln!("start of {}, in ms since vmrun began:", self.name);
        eprintln!("  {:>6}  image and shares ready", self.prepared.as_millis());
        eprintln!("  {:>6}  VMM spawned", at(boot.spawn));
        eprintln!("  {:>6}  guest booted, agent ready", at(boot.agent_ready));
        eprintln!("  {:>6}  guest configured", at(boot.configured));
        eprintln!("  {:>6}  container created", created.as_millis());
        eprintln!("  {:>6}  container started", started.as_millis());
    }
}

fn copy_streams(streams: ProcessStreams) -> Result<Vec<std::thread::JoinHandle<()>>> {
    let blocking = |stream: tokio::net::UnixStream| -> io::Result<_> {
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    };
    if let Some(stdin) = streams.stdin {
        stdio::copy_stdin(blocking(stdin)?)?;
    }
    let mut threads = Vec::new();
    if let Some(stdout) = streams.stdout {
        threads.push(stdio::copy_output(blocking(stdout)?, io::stdout().as_fd())?);
    }
    if let Some(stderr) = streams.stderr {
        threads.push(stdio::copy_output(blocking(stderr)?, io::stderr().as_fd())?);
    }
    Ok(threads)
}

/// What a container wrote, removed with it.
struct WrittenFiles(PathBuf);

impl Drop for WrittenFiles {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.0.display(), %error, "cannot remove what the container wrote");
        }
    }
}

/// Twelve hexadecimal digits, as Docker's short ids.
fn generated_name() -> String {
    let mut bytes = [0_u8; 6];
    // getrandom(2) gives up to 256 bytes whole.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
