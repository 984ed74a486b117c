//! Containers and processes come and go again and again through containerd, and nothing of them stays.

use std::fs;
use std::time::Duration;

use futures::future::join_all;
use tests::containerd::{Check, Client, Containerd};
use tests::cri::{CONTAINER_RUNNING, Cri, Pod, container};
use tests::{becomes_true, checks};

const CHECKS: &[Check] = checks![
    vms_leave_nothing,
    vms_at_a_time_leave_nothing,
    containers_leave_nothing_in_their_pod,
    processes_leave_nothing_in_their_container,
];

tests::tell_each_release!(CHECKS, &[]);

const SLEEP: [&str; 2] = ["sleep", "1000"];
const SHIM: &str = "containerd-shim-vm-v2";

/// How many come and go: all, or as many as an emulated host does in a minute.
fn number_of(all: u32, few: u32) -> u32 {
    if tests::tells_all() { all } else { few }
}

/// What a pod has of the host.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// Open in the shim and the VMM.
    descriptors: usize,
    /// Of both.
    threads: usize,
    /// Memory that only the shim has, in KiB.
    shim_kib: u64,
}

/// What the shim may keep for the next container, in KiB.
const SLACK_KIB: u64 = 512;

impl Held {
    fn by(containerd: &Containerd) -> Self {
        let shims = containerd.processes(SHIM);
        let all = [&shims[..], &containerd.processes("vmm")[..]].concat();
        let count = |folder: &str| {
            let entries = |pid: &u32| fs::read_dir(format!("/proc/{pid}/{folder}")).map_or(0, Iterator::count);
            all.iter().map(entries).sum()
        };
        Self { descriptors: count("fd"), threads: count("task"), shim_kib: shims.into_iter().map(private_kib).sum() }
    }

    fn is_within(&self, before: &Self) -> bool {
        self.descriptors <= before.descriptors
            && self.threads <= before.threads
            && self.shim_kib <= before.shim_kib + SLACK_KIB
    }
}

/// Memory that only this process has (proc(5), `smaps_rollup`).
fn private_kib(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let private = rollup.lines().filter_map(|line| line.strip_prefix("Private_Dirty:")?.strip_suffix("kB"));
    private.filter_map(|kib| kib.trim().parse::<u64>().ok()).sum()
}

/// A connection, or a thread without work, ends a moment after its last use.
fn assert_held(containerd: &Containerd, before: Held) {
    let is_within = becomes_true(Duration::from_secs(20), || Held::by(containerd).is_within(&before));
    println!("{before:?} became {:?}", Held::by(containerd));
    assert!(is_within, "what the pod has did not come back to what it was");
}

/// One life of a container that is killed.
async fn kill(client: &Client, id: &str) {
    let mut task = client.create(id, &SLEEP, |_| {}).await.expect("created");
    task.start().await.expect("started");
    assert_eq!(task.kill_and_remove().await.expect("removed"), 137);
}

fn vms_leave_nothing(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        for number in 0..number_of(500, 2) {
            kill(&client, &format!("row-{number}")).await;
        }
    });
}

fn vms_at_a_time_leave_nothing(containerd: &mut Containerd) {
    let client = containerd.client();
    let ids: Vec<String> = (0..number_of(20, 3)).map(|number| format!("time-{number}")).collect();
    containerd.block_on(async {
        for _ in 0..number_of(25, 1) {
            join_all(ids.iter().map(|id| kill(&client, id))).await;
        }
    });
}

/// One life of a container that crashes.
async fn crash(mut cri: Cri, pod: &Pod, name: &str, attempt: u32) {
    let mut crashing = container(name, "exit 1");
    crashing.metadata.as_mut().expect("metadata").attempt = attempt;
    let crashing = cri.start(pod, crashing).await.expect("started");
    assert_eq!(cri.until_exited(&crashing).await.exit_code, 1);
    cri.remove(&crashing).await.expect("removed");
}

fn containers_leave_nothing_in_their_pod(containerd: &mut Containerd) {
    const AT_A_TIME: u32 = 10;
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let pod = cri.run_pod(cri.pod_config("story-pod"), "vm").await.expect("a pod");
        let witness = cri.start(&pod, container("witness", "exec sleep 10000")).await.expect("started");
        let names: Vec<String> = (0..AT_A_TIME).map(|number| format!("burst-{number}")).collect();
        let burst = async |attempt: u32| {
            join_all(names.iter().map(|name| crash(cri.clone(), &pod, name, attempt))).await;
        };
        burst(0).await;
        let before = Held::by(containerd);
        for attempt in 0..number_of(250, 10) {
            crash(cri.clone(), &pod, "looping", attempt).await;
        }
        for attempt in 1..=number_of(250, 10) / AT_A_TIME {
            burst(attempt).await;
        }
        assert_held(containerd, before);
        assert_eq!(cri.status(&witness).await.state, CONTAINER_RUNNING);
        cri.remove_pod(&pod).await.expect("removed");
    });
}

fn processes_leave_nothing_in_their_container(containerd: &mut Containerd) {
    const AT_A_TIME: u32 = 10;
    let client = containerd.client();
    containerd.block_on(async {
        let mut task = client.create("one", &SLEEP, |_| {}).await.expect("created");
        task.start().await.expect("started");
        let burst = async |number: u32| {
            let names: Vec<String> = (0..AT_A_TIME).map(|part| format!("exec-{number}-{part}")).collect();
            let echo =
                async |name: &String| assert_eq!(task.run(name, &["echo", name]).await, (0, format!("{name}\n")));
            join_all(names.iter().map(echo)).await;
        };
        burst(0).await;
        let before = Held::by(containerd);
        let bursts = number_of(1000, 50) / AT_A_TIME;
        for number in 1..=bursts {
            burst(number).await;
            if number % bursts.div_ceil(4) == 0 {
                println!("after {} execs {:?}", number * AT_A_TIME, Held::by(containerd));
            }
        }
        assert_held(containerd, before);
        task.kill_and_remove().await.expect("removed");
    });
}
