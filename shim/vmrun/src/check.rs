//! `vmrun check`: what a host needs, line by line, and what to do about each line that fails. `--security`: what it should have
//! before it runs hostile guests.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use anyhow::Result;
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, ResolveFlags, memfd_create, openat2};
use rustix::mount::{OpenTreeFlags, open_tree};
use sandbox::artifacts::Artifacts;
use sandbox::probe::{Probe, probe};
use serde::Serialize;

mod security;

/// How well it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
enum Level {
    Pass,
    Warn,
    Fail,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    level: Level,
    /// Whether it is not a failure.
    ok: bool,
    detail: String,
    /// What to do; nothing for a line that is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<&'static str>,
}

impl Line {
    fn pass(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, level: Level::Pass, ok: true, detail: detail.into(), remedy: None }
    }

    fn warn(name: &'static str, detail: impl Into<String>, remedy: &'static str) -> Self {
        Self { name, level: Level::Warn, ok: true, detail: detail.into(), remedy: Some(remedy) }
    }

    fn fail(name: &'static str, detail: impl Into<String>, remedy: &'static str) -> Self {
        Self { name, level: Level::Fail, ok: false, detail: detail.into(), remedy: Some(remedy) }
    }
}

/// Least memory for a small VM, in MiB.
const MIN_AVAILABLE_MIB: u64 = 256;
/// Controllers that the limits of a sandbox use.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Prints the lines; `run` is the folder of vmrun's state.
pub(crate) fn check(security: bool, run: &Path, json: bool) -> Result<u8> {
    let lines = if security { security::lines(Path::new("/"), run, security::has_core_scheduling()) } else { needs() };
    if json {
        println!("{}", serde_json::to_string_pretty(&lines)?);
    } else {
        lines.iter().for_each(print);
    }
    Ok(u8::from(lines.iter().any(|line| !line.ok)))
}

/// Whether microVMs can run here.
fn needs() -> Vec<Line> {
    let artifacts = Artifacts::find();
    let mut lines = vec![root(), cpu(&read("/proc/cpuinfo")), kvm_device()];
    match &artifacts {
        Ok(found) => {
            lines.push(kvm_speed(probe(&found.vmm)));
            lines.extend([version_of_vmm(&found.vmm), kernel(&found.kernel), rootfs(&found.rootfs)]);
        }
        Err(error) => {
            lines.push(Line::fail(
                "artifacts",
                error.to_string(),
                "build them with `make build`, or install vmrun again",
            ));
        }
    }
    lines.push(memory(&read("/proc/meminfo")));
    lines.push(cgroup(&read("/sys/fs/cgroup/cgroup.controllers")));
    lines.push(overlay());
    lines.push(user_namespaces(&read("/proc/sys/user/max_user_namespaces")));
    lines.push(system_calls());
    lines.push(tun());
    lines
}

fn print(line: &Line) {
    let verdict = match line.level {
        Level::Pass => "PASS",
        Level::Warn => "WARN",
        Level::Fail => "FAIL",
    };
    println!("{verdict}  {:<12} {}", line.name, line.detail);
    if let Some(remedy) = line.remedy {
        println!("{:<18} -> {remedy}", "");
    }
}

/// A file of the kernel; empty when it is not there.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn root() -> Line {
    if rustix::process::geteuid().is_root() {
        Line::pass("user", "root")
    } else {
        Line::fail("user", "not root, who makes the mounts of a sandbox", "run vmrun with sudo")
    }
}

fn cpu(info: &str) -> Line {
    let count = info.lines().filter(|line| line.starts_with("processor")).count();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':')).map_or("", |(_, m)| m);
    let found = ["vmx", "svm"].into_iter().find(|flag| info.split_whitespace().any(|word| word == *flag));
    let detail = format!("{count} x{model}");
    match found {
        Some(flag) => Line::pass("cpu", format!("{detail}, hardware virtualization ({flag})")),
        None => Line::fail(
            "cpu",
            format!("{detail}, no hardware virtualization"),
            "switch virtualization on in the firmware, or nested virtualization in the outer VM",
        ),
    }
}

fn kvm_device() -> Line {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Line::pass("kvm", "/dev/kvm opens"),
        Err(error) => Line::fail(
            "kvm",
            format!("/dev/kvm: {error}"),
            match error.kind() {
                io::ErrorKind::NotFound => "load the module kvm_intel or kvm_amd",
                io::ErrorKind::PermissionDenied => "run as root, or join the group that owns /dev/kvm",
                _ => "see the kernel's log for what kvm_intel or kvm_amd said when it was loaded",
            },
        ),
    }
}

fn kvm_speed(probed: io::Result<Probe>) -> Line {
    const NAME: &str = "kvm speed";
    match probed {
        Ok(Probe::Ran { instructions, elapsed_us, max_vcpus }) => {
            let per_second = instructions.saturating_mul(1_000_000) / elapsed_us.max(1);
            let millions = per_second / 1_000_000;
            Line::pass(
                NAME,
                format!("{millions} million instructions of a guest's kernel a second, {max_vcpus} vCPUs at most"),
            )
        }
        Ok(Probe::Slow { instructions, deadline_ms }) => Line::fail(
            NAME,
            format!(
                "KVM did not run {instructions} instructions of a guest's kernel in {deadline_ms} ms: it emulates ring 0 \
                 one by one, as kvm_pvm does"
            ),
            "use a host with VT-x or AMD-V; for tests there is an emulated one, tests/on-kvm",
        ),
        Ok(Probe::Unusable { detail }) => {
            Line::fail(NAME, detail, "use a host with VT-x or AMD-V and its own KVM module")
        }
        Err(error) => Line::fail(
            NAME,
            format!("the VMM's probe failed: {error}"),
            "build or install the VMM for this machine again",
        ),
    }
}

fn version_of_vmm(path: &Path) -> Line {
    let printed = std::process::Command::new(path).arg("--version").output();
    let version = printed.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    if version.is_empty() {
        return Line::fail("vmm", path.display().to_string(), "it does not run here: build or install it again");
    }
    Line::pass("vmm", format!("{version}, {}", path.display()))
}

fn kernel(path: &Path) -> Line {
    const BANNER: &[u8] = b"Linux version ";
    let image = fs::read(path).unwrap_or_default();
    let banner = image.windows(BANNER.len()).position(|window| window == BANNER);
    let version = banner.and_then(|at| image[at + BANNER.len()..].split(|byte| *byte == b' ').next());
    match version {
        Some(version) => {
            let version = String::from_utf8_lossy(&version[..version.len().min(64)]).into_owned();
            Line::pass("guest kernel", format!("Linux {version}, {} KiB, {}", image.len() / 1024, path.display()))
        }
        None => Line::fail(
            "guest kernel",
            format!("{} is not an uncompressed vmlinux", path.display()),
            "build it with `make build`, or point VMRUN_KERNEL at one",
        ),
    }
}

fn rootfs(path: &Path) -> Line {
    match fs::metadata(path).map(|metadata| metadata.len()) {
        Ok(len) if len > 0 => Line::pass("guest image", format!("{} KiB, {}", len / 1024, path.display())),
        _ => Line::fail(
            "guest image",
            format!("{} is empty or unreadable", path.display()),
            "build it with `make build`, or point VMRUN_ROOTFS at one",
        ),
    }
}

fn memory(info: &str) -> Line {
    let available = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available_kib =
        available.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default();
    let available_mib = available_kib / 1024;
    let detail = format!("{available_mib} MiB available");
    if available_mib < MIN_AVAILABLE_MIB {
        return Line::fail("memory", detail, "free some: a small VM takes 256 MiB");
    }
    Line::pass("memory", detail)
}

fn cgroup(controllers: &str) -> Line {
    const REMEDY: &str = "boot with systemd.unified_cgroup_hierarchy=1";
    if controllers.is_empty() {
        return Line::fail("cgroup", "no cgroup v2 at /sys/fs/cgroup", REMEDY);
    }
    let missing: Vec<_> =
        CONTROLLERS.into_iter().filter(|name| !controllers.split_whitespace().any(|c| c == *name)).collect();
    if !missing.is_empty() {
        return Line::fail("cgroup", format!("version 2 without the controllers {}", missing.join(", ")), REMEDY);
    }
    Line::pass("cgroup", "version 2 with cpu, io, memory and pids")
}

fn overlay() -> Line {
    if read("/proc/filesystems").split_whitespace().any(|word| word == "overlay") {
        return Line::pass("overlayfs", "in the kernel");
    }
    let release = read("/proc/sys/kernel/osrelease");
    if read(&format!("/lib/modules/{}/modules.dep", release.trim())).contains("/overlay.ko") {
        return Line::pass("overlayfs", "a module that the first mount loads");
    }
    Line::fail("overlayfs", "not in this kernel", "modprobe overlay, or use a kernel with CONFIG_OVERLAY_FS")
}

fn user_namespaces(most: &str) -> Line {
    const NAME: &str = "user ns";
    const REMEDY: &str = "sysctl user.max_user_namespaces=10000, in a kernel with CONFIG_USER_NS";
    match most.trim().parse::<u64>() {
        Ok(0) => Line::fail(NAME, "user namespaces are switched off", REMEDY),
        Ok(most) => Line::pass(NAME, format!("at most {most}")),
        Err(_) => Line::fail(NAME, "this kernel has no user namespaces", REMEDY),
    }
}

fn system_calls() -> Line {
    const NAME: &str = "system calls";
    let path = OFlags::PATH | OFlags::CLOEXEC;
    let calls = [
        ("memfd_create", memfd_create("check", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).err()),
        ("openat2", openat2(CWD, "/", path, Mode::empty(), ResolveFlags::IN_ROOT).err()),
        ("open_tree", open_tree(CWD, "/", OpenTreeFlags::OPEN_TREE_CLOEXEC).err()),
    ];
    let missing: Vec<_> =
        calls.iter().filter_map(|(name, error)| error.map(|error| format!("{name}: {error}"))).collect();
    if missing.is_empty() {
        return Line::pass(NAME, "memfd_create, openat2 and open_tree work");
    }
    Line::fail(NAME, missing.join(", "), "use Linux 5.6 or newer; in a container, allow them in its seccomp profile")
}

fn tun() -> Line {
    if Path::new("/dev/net/tun").exists() {
        Line::pass("tun", "/dev/net/tun is there")
    } else {
        Line::fail("tun", "no /dev/net/tun, which networks need", "modprobe tun")
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::{Line, Probe, cgroup, cpu, kvm_speed, memory, user_namespaces};

    #[test]
    fn a_line_has_its_level_in_json() {
        let level = |line| serde_json::to_value::<Line>(line).expect("JSON")["level"].clone();
        let lines = [Line::pass("a", "b"), Line::warn("a", "b", "c"), Line::fail("a", "b", "c")];
        assert_eq!(lines.map(level), ["PASS", "WARN", "FAIL"]);
    }

    #[test]
    fn a_kvm_that_emulates_ring_0_fails_with_the_reason() {
        let line = kvm_speed(Ok(Probe::Slow { instructions: 20_000_000, deadline_ms: 2000 }));
        assert!(!line.ok && line.detail.contains("kvm_pvm") && line.remedy.is_some(), "{line:?}");
    }

    #[test]
    fn a_probe_that_ran_or_failed_is_told_with_its_facts() {
        let ran = kvm_speed(Ok(Probe::Ran { instructions: 20_000_000, elapsed_us: 100_000, max_vcpus: 64 }));
        assert!(ran.ok && ran.detail.starts_with("200 million"), "{ran:?}");
        let unusable = kvm_speed(Ok(Probe::Unusable { detail: "KVM of this host lacks X".to_owned() }));
        assert!(!unusable.ok && unusable.detail.contains("lacks X"), "{unusable:?}");
        assert!(!kvm_speed(Err(io::ErrorKind::NotFound.into())).ok);
    }

    #[test]
    fn what_the_kernel_says_is_read_and_nothing_is_a_failure() {
        assert!(cpu("processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu svm\n").detail.starts_with("1 x A CPU"));
        assert!(!cpu("processor\t: 0\nflags\t\t: fpu\n").ok);
        assert!(memory("MemAvailable:    1048576 kB\n").ok);
        assert!(!memory("MemAvailable:    1024 kB\n").ok);
        assert!(cgroup("cpuset cpu io memory hugetlb pids\n").ok);
        assert!(cgroup("cpu memory\n").detail.contains("io, pids"));
        assert!(user_namespaces("100\n").ok);
        let empty = [cpu(""), memory(""), cgroup(""), user_namespaces(""), user_namespaces("0")];
        assert!(empty.iter().all(|line| !line.ok && line.remedy.is_some()), "{empty:?}");
    }
}
