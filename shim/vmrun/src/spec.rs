//! From an image and the command line to an OCI runtime spec with Docker's defaults.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::{
    Capabilities, Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder, LinuxDeviceCgroupBuilder,
    LinuxMemoryBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxPidsBuilder, LinuxResourcesBuilder, Mount,
    MountBuilder, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process, ProcessBuilder, RootBuilder, Spec,
    SpecBuilder, UserBuilder,
};

use crate::cli::RunArgs;
use crate::image::{self, Image};
use crate::seccomp;
use crate::user::User;
use crate::volume;

/// Docker's path for a command whose image sets none.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Docker's default capabilities.
pub(crate) const DEFAULT_CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// The capabilities that Docker gives only when asked.
const OTHER_CAPABILITIES: [Capability; 27] = [
    Capability::AuditControl,
    Capability::AuditRead,
    Capability::BlockSuspend,
    Capability::Bpf,
    Capability::CheckpointRestore,
    Capability::DacReadSearch,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::Lease,
    Capability::LinuxImmutable,
    Capability::MacAdmin,
    Capability::MacOverride,
    Capability::NetAdmin,
    Capability::NetBroadcast,
    Capability::Perfmon,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysModule,
    Capability::SysNice,
    Capability::SysPacct,
    Capability::SysPtrace,
    Capability::SysRawio,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Syslog,
    Capability::WakeAlarm,
];

/// Docker's masked paths.
const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Docker's read-only paths.
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Docker's limit on open files, when it is run by systemd.
const DEFAULT_NOFILE: (u64, u64) = (1024, 524_288);

/// Period of the CPU quota, in microseconds.
const CPU_PERIOD_US: u64 = 100_000;

/// The words that will be executed.
pub(crate) fn command(args: &RunArgs, image: &Image) -> Result<Vec<String>> {
    let mut words = match &args.entrypoint {
        Some(entrypoint) if entrypoint.is_empty() => Vec::new(),
        Some(entrypoint) => vec![entrypoint.clone()],
        None => image.entrypoint.clone(),
    };
    if !args.command.is_empty() {
        words.extend(args.command.iter().cloned());
    } else if args.entrypoint.is_none() {
        words.extend(image.cmd.iter().cloned());
    }
    if words.is_empty() {
        bail!("no command: the image names none, so write one after the image");
    }
    Ok(words)
}

/// The spec of a new container; bind mounts still name host paths.
pub(crate) fn container(args: &RunArgs, image: &Image, user: &User, name: &str, command: &[String]) -> Result<Spec> {
    if let Some(bundle) = &image.bundle {
        return image::bundle_container(bundle, args, name, command);
    }
    let hostname = args.hostname.clone().unwrap_or_else(|| name.to_owned());
    let linux = LinuxBuilder::default()
        .namespaces(namespaces()?)
        .resources(resources(args)?)
        .cgroups_path(PathBuf::from(format!("/containers/{name}")));
    let linux = confined(linux, args)?;
    let linux = if args.sysctl.is_empty() { linux } else { linux.sysctl(pairs("--sysctl", &args.sysctl)?) };
    let spec = SpecBuilder::default()
        .version("1.0.2")
        .root(RootBuilder::default().path("rootfs").readonly(args.read_only).build()?)
        .hostname(hostname)
        .process(init_process(args, image, user, command)?)
        .mounts(mounts(args, image)?)
        .linux(linux.build()?)
        .build()?;
    Ok(spec)
}

/// Docker's defaults: masked and read-only paths, and a seccomp profile.
fn confined(linux: LinuxBuilder, args: &RunArgs) -> Result<LinuxBuilder> {
    let options = SecurityOptions::parse(&args.security_opt)?;
    if args.privileged {
        return Ok(linux.masked_paths(Vec::new()).readonly_paths(Vec::new()));
    }
    let linux = linux.masked_paths(strings(&MASKED_PATHS)).readonly_paths(strings(&READONLY_PATHS));
    Ok(match &options.seccomp {
        Seccomp::Unconfined => linux,
        Seccomp::Default => linux.seccomp(seccomp::profile(None, &capability_set(args)?)?),
        Seccomp::File(path) => linux.seccomp(seccomp::profile(Some(path), &capability_set(args)?)?),
    })
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

fn namespaces() -> Result<Vec<oci_spec::runtime::LinuxNamespace>> {
    // The network is the VM's own.
    [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Cgroup,
    ]
    .into_iter()
    .map(|typ| Ok(LinuxNamespaceBuilder::default().typ(typ).build()?))
    .collect()
}

fn resources(args: &RunArgs) -> Result<oci_spec::runtime::LinuxResources> {
    #[expect(clippy::cast_possible_truncation, reason = "0 < cpus <= 64 was checked")]
    let quota = (args.cpus * CPU_PERIOD_US as f64) as i64;
    let memory = i64::try_from(args.memory).context("memory limit too large")?;
    let resources = LinuxResourcesBuilder::default()
        .memory(LinuxMemoryBuilder::default().limit(memory).build()?)
        .cpu(LinuxCpuBuilder::default().quota(quota).period(CPU_PERIOD_US).build()?);
    let resources = if args.privileged {
        resources.devices([LinuxDeviceCgroupBuilder::default().allow(true).access("rwm").build()?])
    } else {
        resources
    };
    let resources = match args.pids_limit {
        Some(limit) => resources.pids(LinuxPidsBuilder::default().limit(limit).build()?),
        None => resources,
    };
    Ok(resources.build()?)
}

fn init_process(args: &RunArgs, image: &Image, user: &User, command: &[String]) -> Result<Process> {
    let mut env = vec![DEFAULT_PATH.to_owned()];
    set_all(&mut env, image.env.iter().cloned());
    if args.tty {
        set_all(&mut env, ["TERM=xterm".to_owned()]);
    }
    if let Some(home) = &user.home {
        set_all(&mut env, [format!("HOME={home}")]);
    }
    for path in &args.env_file {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read the env file {}", path.display()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        set_all(&mut env, lines.filter_map(with_value));
    }
    set_all(&mut env, args.env.iter().filter_map(|variable| with_value(variable)));
    let workdir = args.workdir.clone().or_else(|| image.workdir.clone()).filter(|dir| !dir.is_empty());
    let process = ProcessBuilder::default()
        .terminal(args.tty)
        .args(command.to_vec())
        .env(env)
        .cwd(workdir.unwrap_or_else(|| "/".to_owned()))
        .user(UserBuilder::default().uid(user.uid).gid(user.gid).additional_gids(user.additional_gids.clone()).build()?)
        .capabilities(capabilities(args, user.uid)?)
        .rlimits(rlimits(&args.ulimit)?)
        .no_new_privileges(SecurityOptions::parse(&args.security_opt)?.no_new_privileges);
    Ok(process.build()?)
}

/// `NAME=VALUE` as it is; `NAME` with our own value, or not at all.
pub(crate) fn with_value(variable: &str) -> Option<String> {
    if variable.contains('=') {
        return Some(variable.to_owned());
    }
    std::env::var(variable).ok().map(|value| format!("{variable}={value}"))
}

/// Later values of a variable replace earlier ones.
pub(crate) fn set_all(env: &mut Vec<String>, variables: impl IntoIterator<Item = String>) {
    for variable in variables {
        let name_len = variable.find('=').map_or(variable.len(), |at| at + 1);
        env.retain(|existing| !existing.starts_with(&variable[..name_len]));
        env.push(variable);
    }
}

fn capabilities(args: &RunArgs, uid: u32) -> Result<oci_spec::runtime::LinuxCapabilities> {
    let set = capability_set(args)?;
    if uid == 0 {
        return capability_sets(&set);
    }
    // As with Docker, a user other than root has the bounding set only.
    let none = Capabilities::new();
    let sets = LinuxCapabilitiesBuilder::default().bounding(set).effective(none.clone()).permitted(none.clone());
    Ok(sets.inheritable(none.clone()).ambient(none).build()?)
}

/// What the container may have at most. As with Docker, `ALL` of one flag leaves the other to make exceptions.
fn capability_set(args: &RunArgs) -> Result<Capabilities> {
    let is_all = |name: &String| name.eq_ignore_ascii_case("all");
    let mut set: Capabilities = match () {
        () if args.privileged || args.cap_add.iter().any(is_all) => all_capabilities(),
        () if args.cap_drop.iter().any(is_all) => Capabilities::new(),
        () => DEFAULT_CAPABILITIES.into_iter().collect(),
    };
    for name in args.cap_drop.iter().filter(|name| !is_all(name)) {
        set.remove(&capability(name)?);
    }
    for name in args.cap_add.iter().filter(|name| !is_all(name)) {
        set.insert(capability(name)?);
    }
    Ok(set)
}

/// Every capability of the guest's kernel (capabilities(7)).
fn all_capabilities() -> Capabilities {
    DEFAULT_CAPABILITIES.into_iter().chain(OTHER_CAPABILITIES).collect()
}

fn capability_sets(set: &Capabilities) -> Result<oci_spec::runtime::LinuxCapabilities> {
    let sets = LinuxCapabilitiesBuilder::default().bounding(set.clone()).effective(set.clone()).permitted(set.clone());
    Ok(sets.inheritable(Capabilities::new()).ambient(Capabilities::new()).build()?)
}

fn capability(name: &str) -> Result<Capability> {
    let upper = name.to_ascii_uppercase();
    let name = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
    serde_json::from_value(serde_json::Value::String(name.clone()))
        .with_context(|| format!("unknown capability {name}"))
}

fn rlimits(ulimits: &[String]) -> Result<Vec<PosixRlimit>> {
    let mut limits = Vec::new();
    for text in ulimits {
        let bad = || format!("--ulimit {text:?} is not TYPE=SOFT[:HARD]");
        let (name, values) = text.split_once('=').with_context(bad)?;
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let typ = serde_json::Value::String(format!("RLIMIT_{}", name.to_ascii_uppercase()));
        let typ: PosixRlimitType = serde_json::from_value(typ).with_context(|| format!("unknown limit {name:?}"))?;
        let number = |value: &str| if value == "-1" { Ok(u64::MAX) } else { value.parse().with_context(bad) };
        limits.push(PosixRlimitBuilder::default().typ(typ).soft(number(soft)?).hard(number(hard)?).build()?);
    }
    if !limits.iter().any(|limit| limit.typ() == PosixRlimitType::RlimitNofile) {
        let (soft, hard) = DEFAULT_NOFILE;
        limits.push(PosixRlimitBuilder::default().typ(PosixRlimitType::RlimitNofile).soft(soft).hard(hard).build()?);
    }
    Ok(limits)
}

/// What `--security-opt` says.
#[derive(Debug, Default, Eq, PartialEq)]
struct SecurityOptions {
    no_new_privileges: bool,
    seccomp: Seccomp,
}

#[derive(Debug, Default, Eq, PartialEq)]
enum Seccomp {
    #[default]
    Default,
    Unconfined,
    File(PathBuf),
}

impl SecurityOptions {
    fn parse(options: &[String]) -> Result<Self> {
        let mut parsed = Self::default();
        for option in options {
            let (name, value) = option.split_once(['=', ':']).unwrap_or((option, ""));
            match (name, value) {
                ("no-new-privileges", "" | "true") => parsed.no_new_privileges = true,
                ("no-new-privileges", "false") => parsed.no_new_privileges = false,
                ("seccomp", "unconfined") => parsed.seccomp = Seccomp::Unconfined,
                ("seccomp", "builtin" | "default") => parsed.seccomp = Seccomp::Default,
                ("seccomp", path) if !path.is_empty() => parsed.seccomp = Seccomp::File(path.into()),
                _ => bail!(
                    "--security-opt {option:?} is not supported: no-new-privileges and seccomp=unconfined|FILE are"
                ),
            }
        }
        Ok(parsed)
    }
}

fn pairs(flag: &str, words: &[String]) -> Result<std::collections::HashMap<String, String>> {
    let pair = |word: &String| word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    words.iter().map(|word| pair(word).with_context(|| format!("{flag} {word:?} is not NAME=VALUE"))).collect()
}

fn mounts(args: &RunArgs, image: &Image) -> Result<Vec<Mount>> {
    let sys_mode = if args.privileged { "rw" } else { "ro" };
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", sys_mode])?,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", sys_mode])?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"])?,
    ];
    // A volume of the image must be writable; with a writable root it is.
    for path in image.volumes.iter().filter(|_| args.read_only) {
        mounts.push(mount(path, "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=755"])?);
    }
    for text in &args.tmpfs {
        let (path, options) = text.split_once(':').unwrap_or((text, "nosuid,nodev,noexec,mode=1777"));
        mounts.push(mount(path, "tmpfs", "tmpfs", &options.split(',').collect::<Vec<_>>())?);
    }
    for text in &args.volume {
        mounts.push(volume::mount(text)?);
    }
    Ok(mounts)
}

/// A mount with these options.
pub(crate) fn mount(path: &str, typ: &str, source: &str, options: &[&str]) -> Result<Mount> {
    Ok(MountBuilder::default().destination(path).typ(typ).source(source).options(strings(options)).build()?)
}

/// Docker's exit status for a command that could not be started.
pub(crate) fn start_failure_code(cause: &str) -> u8 {
    if cause.contains("exec-not-found") {
        127
    } else if cause.contains("exec-not-executable") {
        126
    } else {
        125
    }
}

#[cfg(test)]
mod tests {
    use super::{capability, set_all};

    #[test]
    fn later_values_of_a_variable_win() {
        let mut env = vec!["A=1".to_owned(), "AB=2".to_owned()];
        set_all(&mut env, ["A=3".to_owned()]);
        assert_eq!(env, ["AB=2", "A=3"]);
    }

    #[test]
    fn capabilities_go_by_both_names() {
        assert_eq!(capability("net_admin").expect("known"), capability("CAP_NET_ADMIN").expect("known"));
        assert!(capability("everything").is_err());
    }
}
