//! Limits hold, are reported, and can be changed while the container runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use sandbox::ProcessId;
use sandbox::message::event::What;
use sandbox::plan;
use serde_json::json;
use tests::pod::{FAILED_PRECONDITION, Pod, UNIMPLEMENTED, refusal};
use tests::{Story, eventually, outcome};

/// Takes memory until it is killed.
const HOG: &str = "tail /dev/zero";

#[test]
fn container_over_its_memory_is_killed_and_its_processes_are_bounded() {
    let story = Story::new();
    let ran = story.run(&["--memory", "64m", "--pids-limit", "20"], &["sh", "-c", HOG]);
    assert_eq!(ran.code, 137, "{ran:?}");
    let forks =
        "for i in $(seq 40); do sleep 5 & done; cat /sys/fs/cgroup/pids.current; cat /sys/fs/cgroup/pids.events";
    let ran = story.run(&["--pids-limit", "20", "--cpus", "0.2"], &["sh", "-c", forks]);
    assert!(ran.stderr.contains("fork"), "{ran:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn oom_kill_is_an_event_before_the_exit() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    let limited =
        |spec: &mut serde_json::Value| spec["linux"]["resources"] = json!({ "memory": { "limit": 32 << 20 } });
    let _streams = pod.create("one", HOG, limited).await.unwrap();
    pod.0.start("one").await.unwrap();
    let exit = pod.0.wait(&ProcessId::init("one")).await.unwrap();
    assert_eq!((exit.exit_code, exit.oom_killed), (137, true));
    let mut events = Vec::new();
    while !events.iter().any(|event| matches!(event, What::Exit(_))) {
        events.extend(pod.0.next_events().await.unwrap().events.into_iter().filter_map(|event| event.what));
    }
    assert!(matches!(events.as_slice(), [What::Oom(_), What::Exit(_)]), "{events:?}");
    assert!(pod.0.stats("one").await.unwrap().memory_events["oom_kill"] > 0);

    // Another container of the same VM is not concerned.
    let _streams = pod.create("two", "exit 3", limited).await.unwrap();
    pod.0.start("two").await.unwrap();
    let exit = pod.0.wait(&ProcessId::init("two")).await.unwrap();
    assert_eq!((exit.exit_code, exit.oom_killed), (3, false));
    pod.0.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn limits_can_be_changed_and_are_seen_to_hold() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    let _streams = pod.create("one", "while true; do :; done", |_| {}).await.unwrap();
    pod.0.start("one").await.unwrap();
    let resources = json!({
        "memory": { "limit": 50 << 20, "reservation": 20 << 20, "swap": 60 << 20 },
        "cpu": { "shares": 1024, "quota": 10_000, "period": 50_000, "burst": 5_000, "cpus": "0", "mems": "0" },
        "pids": { "limit": 33 },
        "unified": { "memory.high": "41943040" }
    });
    pod.0.update("one", &serde_json::from_value(resources).unwrap()).await.unwrap();
    let id = ProcessId { container_id: "one".into(), exec_id: "look".into() };
    let files = "cd /sys/fs/cgroup; cat memory.max memory.low memory.high memory.swap.max cpu.max cpu.max.burst cpu.weight cpuset.cpus pids.max";
    let process =
        json!({ "user": { "uid": 0, "gid": 0 }, "args": ["/bin/sh", "-c", files], "cwd": "/", "env": ["PATH=/bin"] });
    let wanted = sandbox::WantedStreams { stdin: false, output: true, terminal: None };
    let streams = pod.0.exec(&id, &serde_json::from_value(process).unwrap(), wanted).await.unwrap();
    let text = tests::pod::read(streams.stdout).await;
    assert_eq!(text, "52428800\n20971520\n41943040\n10485760\n10000 50000\n5000\n100\n0\n33\n");
    pod.0.wait(&id).await.unwrap();

    let stats = pod.0.stats("one").await.unwrap();
    assert!(stats.cpu_throttled_periods > 0 && stats.cpu_throttled_us > 0, "{stats:?}");
    assert_eq!((stats.memory_max, stats.pids_max, stats.swap_max), (50 << 20, 33, 10 << 20));

    let swappy = json!({ "memory": { "swappiness": 10 } });
    let refused = refusal(pod.0.update("one", &serde_json::from_value(swappy).unwrap()).await);
    assert!(refused.0 == UNIMPLEMENTED && refused.1.contains("swappiness"), "{refused:?}");
    let absurd = json!({ "cpu": { "quota": 1, "period": 1 } });
    let refused = refusal(pod.0.update("one", &serde_json::from_value(absurd).unwrap()).await);
    assert!(refused.0 == FAILED_PRECONDITION && refused.1.contains("cpu.max"), "{refused:?}");
    pod.0.delete(&ProcessId::init("one"), true).await.unwrap();
    pod.0.stop().await;
}

/// What a VM may take of the host beside its memory.
const OVERHEAD: u64 = 64 << 20;

#[test]
fn all_that_a_vm_costs_is_in_a_cgroup_of_the_host_with_limits() {
    let story = Story::new();
    story.detach("one", &["--memory", "100m"], &["sleep", "1000"]);
    let inspected = story.inspect("one");
    let cgroup = PathBuf::from(inspected["HostConfig"]["Cgroup"].as_str().expect("a cgroup"));
    let read = |file: &str| fs::read_to_string(cgroup.join(file)).expect("a file of the cgroup").trim().to_owned();
    // A thread of the host's kernel that serves the VM is in it too.
    let vmm = inspected["State"]["Pid"].to_string();
    assert!(read("cgroup.procs").lines().any(|pid| pid == vmm));
    assert_eq!(read("cpu.max"), "200000 100000", "its vCPU and one CPU for what serves it");
    assert_eq!(read("pids.max"), "257");
    let size = plan::vm_size(1.0, 100 << 20).expect("a size");
    assert_eq!(read("memory.max"), ((u64::from(size.memory_mib) << 20) + OVERHEAD).to_string());
    let used: u64 = read("memory.current").parse().expect("a number");
    assert!(used > 20 << 20, "its RAM is not charged to it: {used}");
    let _ = story.call(&["rm", "--force", "one"]).success();
    assert!(!cgroup.exists());
}

#[test]
fn memory_that_a_container_has_freed_is_the_hosts_again() {
    const TAKE_AND_FREE: &str = "dd if=/dev/zero of=/dev/null bs=100M count=1 && echo freed";
    let story = Story::new();
    story.detach("one", &["--memory", "200m"], &["sh", "-c", &format!("{TAKE_AND_FREE}; sleep 1000")]);
    let cgroup = PathBuf::from(story.inspect("one")["HostConfig"]["Cgroup"].as_str().expect("a cgroup"));
    let read = |file: &str| -> u64 {
        let bytes = fs::read_to_string(cgroup.join(file)).expect("a file of the cgroup");
        bytes.trim().parse().expect("a number")
    };
    let ended = || story.call(&["logs", "one"]).success().contains("freed");
    eventually(Duration::from_secs(30), "the memory is freed", ended);
    assert!(read("memory.peak") > 120 << 20, "it never had the memory");
    eventually(Duration::from_secs(30), "the host has it again", || read("memory.current") < 80 << 20);
    assert_eq!(story.call(&["exec", "one", "sh", "-c", TAKE_AND_FREE]).success(), "freed\n");
    let _ = story.call(&["rm", "--force", "one"]).success();
}

#[test]
fn a_guest_that_fills_the_hosts_memory_by_a_share_ends_itself_and_nobody_else() {
    let story = Story::new();
    story.detach("neighbour", &[], &["sleep", "1000"]);
    // The folder of the story is memory of the host.
    let volume = story.volume_at_mnt();
    let fill = "dd if=/dev/zero of=/mnt/big bs=1M count=400";
    let ran = story.run(&["--memory", "100m", "--volume", &volume], &["sh", "-c", fill]);
    assert_eq!(ran.code, 125, "{ran:?}");
    assert!(ran.stderr.contains("it took more memory of the host than its size allows"), "{ran:?}");
    let written = fs::metadata(story.volume().join("big")).expect("what it wrote").len();
    assert!(written < 300 << 20, "{written}");
    assert_eq!(story.call(&["exec", "neighbour", "echo", "alive"]).success(), "alive\n");
    let _ = story.call(&["rm", "--force", "neighbour"]).success();
}

/// A loop device over a file of the story, with an ext4 that is mounted at a folder of it.
struct LoopDisk {
    device: String,
    mount_point: String,
}

impl LoopDisk {
    fn mounted_at(folder: &Path) -> Self {
        let image = folder.with_extension("ext4");
        fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("an image");
        let device = host("losetup", &["--find", "--show", &image.display().to_string()]).trim().to_owned();
        let disk = Self { device, mount_point: folder.display().to_string() };
        host("mkfs.ext4", &["-q", &disk.device]);
        host("mount", &[&disk.device, &disk.mount_point]);
        disk
    }

    /// As cgroups name it.
    fn numbers(&self) -> String {
        let name = self.device.strip_prefix("/dev/").expect("a device");
        fs::read_to_string(format!("/sys/class/block/{name}/dev")).expect("its numbers").trim().to_owned()
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        eventually(Duration::from_secs(10), "the host unmounts it", || {
            Command::new("umount").arg(&self.mount_point).status().expect("umount starts").success()
        });
        host("losetup", &["--detach", &self.device]);
    }
}

/// Runs a program of the host; returns its output.
fn host(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments);
    outcome(command).success().to_owned()
}

#[test]
fn a_guest_writes_to_a_disk_of_the_host_no_faster_than_its_vm_may() {
    let story = Story::new();
    let disk = LoopDisk::mounted_at(&story.volume());
    let at = |rate: &str| format!("{}:{rate}", disk.device);
    let volume = story.volume_at_mnt();
    let limits =
        ["--device-write-bps", &at("1mb"), "--device-read-bps", &at("64mb"), "--device-read-iops", &at("1000")];
    story.detach("one", &[&["--volume", &volume], &limits[..]].concat(), &["sleep", "1000"]);

    let host_config = story.inspect("one")["HostConfig"].take();
    assert_eq!(host_config["BlkioDeviceWriteBps"], json!([{ "Path": disk.device, "Rate": 1 << 20 }]));
    assert_eq!(host_config["BlkioDeviceReadIOps"], json!([{ "Path": disk.device, "Rate": 1000 }]));
    assert_eq!(host_config["BlkioDeviceWriteIOps"], json!([]));
    let cgroup = PathBuf::from(host_config["Cgroup"].as_str().expect("a cgroup"));
    let numbers = disk.numbers();
    let of_disk = |file: &str| {
        let text = fs::read_to_string(cgroup.join(file)).expect("a file of the cgroup");
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{numbers} ")));
        line.unwrap_or_else(|| panic!("no {numbers} in {file}: {text}")).to_owned()
    };
    assert_eq!(of_disk("io.max"), "rbps=67108864 wbps=1048576 riops=1000 wiops=max");

    let began = Instant::now();
    let write = "dd if=/dev/zero of=/mnt/big bs=1M count=8 conv=fsync";
    let _ = story.call(&["exec", "one", "sh", "-c", write]).success();
    // A slice of the kernel's may be ahead of its time.
    assert!(began.elapsed() > Duration::from_secs(7), "8 MiB at 1 MiB a second: {:?}", began.elapsed());
    let stat = of_disk("io.stat");
    let written = stat.split(' ').find_map(|field| field.strip_prefix("wbytes=")?.parse::<u64>().ok());
    assert!(written >= Some(8 << 20), "written back by somebody else: {stat}");
    let _ = story.call(&["rm", "--force", "one"]).success();
}

#[test]
fn a_limit_that_the_host_cannot_give_is_refused_before_anything_is_made() {
    let story = Story::new();
    let disk = LoopDisk::mounted_at(&story.volume());
    let refused = |options: &[&str]| {
        let ran = story.run(options, &["true"]);
        assert_eq!(ran.code, 125, "{ran:?}");
        ran.stderr
    };
    assert!(refused(&["--device-read-bps", "/dev/null:1mb"]).contains("/dev/null is no block device"));
    let limited = ["--device-read-bps", &format!("{}:1mb", disk.device)];
    let degraded = refused(&[&limited[..], &["--allow-degraded", "cgroup"]].concat());
    assert!(degraded.contains("limits of the cgroup that --allow-degraded=cgroup does without"), "{degraded}");
}

#[test]
fn a_host_without_cgroups_is_named_and_can_be_allowed() {
    let story = Story::new();
    let without = |options: &[&str], name: &str| {
        let image = story.image();
        let arguments = [&["run", "--name", name], options, &[&image, "echo", "x"]].concat();
        let vmrun = story.vmrun(&arguments);
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "umount /sys/fs/cgroup && exec \"$@\"", "sh"]);
        command.arg(vmrun.get_program()).args(vmrun.get_args());
        outcome(command)
    };
    let ran = without(&["--rm"], "one");
    assert_eq!(ran.code, 125, "{ran:?}");
    for part in ["there is no cgroup v2 at /sys/fs/cgroup", "--allow-degraded=cgroup"] {
        assert!(ran.stderr.contains(part), "{ran:?}");
    }
    assert_eq!(without(&["--allow-degraded", "cgroup"], "two").success(), "x\n");
    assert_eq!(story.inspect("two")["HostConfig"]["Degraded"], json!(["cgroup"]));
    let _ = story.call(&["rm", "two"]).success();
}
