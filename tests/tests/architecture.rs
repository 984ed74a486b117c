//! The rules of the tree that a compiler does not know: who may depend on whom, sizes, unsafe code, and a README that is true.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::liar;
use tests::scorecard::told;

/// Which members a member may link; the tests may link every one.
const ALLOWED_EDGES: [(&str, &[&str]); 10] = [
    ("vmm-api", &[]),
    ("agent-api", &[]),
    ("bpf", &[]),
    ("vmm", &["vmm-api"]),
    ("agent", &["agent-api", "bpf"]),
    ("sandbox", &["vmm-api", "agent-api", "bpf"]),
    ("vmrun", &["sandbox"]),
    ("containerd-shim-vm-v2", &["sandbox"]),
    ("rootfs", &[]),
    ("unfiltered", &["vmm"]),
];

/// Files that opt in to unsafe code.
const UNSAFE_FILES: [&str; 17] = [
    "agent/bpf/src/lib.rs",
    "agent/src/sys.rs",
    "shim/sandbox/src/network/tap.rs",
    "shim/sandbox/src/pid_namespace.rs",
    "tests/bench/init.rs",
    "tests/bench/marker.rs",
    "tests/hostile/src/machine.rs",
    "tests/hostile/src/main.rs",
    "tests/src/bin/escape.rs",
    "tests/src/bin/escape/attempts.rs",
    "vmm/src/inherited.rs",
    "vmm/src/jail/namespaces.rs",
    "vmm/src/kvm.rs",
    "vmm/src/memory.rs",
    "vmm/src/probe.rs",
    "vmm/src/virtio/net/tap.rs",
    "vmm/src/virtio/spans.rs",
];

/// Crates that had an advisory, and the first version without it.
const MENDED_CRATES: [(&str, [u32; 3]); 7] = [
    ("kvm-ioctls", [0, 19, 1]),   // RUSTSEC-2024-0428
    ("linux-loader", [0, 8, 1]),  // CVE-2022-23523
    ("prost", [0, 6, 1]),         // RUSTSEC-2020-0002
    ("protobuf", [3, 7, 2]),      // RUSTSEC-2024-0437
    ("tar", [0, 4, 45]),          // RUSTSEC-2021-0080, RUSTSEC-2026-0067, RUSTSEC-2026-0068
    ("vm-memory", [0, 12, 2]),    // RUSTSEC-2020-0157, RUSTSEC-2023-0056
    ("vmm-sys-util", [0, 12, 0]), // CVE-2023-50711
];

/// Options of the guest's kernel that hinder who attacks it, and that it is to have.
const KERNEL_HAS: [&str; 25] = [
    "BPF_JIT_ALWAYS_ON",
    "BPF_UNPRIV_DEFAULT_OFF",
    "BUG_ON_DATA_CORRUPTION",
    "CPU_MITIGATIONS",
    "FORTIFY_SOURCE",
    "HARDENED_USERCOPY",
    "INIT_STACK_ALL_ZERO",
    "LEGACY_VSYSCALL_NONE",
    "LIST_HARDENED",
    "PANIC_ON_OOPS",
    "RANDOMIZE_KSTACK_OFFSET_DEFAULT",
    "SCHED_STACK_END_CHECK",
    "SECCOMP_FILTER",
    "SECURITY_DMESG_RESTRICT",
    "SECURITY_LANDLOCK",
    "SECURITY_YAMA",
    "SLAB_BUCKETS",
    "SLAB_FREELIST_HARDENED",
    "SLAB_FREELIST_RANDOM",
    "STACKPROTECTOR_STRONG",
    "STATIC_USERMODEHELPER",
    "STRICT_KERNEL_RWX",
    "UBSAN_BOUNDS",
    "UBSAN_TRAP",
    "VMAP_STACK",
];

/// Options that give an attacker something, and that no file may ask for.
const KERNEL_LACKS: [&str; 37] = [
    "ACPI",
    "BT",
    "CAN",
    "COMPAT_BRK",
    "CRASH_DUMP",
    "CRYPTO_USER_API_HASH",
    "CRYPTO_USER_API_SKCIPHER",
    "DEBUG_FS",
    "DEVMEM",
    "DEVPORT",
    "DRM",
    "FTRACE",
    "HIBERNATION",
    "HID",
    "IA32_EMULATION",
    "IP_DCCP",
    "IP_SCTP",
    "KEXEC",
    "KEXEC_FILE",
    "KPROBES",
    "MAGIC_SYSRQ",
    "MODIFY_LDT_SYSCALL",
    "MODULES",
    "PERF_EVENTS",
    "PROC_KCORE",
    "RDS",
    "SOUND",
    "TIPC",
    "USB_SUPPORT",
    "USELIB",
    "USERFAULTFD",
    "VIRTIO_PCI_LEGACY",
    "VSOCKETS_LOOPBACK",
    "WIRELESS",
    "X86_IOPL_IOPERM",
    "X86_MSR",
    "X86_X32_ABI",
];

/// What hardening guides advise and this kernel does not follow: the option, whether it has it, and why.
const KERNEL_EXCEPTIONS: [(&str, bool, &str); 6] = [
    ("INIT_ON_ALLOC_DEFAULT_ON", false, "costs more than one per cent"),
    ("IO_URING", true, "programs are made for it; the default seccomp profile closes it"),
    ("NF_TABLES", true, "networks of pods, and of engines inside one"),
    ("PCI", true, "the devices are on it"),
    ("RANDOMIZE_BASE", false, "an uncompressed kernel is entered where it was linked"),
    ("SECURITY_LOCKDOWN_LSM", false, "what it would lock is not compiled"),
];

/// Most lines of a source file before its tests.
const MAX_FILE_LINES: usize = 500;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every Rust source of the workspace, relative to its root.
fn sources() -> Vec<String> {
    let listed = Command::new("git").args(["ls-files", "*.rs"]).current_dir(root()).output().expect("git runs");
    let names = String::from_utf8(listed.stdout).expect("file names are UTF-8");
    assert!(names.contains("vmm/src/main.rs"), "git lists the sources");
    names.lines().map(str::to_owned).filter(|name| root().join(name).exists()).collect()
}

/// Lines before the unit tests.
fn code_lines(text: &str) -> usize {
    text.lines().take_while(|line| *line != "#[cfg(test)]").count()
}

fn workspace_edges() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let printed = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let metadata: serde_json::Value = serde_json::from_slice(&printed.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let name_of = |value: &serde_json::Value| value["name"].as_str().expect("a name").to_owned();
    let members: BTreeSet<String> = packages.iter().map(name_of).collect();
    let links = |package: &serde_json::Value| {
        let dependencies = package["dependencies"].as_array().expect("dependencies");
        let normal = dependencies.iter().filter(|dependency| dependency["kind"].is_null());
        normal.map(name_of).filter(|name| members.contains(name)).collect()
    };
    packages.iter().map(|package| (name_of(package), links(package))).collect()
}

#[test]
fn components_link_only_what_they_may() {
    let edges = workspace_edges();
    assert!(edges.contains_key("vmm"));
    for (member, linked) in edges.iter().filter(|(member, _)| *member != "tests") {
        let rule = ALLOWED_EDGES.iter().find(|(name, _)| name == member);
        let (_, allowed) = rule.unwrap_or_else(|| panic!("{member} is not in ALLOWED_EDGES"));
        let forbidden: Vec<_> = linked.iter().filter(|name| !allowed.contains(&name.as_str())).collect();
        assert!(forbidden.is_empty(), "{member} must not link {forbidden:?}");
    }
}

#[test]
fn every_function_that_the_readme_follows_exists() {
    let readme = read("README.md");
    let section = readme.split("## Follow one container").nth(1).expect("the section").split("\n## ").next();
    let rows: Vec<&str> = section.expect("the section").lines().filter(|line| line.contains(".rs`")).collect();
    assert!(rows.len() >= 10, "{rows:?}");
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let source = read(cells[3].trim_matches('`'));
        for function in cells[2].split(',').map(|name| name.trim().trim_matches('`')) {
            let name = function.rsplit("::").next().expect("a name");
            assert!(source.contains(&format!("fn {name}(")) || source.contains(&format!("fn {name}<")), "{row}");
        }
    }
}

#[test]
fn every_file_of_stories_is_told() {
    let told = read("tests/tests/main.rs");
    let files = fs::read_dir(root().join("tests/tests")).expect("a folder").flatten();
    let names = files.filter_map(|file| file.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned));
    let forgotten: Vec<_> =
        names.filter(|name| name != "main" && !told.contains(&format!("\nmod {name};\n"))).collect();
    assert!(forgotten.is_empty(), "tests/tests/main.rs has no `mod` of {forgotten:?}");
}

#[test]
fn every_story_that_the_readme_names_for_containerd_is_told() {
    let readme = read("README.md");
    let section = readme.split("\n## containerd and Kubernetes\n").nth(1).expect("the section").split("\n## ").next();
    let rows: Vec<&str> =
        section.expect("the section").lines().filter(|line| line.starts_with('|') && line.contains("::")).collect();
    assert!(rows.len() >= 10, "{rows:?}");
    for row in rows {
        let cell = row.split('|').nth(2).expect("a second column").trim().trim_matches('`');
        let (file, name) = cell.split_once("::").unwrap_or_else(|| panic!("not FILE::STORY: {row}"));
        let source = read(&format!("tests/tests/{file}.rs"));
        // Also named in a list of checks, or else nothing tells it.
        assert_eq!(source.matches(&format!("fn {name}(")).count(), 1, "{row}");
        assert!(
            source.matches(&format!("{name},")).count() + source.matches(&format!("{name}]")).count() >= 1,
            "{row}"
        );
    }
}

/// The names of tests in a row of the advisories.
fn tests_of(row: &str) -> impl Iterator<Item = &str> {
    row.rsplit('|').nth(1).unwrap_or_default().split('`').skip(1).step_by(2)
}

/// Whether a source has a test of that name, or a check that a story tells.
fn is_test(name: &str, source: &str) -> bool {
    let Some((before, _)) = source.split_once(&format!("fn {name}(")) else { return false };
    let before = before.trim_end().trim_end_matches("async").trim_end();
    before.lines().last().is_some_and(|line| line.trim_start().starts_with("#["))
        || source.contains(&format!(" {name},"))
}

#[test]
fn every_test_that_an_advisory_names_exists() {
    let security = read("SECURITY.md");
    let (_, table) = security.split_once("## Advisories").expect("a section");
    let rows: Vec<&str> = table.lines().skip_while(|line| !line.starts_with("|---")).skip(1).collect();
    let rows: Vec<&str> = rows.into_iter().take_while(|line| line.starts_with('|')).collect();
    let sources: Vec<_> = sources().into_iter().map(|name| (read(&name), name)).collect();
    // An entry of a table of attacks begins with its name, as what tells a verdict does.
    let attacks = sources.iter().filter(|(_, name)| name.starts_with("tests/hostile/src/attacks/"));
    let attacks: String = attacks.map(|(text, _)| text.as_str()).collect();
    let lies: Vec<String> = liar::all().into_iter().map(|(name, ..)| name).collect();
    let exists = |name: &str| {
        sources.iter().any(|(text, _)| is_test(name, text))
            || attacks.contains(&format!("(\"{name}\""))
            || lies.iter().any(|lie| lie == name || lie.ends_with(&format!("-{name}")))
    };
    let without: Vec<_> = rows.iter().filter(|row| tests_of(row).next().is_none()).collect();
    assert!(rows.len() >= 30 && without.is_empty(), "{without:?}");
    let missing: Vec<_> = rows.iter().flat_map(|row| tests_of(row)).filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_scorecard_tells_what_can_be_counted_here() {
    assert_eq!(liar::all().len(), told("lying VMM and agent", "lies to `vmrun`"));
    let proofs = sources().iter().map(|name| read(name).matches("\n    fn exhaustive_").count()).sum::<usize>();
    assert_eq!(proofs, told("bounded proofs", "tests"));
    let targets = sources()
        .into_iter()
        .filter_map(|name| Some(name.strip_prefix("tests/fuzz/fuzz_targets/")?.strip_suffix(".rs")?.to_owned()));
    let targets: BTreeSet<String> = targets.collect();
    let readme = read("tests/fuzz/README.md");
    assert!(targets.iter().all(|target| readme.contains(&format!("`{target}`"))), "{targets:?}");
    assert_eq!(targets.len(), told("fuzzing", "targets"));

    // Seconds and inputs of each target, over all runs on record.
    let mut fuzzed: BTreeMap<_, _> = targets.into_iter().map(|target| (target, (0, 0))).collect();
    for line in read("tests/fuzz/executions.txt").lines() {
        let [target, seconds, inputs] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("not a record: {line}") };
        let sum: &mut (usize, usize) = fuzzed.get_mut(target).unwrap_or_else(|| panic!("no such target: {line}"));
        sum.0 += seconds.parse::<usize>().expect("seconds");
        sum.1 += inputs.parse::<usize>().expect("inputs");
    }
    let inputs: usize = fuzzed.values().map(|(_, inputs)| inputs).sum();
    let least_seconds = fuzzed.values().map(|(seconds, _)| *seconds).min().expect("targets");
    let record = (inputs / 1_000_000, least_seconds / 60);
    assert_eq!(record, (told("fuzzing", "million inputs"), told("fuzzing", "minutes")));
}

#[test]
fn the_guest_kernel_is_hardened_but_for_the_exceptions() {
    let files = fs::read_dir(root().join("guest-kernel/config")).expect("a folder");
    let files = files.map(|file| fs::read_to_string(file.expect("an entry").path()).expect("a file"));
    let text: String = files.collect();
    let on: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("CONFIG_")?.split_once("=y").map(|(name, _)| name)).collect();
    let missing: Vec<_> = KERNEL_HAS.iter().filter(|name| !on.contains(*name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let unwanted: Vec<_> = KERNEL_LACKS.iter().filter(|name| on.contains(*name)).collect();
    assert!(unwanted.is_empty(), "{unwanted:?}");
    let stale: Vec<_> = KERNEL_EXCEPTIONS.iter().filter(|(name, has_it, _)| on.contains(name) != *has_it).collect();
    assert!(stale.is_empty(), "no longer an exception: {stale:?}");
}

#[test]
fn no_crate_is_older_than_the_end_of_its_advisory() {
    let lock = read("Cargo.lock");
    for (name, mended) in MENDED_CRATES {
        let begin = format!("name = \"{name}\"\nversion = \"");
        let number = |text: &str| text.parse::<u32>().expect("a number");
        let version = |text: &str| text.split(['.', '"']).take(3).map(number).collect::<Vec<_>>();
        let versions: Vec<_> = lock.split(&begin).skip(1).map(version).collect();
        assert!(!versions.is_empty(), "{name} is not in the lock file any more");
        assert!(versions.iter().all(|version| version.as_slice() >= mended.as_slice()), "{name}: {versions:?}");
    }
}

#[test]
fn the_readme_names_the_command_that_ci_runs() {
    assert!(read("README.md").contains("    make test"));
    assert!(read(".ci/run").lines().any(|line| line == "make test"));
}

#[test]
fn sources_say_what_they_own_and_stay_small() {
    for name in sources() {
        let text = read(&name);
        assert!(text.starts_with("//!"), "{name} does not open with what it owns");
        assert!(code_lines(&text) <= MAX_FILE_LINES, "{name} has {} lines", code_lines(&text));
    }
}

#[test]
fn unsafe_code_stands_only_where_it_may() {
    let opted_in = |name: &String| {
        let text = read(name);
        ["expect", "allow"].iter().any(|attribute| text.contains(&format!("#![{attribute}(unsafe_code")))
    };
    let found: Vec<String> = sources().into_iter().filter(opted_in).collect();
    let unexpected: Vec<_> = found.iter().filter(|name| !UNSAFE_FILES.contains(&name.as_str())).collect();
    assert!(unexpected.is_empty(), "{unexpected:?}");
}
