//! `vmrun check`: what a host needs, line by line, and what to do about each line that fails.

use std::fs::{self, File};
use std::path::Path;

use anyhow::Result;
use sandbox::artifacts::Artifacts;
use serde::Serialize;

/// One line of the report.
#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    ok: bool,
    detail: String,
}

pub(crate) fn check(json: bool) -> Result<u8> {
    let lines = [cpu(), kvm(), artifacts(), cgroup(), overlay(), memory(), tun()];
    if json {
        println!("{}", serde_json::to_string_pretty(&lines)?);
    } else {
        for line in &lines {
            println!("{}  {:<10} {}", if line.ok { "PASS" } else { "FAIL" }, line.name, line.detail);
        }
    }
    Ok(u8::from(lines.iter().any(|line| !line.ok)))
}

fn cpu() -> Line {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let found = ["vmx", "svm"].into_iter().find(|flag| info.split_whitespace().any(|word| word == *flag));
    match found {
        Some(flag) => Line { name: "cpu", ok: true, detail: format!("hardware virtualization ({flag})") },
        None => Line {
            name: "cpu",
            ok: false,
            detail:
                "no hardware virtualization: switch it on in the firmware, or nested virtualization in the outer VM; \
                     without it a guest's kernel does not run at speed, even where /dev/kvm exists"
                    .to_owned(),
        },
    }
}

fn kvm() -> Line {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Line { name: "kvm", ok: true, detail: "/dev/kvm opens".to_owned() },
        Err(error) => Line {
            name: "kvm",
            ok: false,
            detail: format!(
                "/dev/kvm: {error}: load kvm_intel or kvm_amd, and run as root or in the group of /dev/kvm"
            ),
        },
    }
}

fn artifacts() -> Line {
    match Artifacts::find() {
        Ok(found) => Line { name: "artifacts", ok: true, detail: format!("guest kernel {}", found.kernel.display()) },
        Err(error) => Line { name: "artifacts", ok: false, detail: error.to_string() },
    }
}

fn cgroup() -> Line {
    let ok = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let detail =
        if ok { "version 2" } else { "no cgroup v2 at /sys/fs/cgroup: boot with systemd.unified_cgroup_hierarchy=1" };
    Line { name: "cgroup", ok, detail: detail.to_owned() }
}

fn overlay() -> Line {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let ok = known.split_whitespace().any(|word| word == "overlay");
    let detail = if ok { "overlayfs is there" } else { "no overlayfs: modprobe overlay" };
    Line { name: "overlay", ok, detail: detail.to_owned() }
}

fn memory() -> Line {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available_kib = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or_default();
    let available_mib = available_kib / 1024;
    let ok = available_mib >= 256;
    let advice = if ok { "" } else { ": a small VM takes 256 MiB; free some" };
    Line { name: "memory", ok, detail: format!("{available_mib} MiB available{advice}") }
}

fn tun() -> Line {
    let ok = Path::new("/dev/net/tun").exists();
    let detail = if ok { "/dev/net/tun is there" } else { "no /dev/net/tun: modprobe tun (needed for networks)" };
    Line { name: "tun", ok, detail: detail.to_owned() }
}
