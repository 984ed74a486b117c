//! `vmrun check --security`: what a host should have before hostile guests are let in. Reads what the kernel tells under `/proc`
//! and `/sys`, and asks for its core scheduling; a fact that it does not tell is a warning, unless that means that it has no such thing.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::process::getpid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};

use super::Line;

/// Parameters of the host's command line that take protection away, beside some values of `mitigations`.
const WEAKENING: [&str; 11] = [
    "nopti",
    "pti=off",
    "nospectre_v1",
    "nospectre_v2",
    "spectre_v2=off",
    "spec_store_bypass_disable=off",
    "l1tf=off",
    "mds=off",
    "retbleed=off",
    "vmscape=off",
    "kvm.nx_huge_pages=off",
];

/// A setting that should not be 0.
struct Setting {
    name: &'static str,
    path: &'static str,
    remedy: &'static str,
}

const SETTINGS: [Setting; 5] = [
    Setting {
        name: "ptrace",
        path: "proc/sys/kernel/yama/ptrace_scope",
        remedy: "sysctl kernel.yama.ptrace_scope=1, or processes of one user read each other's memory",
    },
    Setting {
        name: "addresses",
        path: "proc/sys/kernel/kptr_restrict",
        remedy: "sysctl kernel.kptr_restrict=1, or users learn where the kernel is",
    },
    Setting {
        name: "bpf",
        path: "proc/sys/kernel/unprivileged_bpf_disabled",
        remedy: "sysctl kernel.unprivileged_bpf_disabled=1",
    },
    Setting {
        name: "io_uring",
        path: "proc/sys/kernel/io_uring_disabled",
        remedy: "sysctl kernel.io_uring_disabled=2 (Linux 6.6) where nothing on the host uses it; a VMM never does",
    },
    Setting { name: "kernel log", path: "proc/sys/kernel/dmesg_restrict", remedy: "sysctl kernel.dmesg_restrict=1" },
];

/// Whether cores run several threads, and the kernel keeps those of others off a VM's.
pub(super) fn has_core_scheduling() -> bool {
    core_scheduling_cookie(getpid(), CoreSchedulingScope::Thread).is_ok()
}

/// The lines for the host whose file systems are below `host`; `run` is the folder of vmrun's state.
pub(super) fn lines(host: &Path, run: &Path, has_core_scheduling: bool) -> Vec<Line> {
    let mut lines = vec![
        vulnerabilities(&host.join("sys/devices/system/cpu/vulnerabilities")),
        command_line(&read(host, "proc/cmdline")),
        threads(&read(host, "sys/devices/system/cpu/smt/active"), has_core_scheduling),
        second_level_paging(&parameter(host, ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"])),
        tdp_mmu(&read(host, "sys/module/kvm/parameters/tdp_mmu")),
        nested(&parameter(host, ["kvm_intel/parameters/nested", "kvm_amd/parameters/nested"])),
        huge_pages(&read(host, "sys/module/kvm/parameters/nx_huge_pages")),
        device(&host.join("dev/kvm")),
        merging(&read(host, "sys/kernel/mm/ksm/run")),
        swap(&read(host, "proc/swaps")),
        open_files(&read(host, "proc/sys/fs/file-max"), &read(host, "proc/self/limits")),
        folder(run),
    ];
    lines.extend(SETTINGS.iter().map(|setting| sysctl(setting, &read(host, setting.path))));
    lines
}

fn read(host: &Path, name: &str) -> String {
    fs::read_to_string(host.join(name)).unwrap_or_default().trim().to_owned()
}

/// The parameter of the KVM module that is loaded; empty without one.
fn parameter(host: &Path, names: [&str; 2]) -> String {
    names.map(|name| read(host, &format!("sys/module/{name}"))).concat()
}

fn vulnerabilities(dir: &Path) -> Line {
    const NAME: &str = "cpu flaws";
    const REMEDY: &str = "update microcode and kernel, and take what switches mitigations off from the command line";
    let Ok(entries) = fs::read_dir(dir) else {
        return Line::warn(NAME, "the kernel does not tell which it has", REMEDY);
    };
    let mut flaws: Vec<(String, String)> = entries
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, fs::read_to_string(entry.path()).ok()?)))
        .collect();
    flaws.sort();
    let named = |is_such: &dyn Fn(&str) -> bool| -> Vec<String> {
        let such = flaws.iter().filter(|(_, state)| is_such(state.trim()));
        such.map(|(name, state)| format!("{name} ({})", state.trim())).collect()
    };
    let open = named(&|state| state.starts_with("Vulnerable") || state.contains("KVM: Vulnerable"));
    if !open.is_empty() {
        return Line::fail(NAME, format!("not mitigated: {}", open.join(", ")), REMEDY);
    }
    let partly = named(&|state| state.to_lowercase().contains("vulnerable"));
    if !partly.is_empty() {
        return Line::warn(NAME, format!("mitigated in part: {}", partly.join(", ")), REMEDY);
    }
    Line::pass(NAME, format!("{} known to the kernel, none open", flaws.len()))
}

fn command_line(words: &str) -> Line {
    const NAME: &str = "command line";
    let weak: Vec<_> = words.split_whitespace().filter(|word| weakens(word)).collect();
    if words.is_empty() {
        return Line::warn(NAME, "no /proc/cmdline", "mount proc");
    }
    if weak.is_empty() {
        return Line::pass(NAME, "switches no mitigation off");
    }
    Line::fail(NAME, format!("has {}", weak.join(" ")), "boot without it")
}

/// `mitigations=` may have several values.
fn weakens(word: &str) -> bool {
    WEAKENING.contains(&word)
        || word.strip_prefix("mitigations=").is_some_and(|values| {
            values.split([',', ';']).any(|value| matches!(value, "off" | "no_guest_host" | "no_guest_guest"))
        })
}

fn threads(active: &str, has_core_scheduling: bool) -> Line {
    const NAME: &str = "threads";
    match active {
        "0" => Line::pass(NAME, "a core runs one thread at a time"),
        _ if has_core_scheduling => {
            Line::pass(NAME, "a core runs several threads, never of two VMs at a time (core scheduling)")
        }
        "1" => Line::warn(
            NAME,
            "two VMs may share a core, and learn of each other by its caches: this kernel has no core scheduling",
            "boot with nosmt, or a kernel with CONFIG_SCHED_CORE, where tenants do not trust each other",
        ),
        _ => Line::warn(NAME, "the kernel does not tell whether cores run several threads", "see lscpu"),
    }
}

fn second_level_paging(state: &str) -> Line {
    const NAME: &str = "paging";
    match state {
        "Y" | "1" => Line::pass(NAME, "the processor translates guest addresses (EPT or NPT)"),
        "" => Line::warn(NAME, "kvm_intel or kvm_amd is not loaded, or does not tell", "load it"),
        _ => Line::fail(
            NAME,
            "KVM shadows the guest's page tables, which is its most attacked code",
            "load kvm_intel with ept=1, or kvm_amd with npt=1",
        ),
    }
}

fn tdp_mmu(state: &str) -> Line {
    const NAME: &str = "page tables";
    match state {
        "Y" | "1" => Line::pass(NAME, "KVM keeps those of guests by its newer code, which has no shadows (TDP MMU)"),
        "" => Line::warn(NAME, "kvm is not loaded, or does not tell", "load it"),
        _ => Line::warn(
            NAME,
            "KVM keeps those of guests by the code that also shadows",
            "load kvm with tdp_mmu=1, which is its default",
        ),
    }
}

fn nested(state: &str) -> Line {
    const NAME: &str = "nested";
    match state {
        "N" | "0" => Line::pass(NAME, "guests cannot run guests"),
        "" => Line::warn(NAME, "kvm_intel or kvm_amd is not loaded, or does not tell", "load it"),
        _ => Line::warn(
            NAME,
            "KVM lets guests run guests; vmrun hides it from its own",
            "load kvm_intel or kvm_amd with nested=0 where nobody needs it",
        ),
    }
}

fn huge_pages(state: &str) -> Line {
    const NAME: &str = "huge pages";
    match state {
        "Y" | "auto" | "1" | "force" => Line::pass(NAME, "executable ones are split where the processor needs it"),
        "" => Line::warn(NAME, "kvm is not loaded, or does not tell", "load it"),
        // KVM says N where the processor does not need it.
        _ => Line::pass(NAME, "not split: the kernel does not see a processor that needs it"),
    }
}

fn device(path: &Path) -> Line {
    const NAME: &str = "kvm access";
    match fs::metadata(path) {
        Ok(found) if found.mode() & 0o007 == 0 => Line::pass(NAME, format!("mode {:o}", found.mode() & 0o777)),
        Ok(_) => Line::warn(NAME, "every user may make VMs", "chmod 660 /dev/kvm, and a group for who may"),
        Err(error) => Line::warn(NAME, format!("{}: {error}", path.display()), "see `vmrun check`"),
    }
}

fn merging(run: &str) -> Line {
    const NAME: &str = "page merging";
    match run {
        "0" | "" => Line::pass(NAME, "off"),
        _ => Line::warn(
            NAME,
            "KSM merges equal pages of VMs, and how long a write takes tells one of another's",
            "echo 2 >/sys/kernel/mm/ksm/run",
        ),
    }
}

fn swap(table: &str) -> Line {
    const NAME: &str = "swap";
    // The first line is a heading.
    let areas: Vec<_> = table.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    let on_disk: Vec<_> = areas.iter().filter(|area| !area.starts_with("/dev/zram")).copied().collect();
    if on_disk.is_empty() {
        return Line::pass(NAME, "no memory of guests is written to a disk");
    }
    Line::warn(
        NAME,
        format!("memory of guests is written to {}", on_disk.join(", ")),
        "swapoff -a, unless that is encrypted",
    )
}

/// A VMM is started with the limits of this process, and raises its own to the hard one.
fn open_files(of_host: &str, limits: &str) -> Line {
    const NAME: &str = "open files";
    const REMEDY: &str = "raise fs.file-max, or lower the limit of who starts VMs (LimitNOFILE=)";
    let hard = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().nth(1));
    let (Ok(of_host), Some(of_vm)) = (of_host.parse::<u64>(), hard.and_then(|hard| hard.parse::<u64>().ok())) else {
        return Line::warn(NAME, "the kernel does not tell how many there may be", REMEDY);
    };
    let detail = format!("{of_host} on this host, {of_vm} for one VM");
    if of_vm > of_host / 2 {
        return Line::warn(NAME, format!("{detail}: a guest may leave few for others"), REMEDY);
    }
    Line::pass(NAME, detail)
}

fn folder(run: &Path) -> Line {
    const NAME: &str = "state folder";
    match fs::symlink_metadata(run) {
        Err(_) => Line::pass(NAME, format!("{} is not there yet", run.display())),
        Ok(found) if found.is_dir() && found.uid() == 0 && found.mode() & 0o077 == 0 => {
            Line::pass(NAME, format!("{} is root's alone", run.display()))
        }
        Ok(found) => Line::fail(
            NAME,
            format!("{}: user {}, mode {:o}", run.display(), found.uid(), found.mode() & 0o7777),
            "it must be a folder of root with mode 700: find out who made it, then remove it",
        ),
    }
}

fn sysctl(setting: &Setting, value: &str) -> Line {
    match value.parse::<u64>() {
        Ok(0) => Line::warn(setting.name, "0", setting.remedy),
        Ok(number) => Line::pass(setting.name, format!("{number}")),
        Err(_) => Line::warn(setting.name, format!("no /{}", setting.path), setting.remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that has these files.
    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for (name, content) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, content).expect("written");
        }
        dir
    }

    /// The lines that are not passed, by name.
    fn told(files: &[(&str, &str)]) -> Vec<(&'static str, bool)> {
        let host = host(files);
        let lines = lines(host.path(), &host.path().join("run"), false);
        lines.into_iter().filter(|line| line.remedy.is_some()).map(|line| (line.name, line.ok)).collect()
    }

    const SOUND: [(&str, &str); 17] = [
        ("sys/devices/system/cpu/vulnerabilities/mds", "Not affected\n"),
        ("sys/devices/system/cpu/vulnerabilities/retbleed", "Mitigation: untrained return thunk\n"),
        ("proc/cmdline", "root=/dev/vda mitigations=auto,nosmt quiet\n"),
        ("sys/devices/system/cpu/smt/active", "0\n"),
        ("sys/module/kvm_amd/parameters/npt", "Y\n"),
        ("sys/module/kvm/parameters/tdp_mmu", "Y\n"),
        ("sys/module/kvm_amd/parameters/nested", "0\n"),
        ("sys/module/kvm/parameters/nx_huge_pages", "N\n"),
        ("sys/kernel/mm/ksm/run", "0\n"),
        ("proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 1\n"),
        ("proc/sys/fs/file-max", "9223372036854775807\n"),
        (
            "proc/self/limits",
            "Max processes 1 1 processes\nMax open files            1024                 524288               files\n",
        ),
        ("proc/sys/kernel/yama/ptrace_scope", "1\n"),
        ("proc/sys/kernel/kptr_restrict", "2\n"),
        ("proc/sys/kernel/unprivileged_bpf_disabled", "2\n"),
        ("proc/sys/kernel/io_uring_disabled", "2\n"),
        ("proc/sys/kernel/dmesg_restrict", "1\n"),
    ];

    #[test]
    fn a_sound_host_has_nothing_to_do_but_for_its_device() {
        assert_eq!(told(&SOUND), [("kvm access", true)]);
    }

    #[test]
    fn what_is_open_fails_and_what_is_doubtful_warns() {
        let weak = [
            ("sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable; SMT vulnerable\n"),
            ("proc/cmdline", "mitigations=auto;no_guest_host\n"),
            ("sys/devices/system/cpu/smt/active", "1\n"),
            ("sys/module/kvm_amd/parameters/npt", "N\n"),
            ("sys/module/kvm/parameters/tdp_mmu", "N\n"),
            ("sys/module/kvm_amd/parameters/nested", "1\n"),
            ("sys/kernel/mm/ksm/run", "1\n"),
            ("proc/sys/fs/file-max", "600000\n"),
            ("proc/sys/kernel/io_uring_disabled", "0\n"),
            ("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 1\n"),
            ("proc/sys/kernel/kptr_restrict", "0\n"),
            ("run/box", ""),
        ];
        let files = [&SOUND[..], &weak].concat();
        let expected = [
            ("cpu flaws", false),
            ("command line", false),
            ("threads", true),
            ("paging", false),
            ("page tables", true),
            ("nested", true),
            ("kvm access", true),
            ("page merging", true),
            ("swap", true),
            ("open files", true),
            ("state folder", false),
            ("addresses", true),
            ("io_uring", true),
        ];
        assert_eq!(told(&files), expected);
    }

    #[test]
    fn a_host_that_tells_nothing_passes_nothing_that_matters() {
        let silent = told(&[]);
        for name in ["cpu flaws", "command line", "threads", "paging", "nested", "huge pages", "open files", "ptrace"] {
            assert!(silent.contains(&(name, true)), "{name}: {silent:?}");
        }
    }

    #[test]
    fn threads_of_a_core_are_no_matter_where_the_kernel_keeps_vms_apart() {
        let passes = |active, has_core_scheduling| threads(active, has_core_scheduling).remedy.is_none();
        assert!(passes("0", false) && passes("1", true) && passes("", true));
        assert!(!passes("1", false) && !passes("", false));
    }

    #[test]
    fn a_flaw_that_is_mitigated_in_part_warns() {
        let partly = ("sys/devices/system/cpu/vulnerabilities/mds", "Mitigation: Clear CPU buffers; SMT vulnerable\n");
        assert_eq!(told(&[&SOUND[..], &[partly]].concat()), [("cpu flaws", true), ("kvm access", true)]);
    }
}
