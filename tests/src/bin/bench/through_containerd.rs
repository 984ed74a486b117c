//! Containers through containerd, by the calls that `ctr` makes: a start of `ctr` alone takes a second on an emulated host. What is
//! counted is time, in microseconds, so only ratios of one run say something.

use std::fs::File;
use std::io::Read;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use tests::containerd::{Client, Containerd, Process, Release, Streams};

use crate::counts::Counts;
use crate::memory::{self, HostProcess};

/// Programs of a pod, and what they are called here.
const OF_A_POD: [(&str, &str); 2] = [("containerd-shim-vm-v2", "shim"), ("vmm", "vmm")];
const SLEEP: [&str; 2] = ["sleep", "100000"];

/// A containerd for the whole bench.
pub(crate) struct ThroughContainerd(Containerd);

impl ThroughContainerd {
    pub(crate) fn start() -> Self {
        Self(Containerd::start(Release::Sid))
    }

    /// From the request for a container to the first byte that it writes.
    pub(crate) fn first_output(&self) -> Result<Counts> {
        let streams = Streams::unread(&self.0.path(""), "bench");
        let (stdout, _errors) = (streams.stdout(), streams.stderr_reader());
        let started = Instant::now();
        let first = std::thread::spawn(move || first_byte(File::open(stdout)?, started));
        let client = self.0.client();
        self.0.block_on(async {
            let mut task = client.create_with("bench", &["echo", "x"], streams, |_| {}).await?;
            let ended = async {
                task.start().await?;
                task.wait().await
            };
            let exit_status = ended.await;
            removed(task).await?;
            ensure!(exit_status? == 0, "echo failed");
            Ok(())
        })?;
        first.join().ok().context("the reader of the output panicked")?
    }

    /// `true` in a container of `runtime` that runs beside another, for the second time there; and what the processes of our idle pod have.
    pub(crate) fn exec(&self, runtime: &str) -> Result<Counts> {
        let mut client = self.0.client();
        runtime.clone_into(&mut client.runtime);
        self.0.block_on(async {
            let mut neighbour = client.create("neighbour", &SLEEP, |_| {}).await?;
            let counts = self.beside(&mut neighbour, &client).await;
            removed(neighbour).await?;
            counts
        })
    }

    async fn beside(&self, neighbour: &mut Process, client: &Client) -> Result<Counts> {
        neighbour.start().await?;
        let others = self.of_pods();
        let mut task = client.create("bench", &SLEEP, |_| {}).await?;
        let counts = self.execs(&mut task, &others).await;
        removed(task).await?;
        counts
    }

    async fn execs(&self, task: &mut Process, others: &[HostProcess]) -> Result<Counts> {
        task.start().await?;
        task.run("first", &["true"]).await;
        let mut of_pod = self.of_pods();
        of_pod.retain(|process| others.iter().all(|other| other.pid != process.pid));
        let mut counts = memory::measure(&of_pod)?;
        let started = Instant::now();
        let (exit_status, _) = task.run("second", &["true"]).await;
        ensure!(exit_status == 0, "true failed");
        counts.insert("exec us".to_owned(), micros_since(started));
        Ok(counts)
    }

    fn of_pods(&self) -> Vec<HostProcess> {
        let processes = OF_A_POD.into_iter().flat_map(|(name, program)| {
            self.0.processes(name).into_iter().map(move |pid| HostProcess { program, pid })
        });
        processes.collect()
    }
}

/// Until the first byte.
pub(crate) fn first_byte(mut output: impl Read, started: Instant) -> Result<Counts> {
    output.read_exact(&mut [0]).context("no output came")?;
    Ok([("first output us".to_owned(), micros_since(started))].into())
}

async fn removed(task: Process) -> Result<()> {
    // An error says that it has ended.
    let _ = task.kill(9).await;
    task.wait().await?;
    task.remove().await?;
    Ok(())
}

fn micros_since(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX)
}
