//! The place of one containerd: a folder, a mount namespace and a network namespace that a process holds, and a cgroup.
//!
//! Paths that containerd, its shims and the CNI plugins have in their code (`/run/containerd`, `/run/netns`, `/var/lib/cni`,
//! `/etc/cni/net.d`, `/etc/containerd`, `/etc/vmrun`, `/usr/local/bin`) are folders of the room there, so that several run beside each other, and what is in them is this one's.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::eventually;
use crate::lan::in_network;

/// Makes the room's mounts and its loopback device, says so, and holds the namespaces until its stdin ends.
const HOLD: &str = r#"
set -e
cd "$0"
mount -t tmpfs -o mode=755 tmpfs root
mkdir -p /run/containerd /run/netns /var/lib/cni /etc/cni/net.d /opt/cni/bin /etc/containerd /etc/vmrun
mount --bind run /run/containerd
mount --bind etc /etc/containerd
mount --bind bin /usr/local/bin
mount --bind etc-vmrun /etc/vmrun
mount --bind cni /var/lib/cni
mount --bind net.d /etc/cni/net.d
mount --bind "$1" /opt/cni/bin
mount -t tmpfs -o mode=755 tmpfs /run/netns
busybox ip link set lo up
echo ready
exec cat
"#;

/// The runtime's configuration: small VMs, and time for one to boot on an emulated host.
const VMRUN_CONFIG: &str = "[vm]\nmemory_mib = 256\nboot_deadline_s = 150\n[log]\nlevel = \"debug\"\n";

/// The shim's file name.
pub(super) const SHIM: &str = "containerd-shim-vm-v2";

/// Enters the room's cgroup and becomes the command.
const ENTER: &str = r#"echo $$ >"$0/cgroup.procs" && exec "$@""#;

pub(super) struct Room {
    dir: TempDir,
    holder: Child,
    cgroup: PathBuf,
}

impl Room {
    /// Makes the folder, the cgroup and the namespaces.
    pub(super) fn open() -> Self {
        crate::hold_programs();
        let dir = tempfile::Builder::new().prefix("ctd-").tempdir_in("/tmp").expect("a temporary folder");
        for folder in ["root", "run", "etc", "etc-vmrun", "cni", "net.d", "logs", "bin"] {
            fs::create_dir(dir.path().join(folder)).expect("a folder of the room");
        }
        fs::write(dir.path().join("etc-vmrun/config.toml"), VMRUN_CONFIG).expect("configuration");
        let vmrun = PathBuf::from(std::env::var_os("VMRUN").expect("VMRUN names the program: use `make test`"));
        symlink(vmrun.with_file_name(SHIM), dir.path().join("bin").join(SHIM)).expect("a link");
        let cgroup = own_cgroup().join(dir.path().file_name().expect("a name"));
        fs::create_dir(&cgroup).expect("cgroup v2 is mounted: run the stories with tests/on-kvm");
        let mut holder = Command::new("unshare")
            .args(["--mount", "--net", "--propagation", "private", "sh", "-c", HOLD])
            .arg(dir.path())
            .arg(super::packages::cni_plugins())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut line = String::new();
        BufReader::new(holder.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n", "the namespaces of the room could not be made");
        Self { dir, holder, cgroup }
    }

    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A name that no other room has, and that is not the cgroup's of the room's own processes.
    pub(super) fn namespace(&self) -> String {
        let name = self.dir().file_name().expect("a name").to_string_lossy().into_owned();
        name.replace("ctd-", "story-")
    }

    /// A command in the room. The process id is the command's own.
    pub(super) fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        for namespace in ["mnt:mount", "net:net"] {
            let (file, option) = namespace.split_once(':').expect("two parts");
            command.arg(format!("--{option}=/proc/{}/ns/{file}", self.holder.id()));
        }
        command.args(["--", "sh", "-c", ENTER]).arg(&self.cgroup).arg(program).args(arguments).stdin(Stdio::null());
        command
    }

    /// Does something in the room's network.
    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_network(Path::new(&format!("/proc/{}/ns/net", self.holder.id())), work)
    }

    /// The processes in the room's cgroup and in those of its containers: containerd, shims, VMMs, `ctr`.
    pub(super) fn processes(&self) -> Vec<u32> {
        let listed =
            self.cgroups().into_iter().filter_map(|cgroup| fs::read_to_string(cgroup.join("cgroup.procs")).ok());
        listed.flat_map(|text| text.lines().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
    }

    /// The cgroup in which containerd makes those of containers, which may not be there.
    fn containers_cgroup(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(self.namespace())
    }

    fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = vec![self.cgroup.clone(), self.containers_cgroup()];
        let mut next = 0;
        while let Some(cgroup) = found.get(next) {
            let below = fs::read_dir(cgroup).into_iter().flatten().flatten().map(|entry| entry.path());
            let below: Vec<_> = below.filter(|path| path.is_dir()).collect();
            found.extend(below);
            next += 1;
        }
        found
    }

    /// The mounts in the room.
    pub(super) fn mounts(&self) -> Vec<String> {
        let listed = fs::read_to_string(format!("/proc/{}/mounts", self.holder.id())).expect("mounts");
        listed.lines().map(str::to_owned).collect()
    }

    /// Network devices in the room.
    pub(super) fn network_devices(&self) -> Vec<String> {
        let listed = fs::read_to_string(format!("/proc/{}/net/dev", self.holder.id())).expect("devices");
        listed.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect()
    }

    /// Kills every process of the room.
    pub(super) fn kill_all(&self) {
        for cgroup in [&self.cgroup, &self.containers_cgroup()] {
            // No container may have been made.
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // The end of its stdin ends the holder, and with it the namespaces.
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
        // Made by the first container below it.
        let _ = fs::remove_dir(self.containers_cgroup());
        if std::thread::panicking() {
            let _ = fs::remove_dir(&self.cgroup);
            return;
        }
        eventually(Duration::from_secs(10), "the cgroup of the room is empty", || fs::remove_dir(&self.cgroup).is_ok());
    }
}

/// This process's cgroup, so that whoever kills the story by its cgroup kills the room.
fn own_cgroup() -> PathBuf {
    let listed = fs::read_to_string("/proc/self/cgroup").expect("cgroups");
    // `0::/path` is the one of cgroup v2 (cgroups(7)).
    let path = listed.lines().find_map(|line| line.strip_prefix("0::/")).expect("cgroup v2");
    Path::new("/sys/fs/cgroup").join(path)
}

/// The name of a process's program, or nothing when it has ended.
pub(super) fn program(pid: u32) -> String {
    let path = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
