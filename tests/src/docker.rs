//! Debian's Docker on a [`Containerd`] of a story, in its room.

use std::fs::{self, File};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::containerd::{BUSYBOX, Containerd};
use crate::{Outcome, eventually, outcome};

/// Longest time until it answers.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// Longest time that a `docker` may take, in seconds: VMs start on an emulated host.
const DEADLINE_S: &str = "180";

/// The image of the README.
const README_IMAGE: &str = "docker.io/library/busybox:latest";

/// A running dockerd with the images [`BUSYBOX`] and [`README_IMAGE`]; ended when dropped.
pub struct Docker<'a> {
    containerd: &'a Containerd,
    daemon: Child,
}

impl<'a> Docker<'a> {
    /// Starts it.
    ///
    /// # Panics
    /// When it does not answer in time.
    #[must_use]
    pub fn start(containerd: &'a Containerd) -> Self {
        let path = |name: &str| containerd.path(name).display().to_string();
        let arguments = [
            ["--containerd", &path("run/containerd.sock")],
            ["--host", &format!("unix://{}", path("docker.sock"))],
            ["--data-root", &path("root/docker")],
            ["--exec-root", &path("docker")],
            ["--pidfile", &path("docker.pid")],
            ["--cgroup-parent", &format!("/{}", containerd.namespace())],
        ];
        let log = File::create(containerd.path("docker.log")).expect("a log");
        let mut command = containerd.command("dockerd", arguments.as_flattened());
        let daemon = command.stdout(Stdio::null()).stderr(log).spawn().expect("dockerd starts");
        let docker = Self { containerd, daemon };
        let socket = containerd.path("docker.sock");
        eventually(BOOT_DEADLINE, "dockerd listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
        let archive = containerd.path("image.tar");
        for name in [BUSYBOX, README_IMAGE] {
            crate::containerd::busybox_image().write_docker_archive(&archive, name);
            let _ = docker.run(&["load", "--input", archive.to_str().expect("a path of ours")]).success();
        }
        fs::remove_file(archive).expect("removed");
        docker
    }

    /// Runs `docker` with these arguments.
    #[must_use]
    pub fn run(&self, arguments: &[&str]) -> Outcome {
        let host = format!("unix://{}", self.containerd.path("docker.sock").display());
        let limited = ["--foreground", "--kill-after=5", DEADLINE_S, "docker", "--host", &host];
        outcome(self.containerd.command("timeout", &[&limited[..], arguments].concat()))
    }

    /// Runs a shell script that calls `docker`.
    #[must_use]
    pub fn shell(&self, script: &str) -> Outcome {
        let host = format!("unix://{}", self.containerd.path("docker.sock").display());
        outcome(
            self.containerd
                .command("env", &[&format!("DOCKER_HOST={host}"), "timeout", DEADLINE_S, "sh", "-c", script]),
        )
    }

    /// What it logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.containerd.path("docker.log")).unwrap_or_default()
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- dockerd ---\n{}", self.log());
        }
        kill_process(Pid::from_child(&self.daemon), Signal::TERM).expect("it runs");
        self.daemon.wait().expect("waited");
        // Docker keeps its bridge.
        let _ = outcome(self.containerd.command("ip", &["link", "del", "docker0"]));
    }
}
