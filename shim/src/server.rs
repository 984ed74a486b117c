//! The server of one pod: takes the socket over from its launcher, answers containerd, and ends when it is not needed any more.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};
use containerd_shim_protos::sandbox_async::create_sandbox;
use sandbox::cgroup::HostCgroup;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::arguments::Arguments;
use crate::config::Config;
use crate::pod::Pod;
use crate::record::Record;
use crate::sandbox_service::SandboxService;
use crate::service;
use crate::stdio::NONBLOCK;

/// Time for the last events and answers, before the process ends.
const FLUSH_DEADLINE: Duration = Duration::from_secs(2);
/// Time for the answer to ShutdownSandbox to be read. containerd's client takes a connection that closes right behind an answer for one
/// that closed without.
const ANSWER_IS_READ: Duration = Duration::from_millis(200);
/// Threads that answer. One could be held up by the kernel, and a kill must not wait for it.
const WORKERS: usize = 2;

/// Answers until the pod is gone.
pub(crate) fn serve(arguments: Arguments) -> Result<()> {
    let bundle = arguments.bundle()?;
    // Of the launcher's session and terminal nothing is ours. It fails for a leader, which has one of its own.
    let _ = rustix::process::setsid();
    let config = Config::load()?;
    log_to(&bundle, &arguments, &config).context("cannot open the log")?;
    let listener = io::stdin().as_fd().try_clone_to_owned().context("cannot take the socket")?;
    let null = File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("cannot let go of standard input")?;
    Record::of(None).and_then(|record| record.write(&bundle)).context("cannot write down our process")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    let pod = Arc::new(Pod::new(arguments.id.clone(), arguments.namespace.clone(), bundle.clone(), config));
    let outcome = runtime.block_on(answer(&arguments, &pod, listener));
    if let Err(error) = &outcome {
        tracing::error!(error = format!("{error:#}"), "the server ends");
    }
    if let Some(cgroup) = Record::read(&bundle).and_then(|record| record.cgroup) {
        // Of a VM that did not come to be: there is nobody whose end would remove it, and without the record nobody knows of it.
        HostCgroup::at(cgroup).remove_when_empty();
    }
    Record::remove(&bundle);
    // Last, because containerd ends a server that stays.
    let outcome = outcome.map(|server| runtime.block_on(hang_up(server, &pod)));
    // A thread may be held up by a file system that does not answer.
    runtime.shutdown_background();
    outcome
}

/// Answers until nobody needs the pod any more; who is connected stays so.
async fn answer(arguments: &Arguments, pod: &Arc<Pod>, listener: OwnedFd) -> Result<Server> {
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    let listener = Listener::from(tokio::net::UnixListener::from_std(listener)?);
    if let Ok(address) = std::env::var("TTRPC_ADDRESS") {
        tokio::spawn(pod.events.clone().forward_to(address));
    }
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(service::services(pod))
        .register_service(create_sandbox(Arc::new(SandboxService(pod.clone()))));
    server.start().await.context("cannot answer")?;
    tracing::info!(pod = pod.id, version = env!("CARGO_PKG_VERSION"), "ready");
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        () = pod.shutdown.notified() => {}
        _ = term.recv() => tracing::info!("SIGTERM"),
        _ = int.recv() => tracing::info!("SIGINT"),
    }
    // Nobody new; those who are connected get their answers.
    if let Err(error) = fs::remove_file(&arguments.socket) {
        tracing::debug!(%error, "the socket is gone");
    }
    pod.stop_vm().await;
    let _ = tokio::time::timeout(FLUSH_DEADLINE, pod.events.flushed()).await;
    Ok(server)
}

/// Closes the connections when their answers are sent.
async fn hang_up(mut server: Server, pod: &Pod) {
    if pod.is_sandbox() {
        tokio::time::sleep(ANSWER_IS_READ).await;
    }
    let _ = tokio::time::timeout(FLUSH_DEADLINE, server.shutdown()).await;
}

/// Logs to the FIFO that containerd reads. We open it for both directions: it waits for nobody, and breaks with nobody. What
/// finds it full is dropped.
fn log_to(bundle: &Path, arguments: &Arguments, config: &Config) -> Result<()> {
    let fifo = OpenOptions::new().read(true).write(true).custom_flags(NONBLOCK).open(bundle.join("log"));
    let log = match fifo {
        Ok(fifo) => fifo,
        Err(error) if error.kind() == io::ErrorKind::NotFound => OpenOptions::new().write(true).open("/dev/null")?,
        Err(error) => return Err(error.into()),
    };
    // For what a panic says.
    rustix::stdio::dup2_stderr(&log)?;
    let level = if arguments.debug { "debug" } else { &config.log.level };
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(level).context("log.level")?)
        .with_ansi(false)
        .with_writer(Log(Arc::new(Mutex::new(log))))
        .log_internal_errors(false)
        .init();
    Ok(())
}

/// A log that a full FIFO does not stop.
#[derive(Clone)]
struct Log(Arc<Mutex<File>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // A line is shorter than PIPE_BUF or not told whole; either way nobody is told less than we can.
        let _ = file.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
