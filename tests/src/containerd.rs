//! Debian's containerd of three releases, run as it is: own folders, own namespaces, own cgroup, and `ctr` of the same release.
//!
//! ```text
//!  tell ── for each check ──► Containerd ──► Room: mount and network namespace, cgroup, folder
//!                               ├─ daemon: containerd, killed and started again as a story wants
//!                               └─ ctr, images, events
//! ```
//! A story file has its checks told with each release. Whatever a check leaves behind (process, mount, cgroup, socket, state file)
//! fails it.

use std::fs::{self, File};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub use client::{Client, Process};
pub use events::{Event, Events};
pub use fifo::Streams;
pub(crate) use images::busybox_image;
pub use packages::Release;
use rustix::process::{Pid, Signal, kill_process};
pub use spec::process;
pub use tell::{Check, share_of, tell, tell_share};

use crate::{Outcome, eventually, outcome};

mod client;
mod config;
mod events;
mod fifo;
mod images;
mod left;
mod packages;
mod room;
mod spec;
mod tell;

use room::Room;

/// An image of busybox with `sh` as its command.
pub const BUSYBOX: &str = "example.org/busybox:1";
/// An image that sleeps, which the CRI plugin runs as a pod's first container.
pub const PAUSE: &str = "example.org/pause:1";
/// containerd's configuration, a path in the room.
const CONFIG: &str = "/etc/containerd/config.toml";
/// Longest time that a `ctr` may take, in seconds: VMs start on an emulated host.
const CTR_DEADLINE_S: &str = "180";
/// Longest time that containerd may take to boot, where another one may boot beside it.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);

/// A running containerd; ended when dropped, when nothing of it may be left.
pub struct Containerd {
    /// Which one.
    pub release: Release,
    room: Room,
    daemon: Option<Child>,
    boots: usize,
    serves_sandboxes: bool,
    is_scrap: bool,
    chain: String,
    tokio: tokio::runtime::Runtime,
}

impl Containerd {
    /// Starts one in folders of its own, with the images [`BUSYBOX`] and [`PAUSE`].
    ///
    /// # Panics
    /// When it does not boot; its log is printed.
    #[must_use]
    pub fn start(release: Release) -> Self {
        let room = Room::open();
        fs::write(room.path("etc/config.toml"), config::containerd(release, room.dir())).expect("configuration");
        fs::write(room.path("net.d/10-story.conflist"), config::NETWORK).expect("a network");
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let mut containerd = Self {
            release,
            room,
            daemon: None,
            boots: 0,
            serves_sandboxes: false,
            is_scrap: false,
            chain: String::new(),
            tokio,
        };
        containerd.boot();
        containerd.chain = containerd.import_busybox();
        containerd
    }

    /// The namespace of containerd in which the stories work, and the name of the cgroup that has the containers' below it. The
    /// cgroups of the host are not the room's own, so it is another one in each room.
    #[must_use]
    pub fn namespace(&self) -> String {
        self.room.namespace()
    }

    /// The runtime of the stories; another one proves that a story is right about containerd.
    #[must_use]
    pub fn runtime() -> String {
        std::env::var("STORY_RUNTIME").unwrap_or_else(|_| "io.containerd.vm.v2".to_owned())
    }

    /// A file of this containerd's folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.room.path(name)
    }

    /// The socket that it answers at.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.room.path("run/containerd.sock")
    }

    /// Its process id.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("containerd runs").id()
    }

    /// Processes of this containerd whose program has that name, containerd itself and `ctr` included.
    #[must_use]
    pub fn processes(&self, program: &str) -> Vec<u32> {
        self.room.processes().into_iter().filter(|pid| room::program(*pid) == program).collect()
    }

    /// Sends a signal to the only process of a program.
    ///
    /// # Panics
    /// When there is none, or more than one.
    pub fn signal(&self, program: &str, signal: Signal) {
        let found = self.processes(program);
        assert_eq!(found.len(), 1, "one {program}: {found:?}");
        let pid = i32::try_from(found[0]).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("it runs");
    }

    /// Does something in containerd's network namespace, on a thread of its own.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.room.inside(work)
    }

    /// A command in this containerd's namespaces and cgroup, which finds its programs first.
    #[must_use]
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = self.room.command(program, arguments);
        command.env("PATH", packages::path(self.release));
        command
    }

    /// `ctr` with these arguments.
    #[must_use]
    pub fn ctr_command(&self, arguments: &[&str]) -> Command {
        self.ctr_in(&self.namespace(), arguments)
    }

    /// Runs `ctr` to its end.
    #[must_use]
    pub fn ctr(&self, arguments: &[&str]) -> Outcome {
        outcome(self.ctr_command(arguments))
    }

    /// `ctr` in a namespace of containerd.
    fn ctr_in(&self, namespace: &str, arguments: &[&str]) -> Command {
        let socket = self.socket();
        let socket = socket.to_str().expect("a path of ours");
        let limited = ["--foreground", "--kill-after=5", CTR_DEADLINE_S, "ctr", "-a", socket, "-n", namespace];
        self.command("timeout", &[&limited[..], arguments].concat())
    }

    /// `ctr run OPTIONS IMAGE ID COMMAND` with the stories' runtime, to its end.
    #[must_use]
    pub fn run(&self, id: &str, options: &[&str], command: &[&str]) -> Outcome {
        outcome(self.run_command(id, &[&["--rm"], options].concat(), command))
    }

    /// As [`Self::run`], not yet started.
    #[must_use]
    pub fn run_command(&self, id: &str, options: &[&str], command: &[&str]) -> Command {
        let runtime = Self::runtime();
        let first = ["run", "--runtime", &runtime];
        self.ctr_command(&[&first, options, &[BUSYBOX, id], command].concat())
    }

    /// Mounts something for containerd and what it starts.
    ///
    /// # Panics
    /// When mount(8) fails.
    pub fn mount(&self, options: &[&str], source: &Path, target: &Path) {
        let paths = [source, target].map(|path| path.to_str().expect("a path of ours"));
        let _ = outcome(self.command("mount", &[options, &paths].concat())).success();
    }

    /// Undoes [`Self::mount`].
    ///
    /// # Panics
    /// When umount(8) fails.
    pub fn unmount(&self, targets: &[&Path]) {
        let targets: Vec<&str> = targets.iter().map(|path| path.to_str().expect("a path of ours")).collect();
        let _ = outcome(self.command("umount", &targets)).success();
    }

    /// Runs a future to its end.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.tokio.block_on(future)
    }

    /// A new connection to containerd's API.
    #[must_use]
    pub fn client(&self) -> Client {
        self.block_on(Client::connect(self))
    }

    /// Kills containerd with SIGKILL; what it started goes on.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("containerd runs");
        daemon.kill().expect("killed");
        daemon.wait().expect("waited");
    }

    /// Starts containerd, in place of one that was killed.
    ///
    /// # Panics
    /// When it does not boot; its log is printed.
    pub fn boot(&mut self) {
        let log = File::options().create(true).append(true).open(self.log()).expect("log");
        let mut command = self.command("containerd", &["--config", CONFIG]);
        if self.serves_sandboxes {
            command.env("ENABLE_CRI_SANDBOXES", "1");
        }
        let streams = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.daemon = Some(streams.spawn().expect("containerd starts"));
        self.boots += 1;
        let log = self.log();
        eventually(BOOT_DEADLINE, "containerd boots", || {
            let text = fs::read_to_string(&log).expect("log");
            text.matches("containerd successfully booted").count() == self.boots
        });
    }

    /// Makes the CRI plugin use the Sandbox API where a handler asks for it. containerd 1.7 has that in a second CRI server, which a
    /// variable of its environment turns on; containerd 2 has no other, and 1.6 none.
    ///
    /// # Panics
    /// As [`Self::boot`].
    pub fn serve_sandboxes(&mut self) {
        assert_ne!(self.release, Release::Bookworm, "containerd 1.6 has no Sandbox API");
        if self.release == Release::Trixie && !self.serves_sandboxes {
            self.serves_sandboxes = true;
            self.kill();
            self.boot();
        }
    }

    /// Where containerd and the runtimes log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.room.path("log")
    }

    /// Prints the end of the log and kills everything, for a check has failed: nothing is asserted then.
    pub fn scrap(mut self) {
        self.is_scrap = true;
        print_log(&self.log());
    }

    /// Asserts that no container is left, nor anything of one.
    ///
    /// # Panics
    /// When something is; the message names it.
    pub fn assert_idle(&self) {
        left::assert_idle(self, &self.room);
    }

    fn stop(&mut self) {
        let Some(mut daemon) = self.daemon.take() else { return };
        kill_process(Pid::from_child(&daemon), Signal::TERM).expect("it runs");
        daemon.wait().expect("waited");
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if self.is_scrap || std::thread::panicking() {
            self.room.kill_all();
            if let Some(mut daemon) = self.daemon.take() {
                // Killed above.
                let _ = daemon.wait();
            }
            return;
        }
        self.assert_idle();
        self.stop();
        left::assert_gone(&self.room);
    }
}

/// The end of a log, without what containerd says about every request.
fn print_log(path: &Path) {
    const MAX_LINES: usize = 150;
    let log = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = log.lines().filter(|line| !line.contains("level=info msg=\"loading plugin")).collect();
    println!("--- {} ---\n{}", path.display(), lines[lines.len().saturating_sub(MAX_LINES)..].join("\n"));
}
