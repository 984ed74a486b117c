//! The harness of the stories: a root file system to run, `vmrun` with its own folders, and a look at what is left.
//!
//! Stories run where KVM can run guests (`tests/on-kvm`), as root. Each has folders of its own; nothing sleeps.

mod terminal;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;
pub use terminal::Terminal;

pub mod containerd;
pub mod cri;
pub mod dns;
pub mod docker;
pub mod echo;
pub mod escape;
pub mod guest;
pub mod image;
pub mod iperf;
pub mod lan;
pub mod liar;
pub mod mounted;
pub mod pair;
pub mod pod;
pub mod python;
pub mod registry;
pub mod scorecard;

/// One story: folders and a root file system, removed at its end, when nothing else of its containers may be left.
pub struct Story {
    dir: TempDir,
}

impl Default for Story {
    fn default() -> Self {
        Self::new()
    }
}

impl Story {
    /// Makes the folders.
    ///
    /// # Panics
    /// When the host cannot run stories; the message says what is missing.
    #[must_use]
    pub fn new() -> Self {
        assert!(Path::new("/dev/kvm").exists(), "stories need KVM: run them with `make test`, which uses tests/on-kvm");
        hold_programs();
        let dir = tempfile::Builder::new().prefix("story-").tempdir_in("/tmp").expect("a temporary folder");
        let rootfs = dir.path().join("rootfs");
        for folder in ["bin", "dev", "etc", "proc", "sys", "tmp", "root"] {
            fs::create_dir_all(rootfs.join(folder)).expect("a folder of the root file system");
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox-static is installed");
        for command in applets() {
            symlink("busybox", rootfs.join("bin").join(command)).expect("a link to busybox");
        }
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")
            .expect("passwd");
        fs::write(rootfs.join("etc/group"), "root:x:0:\nuser:x:1000:\n").expect("group");
        for folder in ["volume", "scratch"] {
            fs::create_dir(dir.path().join(folder)).expect("a folder of the story");
        }
        Self { dir }
    }

    /// Puts a program of the host into `/opt` of the root file system, and the libraries that it is linked to where the host has them.
    ///
    /// # Panics
    /// When one is not there.
    pub fn add_program(&self, path: &str) {
        let mut ldd = Command::new("ldd");
        ldd.arg(path);
        let listed = outcome(ldd);
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, and the loader without an arrow.
        let libraries = listed.success().split_whitespace().filter(|word| word.starts_with('/'));
        let name = Path::new(path).file_name().expect("a name").to_str().expect("text");
        let program = format!("opt/{name}");
        for (file, inside) in libraries.map(|file| (file, file.trim_start_matches('/'))).chain([(path, &*program)]) {
            let copy = self.rootfs().join(inside);
            fs::create_dir_all(copy.parent().expect("a folder")).expect("a folder of the root file system");
            fs::copy(file, copy).expect("the host has it");
        }
    }

    /// A folder of the host for sharing.
    #[must_use]
    pub fn volume(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    /// The argument of `-v` by which that folder is `/mnt` of a container.
    #[must_use]
    pub fn volume_at_mnt(&self) -> String {
        format!("{}:/mnt", self.volume().display())
    }

    /// The root file system.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    /// An empty folder to mount on.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.dir.path().join("scratch")
    }

    /// Where `vmrun` keeps images.
    #[must_use]
    pub fn data_root(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The cgroup of the host that has those of this story's VMs.
    fn cgroup_parent(&self) -> String {
        format!("/vmrun-{}", self.dir.path().file_name().expect("a name").to_string_lossy())
    }

    /// Runs `vmrun` to its end.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn finish(&self, arguments: &[&str]) -> Outcome {
        outcome(self.vmrun(arguments))
    }

    /// The image of this story's root file system.
    #[must_use]
    pub fn image(&self) -> String {
        format!("rootfs:{}", self.rootfs().display())
    }

    /// `vmrun` with this story's folders and these arguments. A container that asks for no memory gets less than `vmrun` would give it:
    /// a guest initialises a descriptor of each page at boot, which takes a twentieth of the emulated host's time for a short one.
    #[must_use]
    pub fn vmrun(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("VMRUN").expect("VMRUN names the program: use `make test`"));
        command.arg("--root").arg(self.dir.path().join("run")).arg("--data-root").arg(self.dir.path().join("data"));
        command.arg("--cgroup-parent").arg(self.cgroup_parent());
        match arguments {
            ["run", options @ ..] if !options.contains(&"--memory") => {
                command.args(["run", "--memory", "128m"]).args(options)
            }
            arguments => command.args(arguments),
        };
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command in a new container of this story's root file system.
    #[must_use]
    pub fn run(&self, options: &[&str], command: &[&str]) -> Outcome {
        let image = self.image();
        let arguments = [&["run", "--rm"], options, &[&image], command].concat();
        Outcome::of(self.vmrun(&arguments).output().expect("vmrun starts"))
    }

    /// `vmrun` with these arguments, to its end.
    #[must_use]
    pub fn call(&self, arguments: &[&str]) -> Outcome {
        outcome(self.vmrun(arguments))
    }

    /// Starts a detached container of this name.
    ///
    /// # Panics
    /// When it does not start.
    pub fn detach(&self, name: &str, options: &[&str], command: &[&str]) {
        let image = self.image();
        let arguments = [&["run", "--detach", "--name", name], options, &[&image], command].concat();
        let started = self.call(&arguments);
        assert_eq!(started.success(), format!("{name}\n"), "{started:?}");
    }

    /// What `vmrun inspect` says about a container.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn inspect(&self, name: &str) -> serde_json::Value {
        let mut inspected: serde_json::Value =
            serde_json::from_str(self.call(&["inspect", name]).success()).expect("JSON");
        inspected[0].take()
    }

    /// Starts a container in the background, and waits until it runs.
    #[must_use]
    pub fn start(&self, name: &str, command: &[&str]) -> Background {
        self.start_image(name, &self.image(), command)
    }

    /// Starts a container of an image in the background, and waits until it runs.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_image(&self, name: &str, image: &str, command: &[&str]) -> Background {
        let arguments = [&["run", "--rm", "--name", name][..], &[image], command].concat();
        let mut child = self.vmrun(&arguments).stdout(Stdio::piped()).spawn().expect("vmrun starts");
        // The command's first line says that it runs.
        let mut first = [0; 1];
        let stdout = child.stdout.as_mut().expect("piped");
        std::io::Read::read_exact(stdout, &mut first).expect("the command prints a line when it runs");
        Background { child }
    }
}

impl Drop for Story {
    /// Asserts that neither processes nor mounts, cgroups and files of this story's containers are left.
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The host is shared: what a failed story started must not stay.
            let names = outcome(self.vmrun(&["ps", "--all", "--quiet"])).stdout;
            let arguments: Vec<&str> = ["rm", "--force"].into_iter().chain(names.lines()).collect();
            let _ = outcome(self.vmrun(&arguments));
            return;
        }
        for folder in ["run", "data/containers"] {
            let left: Vec<_> =
                fs::read_dir(self.dir.path().join(folder)).into_iter().flatten().flatten().map(|e| e.path()).collect();
            assert!(left.is_empty(), "left behind: {left:?}");
        }
        let cgroup = format!("/sys/fs/cgroup{}", self.cgroup_parent());
        assert!(!Path::new(&cgroup).exists(), "a cgroup is left behind: {cgroup}");
        let ours = self.dir.path().display().to_string();
        let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
        assert!(!mounts.contains(&ours), "mounts left behind:\n{mounts}");
        let sockets = fs::read_to_string("/proc/net/unix").expect("sockets");
        assert!(!sockets.contains(&ours), "sockets left behind:\n{sockets}");
        let processes: Vec<String> = fs::read_dir("/proc")
            .expect("proc")
            .flatten()
            .filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok())
            .filter(|cmdline| cmdline.contains(&ours))
            .collect();
        assert!(processes.is_empty(), "processes left behind: {processes:?}");
    }
}

/// Keeps the programs under test open until this process ends. The emulated host has them from a file system that forgets a file with the
/// last one who has it open, and reading them anew takes longer than starting them.
pub(crate) fn hold_programs() {
    static HELD: OnceLock<Vec<File>> = OnceLock::new();
    HELD.get_or_init(|| {
        let vmrun = PathBuf::from(std::env::var_os("VMRUN").expect("VMRUN names the program: use `make test`"));
        let beside = ["vmrun", "containerd-shim-vm-v2", "vmm", "vmlinux", "rootfs.erofs"];
        beside.map(|name| File::open(vmrun.with_file_name(name)).expect("`make build` made it")).into()
    });
}

/// The commands that busybox has.
fn applets() -> Vec<String> {
    let listed = Command::new("/bin/busybox").arg("--list").output().expect("busybox-static is installed");
    let names = String::from_utf8_lossy(&listed.stdout).into_owned();
    names.lines().filter(|name| *name != "busybox").map(str::to_owned).collect()
}

/// What a finished `vmrun` left to see.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Of a process that has ended; the status is -1 when a signal ended it.
    #[must_use]
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The standard output of a command that must have succeeded.
    ///
    /// # Panics
    /// When it did not.
    #[must_use]
    pub fn success(&self) -> &str {
        assert_eq!(self.code, 0, "{self:?}");
        &self.stdout
    }
}

/// Whether this is the emulated KVM host, where a VM takes seconds to start.
#[must_use]
pub fn is_emulated() -> bool {
    Path::new("/run/on-kvm").exists()
}

/// Whether stories that are long are told to their end: on any other host, and where `STORY_FULL` is set.
#[must_use]
pub fn tells_all() -> bool {
    !is_emulated() || std::env::var_os("STORY_FULL").is_some()
}

/// Whether a story was told by this call, in a process of its own; it then tells itself there, where this is false. For what it counts of its
/// process. `name` is as the test program lists it.
///
/// # Panics
/// When the story failed.
#[must_use]
pub fn told_alone(name: &str) -> bool {
    const ALONE: &str = "STORY_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return false;
    }
    let mut command = Command::new(std::env::current_exe().expect("a program"));
    command.args(["--exact", name, "--nocapture"]).env(ALONE, "1");
    let told = outcome(command);
    assert!(told.success().contains("1 passed"), "{name}: {}", told.stdout);
    true
}

/// Runs `command` to its end.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn outcome(mut command: Command) -> Outcome {
    Outcome::of(command.output().expect("the command starts"))
}

/// Waits until a condition holds.
///
/// # Panics
/// When it does not in time; the message is `what`.
pub fn eventually(deadline: Duration, what: &str, condition: impl FnMut() -> bool) {
    assert!(becomes_true(deadline, condition), "not within {} s: {what}", deadline.as_secs());
}

/// Whether a condition holds before the deadline. It is asked again and again, for what other programs do tells nobody.
pub fn becomes_true(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    const PAUSE: Duration = Duration::from_millis(50);
    let started = Instant::now();
    while !condition() {
        if started.elapsed() >= deadline {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
    true
}

/// Waits until nothing is left; what is at the deadline is in the message.
pub(crate) fn assert_nothing(what: &str, mut left: impl FnMut() -> Vec<String>) {
    /// Longest time for what ends by itself after its owner.
    const DEADLINE: Duration = Duration::from_secs(10);
    let mut last = Vec::new();
    let is_empty = becomes_true(DEADLINE, || {
        last = left();
        last.is_empty()
    });
    assert!(is_empty, "{what} left behind: {last:#?}");
}

/// What the descriptors of a process lead to, sorted. `process` is an entry of /proc.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn descriptors(process: &str) -> Vec<String> {
    let fds = fs::read_dir(format!("/proc/{process}/fd")).expect("it runs").flatten();
    // That of the folder is closed by the time.
    let targets = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
    let mut targets: Vec<String> = targets.map(|target| target.display().to_string()).collect();
    targets.sort();
    targets
}

/// A `vmrun run` in the background; killed when dropped.
pub struct Background {
    child: std::process::Child,
}

impl Background {
    /// Process id of `vmrun`.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills `vmrun` with SIGKILL and waits for it.
    ///
    /// # Panics
    /// When it cannot be killed.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Waits for its end; returns its exit status.
    ///
    /// # Panics
    /// When it was killed.
    #[must_use]
    pub fn wait(&mut self) -> i32 {
        self.child.wait().expect("wait").code().expect("an exit status")
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
