//! What containers may not leave behind: processes, mounts, cgroups, sockets, FIFOs, state files, network devices.

use std::fs;
use std::path::Path;

use super::Containerd;
use super::room::{Room, program};
use crate::assert_nothing;

/// Programs that stay: containerd and what the room or a story runs.
const STAYING: [&str; 5] = ["containerd", "ctr", "timeout", "nsenter", "dash"];

/// Asserts that containerd has no container and the room nothing that was one's.
pub(super) fn assert_idle(containerd: &Containerd, room: &Room) {
    let client = containerd.client();
    let tasks = containerd.block_on(client.tasks()).expect("tasks");
    assert!(tasks.is_empty(), "tasks left behind: {tasks:?}");
    let containers = containerd.block_on(client.containers()).expect("containers");
    assert!(containers.is_empty(), "containers left behind: {containers:?}");
    assert_nothing("processes", || processes(room));
    assert_nothing("mounts", || mounts(room));
    assert_nothing("cgroups", || cgroups(room));
    assert_nothing("files", || files(room));
    assert_nothing("network devices", || network_devices(room));
}

/// Asserts that nothing runs in the room once containerd has stopped.
pub(super) fn assert_gone(room: &Room) {
    assert_nothing("processes", || room.processes().into_iter().map(describe).collect());
}

fn processes(room: &Room) -> Vec<String> {
    room.processes().into_iter().filter(|pid| !STAYING.contains(&program(*pid).as_str())).map(describe).collect()
}

fn describe(pid: u32) -> String {
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ");
    format!("{pid} {command}")
}

/// Mounts on the state of containerd, on network namespaces of its pods and on snapshots.
fn mounts(room: &Room) -> Vec<String> {
    let dir = room.dir().display().to_string();
    let is_container = |mount: &String| {
        let target = mount.split(' ').nth(1).unwrap_or_default();
        target.starts_with("/run/containerd/")
            || target.starts_with("/run/netns/cni-")
            || target.starts_with(&format!("{dir}/run/"))
            || target.starts_with(&format!("{dir}/root/"))
    };
    room.mounts().into_iter().filter(is_container).collect()
}

/// Cgroups of containers, which `ctr` and the CRI plugin put below the namespace's name.
fn cgroups(room: &Room) -> Vec<String> {
    entries(&Path::new("/sys/fs/cgroup").join(room.namespace()))
        .into_iter()
        .filter(|path| Path::new(path).is_dir())
        .collect()
}

/// Bundles, sockets of shims, FIFOs, network namespaces.
fn files(room: &Room) -> Vec<String> {
    let state = room.path("run");
    let bundles = ["io.containerd.runtime.v2.task", "io.containerd.sandbox.controller.v1.shim"];
    let bundles = bundles.iter().flat_map(|plugin| entries(&state.join(plugin))).flat_map(|ns| entries(Path::new(&ns)));
    bundles.chain(entries(&state.join("s"))).chain(entries(&state.join("fifo"))).collect()
}

fn network_devices(room: &Room) -> Vec<String> {
    room.network_devices().into_iter().filter(|name| name != "lo" && !name.starts_with("cni")).collect()
}

fn entries(folder: &Path) -> Vec<String> {
    let found = fs::read_dir(folder).into_iter().flatten().flatten();
    found.map(|entry| entry.path().display().to_string()).collect()
}
