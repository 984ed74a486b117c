//! What is compared: each function runs one thing once and returns its counts. All have the same root file system and the same
//! command, `/marker`, but QEMU, which has our kernel and agent alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tests::Story;
use tests::lan::{Lan, Netns, ip};

use crate::counts::{self, Counts};
use crate::memory;
use crate::through_containerd::{ThroughContainerd, first_byte};
use crate::trace::Trace;

/// The kernel's parameters, as the VMM gives them but for the console and the way to reset: this machine has neither.
const QEMU_COMMAND_LINE: &str = "quiet loglevel=1 reboot=t panic=-1 tsc=reliable no_timer_check noreplace-smp \
     random.trust_cpu=on cryptomgr.notests";
/// With what the VM has beside: 128 MiB.
const SMALL_MEMORY: &str = "32m";
/// A guest has said by then which of its pages are free.
const REST: Duration = Duration::from_secs(15);
/// More of an interface in the second of two runs that are compared.
const MORE_ADDRESSES: u64 = 16;

/// Where the runs take place.
pub(crate) struct Subjects {
    story: Story,
    trace: Trace,
    bundle: PathBuf,
    initramfs: PathBuf,
    lan: Lan,
    pub(crate) containerd: ThroughContainerd,
}

impl Subjects {
    /// Makes the root file system and a bundle of it.
    pub(crate) fn create(marker: &Path, initramfs: PathBuf) -> Result<Self> {
        let story = Story::new();
        fs::copy(marker, story.rootfs().join("marker")).context("copy the command")?;
        let bundle = story.volume();
        bundle_of(&story.rootfs(), &bundle)?;
        let trace = Trace::create().context("make an instance of tracefs: the bench needs root")?;
        Ok(Self { story, trace, bundle, initramfs, lan: Lan::enter(), containerd: ThroughContainerd::start() })
    }

    /// `vmrun run`.
    pub(crate) fn vmrun_run(&self) -> Result<Counts> {
        let image = self.story.image();
        self.record(&[], &self.story.vmrun(&["run", "--rm", &image, "/marker"]))
    }

    /// `vmrun run` without a trace, until it writes.
    pub(crate) fn vmrun_output(&self) -> Result<Counts> {
        let image = self.story.image();
        let mut command = self.story.vmrun(&["run", "--rm", &image, "echo", "x"]);
        let started = Instant::now();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let counts = first_byte(child.stdout.take().context("no pipe")?, started);
        ensure!(child.wait()?.success(), "vmrun run failed");
        counts
    }

    /// `vmrun exec` in a container that has rested, for the second time there.
    pub(crate) fn vmrun_exec(&self) -> Result<Counts> {
        let _container = Detached::start(&self.story, "bench", &[])?;
        thread::sleep(REST);
        let exec = ["exec", "bench", "/marker"];
        succeed(&self.story, &exec)?;
        let processes = memory::processes_of(&self.story)?;
        let tids: Vec<u32> = processes.iter().flat_map(|process| process.tids()).collect();
        self.record(&tids, &self.story.vmrun(&exec))
    }

    /// What an address of a pod's interface costs `vmrun run` in system calls of the host.
    pub(crate) fn address(&self) -> Result<Counts> {
        let netns = pod_namespace(&self.lan);
        let few = self.calls_in(&netns)?;
        for number in 0..MORE_ADDRESSES {
            netns.ip(&format!("addr add 10.88.1.{number}/32 dev eth0"));
        }
        let more = self.calls_in(&netns)?.saturating_sub(few);
        Ok([("system calls for an address".to_owned(), more.div_ceil(MORE_ADDRESSES))].into())
    }

    /// System calls of `vmrun run` with the network of a namespace; those of the VMM follow the exits, which differ from run to run.
    fn calls_in(&self, netns: &Netns) -> Result<u64> {
        let network = format!("netns:{}", netns.path().display());
        let run = ["run", "--rm", "--network", &network, &self.story.image(), "/marker"];
        let counts = self.record(&[], &self.story.vmrun(&run))?;
        counts.get("run.system calls.vmrun").copied().context("no system call was seen")
    }

    /// Idle VMs of 128 MiB: what the second has beside the first, without which the pages of all files were its own, and what one
    /// more takes of the host's memory, with all that the kernel keeps for it.
    pub(crate) fn vmrun_idle(&self) -> Result<Counts> {
        let mut containers = Vec::new();
        let mut used = Vec::new();
        let mut counts = Counts::new();
        for name in ["other", "bench", "third", "fourth", "fifth"] {
            containers.push(Detached::start(&self.story, name, &["--memory", SMALL_MEMORY])?);
            thread::sleep(REST);
            used.push(memory::used_kib()?);
            if name == "bench" {
                counts = memory::measure(&memory::processes_of(&self.story)?)?;
            }
        }
        counts.insert("idle.used KiB".to_owned(), memory::rise(&used));
        Ok(counts)
    }

    /// QEMU's microvm with our kernel and agent, until the agent dials the host: there is no vsock, so it resets then.
    pub(crate) fn qemu(&self) -> Result<Counts> {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "microvm,pit=off,pic=off,rtc=off,isa-serial=off,auto-kernel-cmdline=off", "-accel", "kvm"]);
        command.args(["-cpu", "host", "-smp", "1", "-m", "608", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-no-reboot", "-append", QEMU_COMMAND_LINE]);
        let kernel = std::env::var("VMRUN_KERNEL").context("VMRUN_KERNEL is not set")?;
        command.args(["-kernel", &kernel, "-initrd"]).arg(&self.initramfs);
        self.record(&[], &command)
    }

    /// `runc run` or `crun run`.
    pub(crate) fn oci(&self, runtime: &str) -> Result<Counts> {
        let mut command = Command::new(runtime);
        command.args(["run", "--bundle"]).arg(&self.bundle).arg("bench");
        self.record(&[], &command)
    }

    /// Runs a command to its end while it and the threads `tids` are recorded.
    fn record(&self, tids: &[u32], command: &Command) -> Result<Counts> {
        let words: Option<Vec<&str>> =
            [command.get_program()].into_iter().chain(command.get_args()).map(|word| word.to_str()).collect();
        let words = words.context("a path is not UTF-8")?;
        self.trace.begin(tids)?;
        let output = self.trace.recorded(&words).stdin(Stdio::null()).output();
        let events = self.trace.end()?;
        let Output { status, stderr, .. } = output?;
        ensure!(status.success(), "{} ended with {status}: {}", words[0], String::from_utf8_lossy(&stderr));
        Ok(counts::count(&events))
    }
}

/// A network namespace with a veth interface `eth0` and one address, as CNI's plugins leave it.
fn pod_namespace(lan: &Lan) -> Netns {
    let netns = lan.netns();
    ip(&format!("link add bench-host type veth peer name eth0 netns {}", netns.name()));
    ip("link set bench-host up");
    netns.ip("addr add 10.88.0.2/24 dev eth0\nlink set eth0 up");
    netns
}

/// A container that sleeps.
struct Detached<'a> {
    story: &'a Story,
    name: &'static str,
}

impl<'a> Detached<'a> {
    fn start(story: &'a Story, name: &'static str, options: &[&str]) -> Result<Self> {
        let image = story.image();
        let run = [&["run", "--detach", "--name", name], options, &[&image, "sleep", "100000"]].concat();
        succeed(story, &run)?;
        Ok(Self { story, name })
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        // What is left of it fails the next start, by its name.
        let _ = self.story.call(&["rm", "--force", self.name]);
    }
}

fn succeed(story: &Story, arguments: &[&str]) -> Result<()> {
    let outcome = story.call(arguments);
    ensure!(outcome.code == 0, "{arguments:?} failed: {outcome:?}");
    Ok(())
}

/// Has runc write a bundle of `rootfs` that runs `/marker`.
fn bundle_of(rootfs: &Path, bundle: &Path) -> Result<()> {
    if !Command::new("runc").args(["spec", "--bundle"]).arg(bundle).status()?.success() {
        bail!("runc spec failed");
    }
    let path = bundle.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    spec["process"]["args"] = ["/marker"].as_slice().into();
    spec["process"]["terminal"] = false.into();
    spec["root"]["path"] = rootfs.to_str().context("a path is not UTF-8")?.into();
    Ok(fs::write(&path, serde_json::to_vec(&spec)?)?)
}
