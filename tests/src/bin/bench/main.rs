//! Counts what the start of a container costs: `vmrun` and its peers in turn, round after round, in one boot of a KVM host.
//! Called by `tests/bench/start`; the counts and their noise are explained in `tests/bench/README.md`.

mod counts;
mod memory;
mod report;
mod subjects;
mod through_containerd;
mod trace;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Parser;

use counts::Counts;
use report::Samples;
use subjects::Subjects;

#[derive(Parser)]
struct Cli {
    /// The compiled `tests/bench/marker.rs`.
    #[arg(long)]
    marker: PathBuf,
    /// The agent as an initramfs, for QEMU.
    #[arg(long)]
    initramfs: PathBuf,
    /// Where the counts of each run go.
    #[arg(long)]
    json: PathBuf,
    #[arg(long, default_value_t = 3)]
    rounds: u32,
}

/// An emulated host loses a guest now and then: tests/kvm-host/README.md, Limits.
const ATTEMPTS: u32 = 4;

/// Runs a subject once.
type Run = fn(&Subjects) -> Result<Counts>;

const SUBJECTS: [(&str, Run); 11] = [
    ("vmrun run", Subjects::vmrun_run),
    ("qemu", Subjects::qemu),
    ("vmrun exec", Subjects::vmrun_exec),
    ("vmrun idle", Subjects::vmrun_idle),
    ("runc", |subjects| subjects.oci("runc")),
    ("crun", |subjects| subjects.oci("crun")),
    ("vmrun address", Subjects::address),
    ("vmrun output", Subjects::vmrun_output),
    ("containerd output", |subjects| subjects.containerd.first_output()),
    ("containerd exec", |subjects| subjects.containerd.exec("io.containerd.vm.v2")),
    ("containerd exec, runc", |subjects| subjects.containerd.exec("io.containerd.runc.v2")),
];

fn main() -> Result<()> {
    let cli = Cli::parse();
    let subjects = Subjects::create(&cli.marker, cli.initramfs)?;
    // What is read for the first time comes from the disk.
    for (name, run) in SUBJECTS {
        counted(name, run, &subjects)?;
    }
    let mut samples = Samples::new();
    for _ in 0..cli.rounds {
        for (name, run) in SUBJECTS {
            samples.entry(name).or_default().push(counted(name, run, &subjects)?);
        }
    }
    print!("{}", report::markdown(&samples));
    fs::write(&cli.json, serde_json::to_vec_pretty(&samples)?).context("write the JSON")
}

fn counted(name: &str, run: Run, subjects: &Subjects) -> Result<Counts> {
    let mut attempt = 1;
    loop {
        match run(subjects) {
            Err(error) if attempt < ATTEMPTS => eprintln!("{name}, attempt {attempt}: {error:#}"),
            outcome => return outcome.with_context(|| name.to_owned()),
        }
        attempt += 1;
    }
}
