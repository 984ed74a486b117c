//! Each process is killed with SIGKILL, and containerd comes to know the truth; containers are made and ended again and again. Nothing is left.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use tests::containerd::{Check, Client, Containerd, Process, Streams};
use tests::{checks, eventually};

const CHECKS: &[Check] = checks![
    a_killed_vmm_ends_the_container_with_137,
    a_killed_shim_leaves_nothing,
    a_container_outlives_containerd,
    a_container_that_ends_while_containerd_is_away_is_told_once,
    a_stopped_vmm_is_killed,
    nobody_reads_and_the_container_is_killed_in_time,
    cycles_leave_nothing,
];

/// What depends most on the release.
const SHORT_CHECKS: &[Check] = checks![a_killed_shim_leaves_nothing, a_container_outlives_containerd];

tests::tell_each_release!(CHECKS, SHORT_CHECKS);

const SLEEP: [&str; 2] = ["sleep", "1000"];

/// Time in which the truth is known, on a host that is emulated and busy.
const CONVERGED: Duration = Duration::from_secs(20);

async fn started(client: &Client) -> Process {
    let mut task = client.create("one", &SLEEP, |_| {}).await.expect("created");
    task.start().await.expect("started");
    task
}

fn signal(containerd: &Containerd, program: &str, signal: Signal) {
    let found = containerd.processes(program);
    assert_eq!(found.len(), 1, "one {program}: {found:?}");
    let pid = i32::try_from(found[0]).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, signal).expect("it runs");
}

fn a_killed_vmm_ends_the_container_with_137(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let task = started(&client).await;
        signal(containerd, "vmm", Signal::KILL);
        let killed = Instant::now();
        assert_eq!(task.wait().await.expect("waited"), 137);
        assert!(killed.elapsed() < CONVERGED, "{:?}", killed.elapsed());
        assert_eq!(task.remove().await.expect("removed"), 137);
    });
}

fn a_killed_shim_leaves_nothing(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let _task = started(&client).await;
        signal(containerd, "containerd-shim-vm-v2", Signal::KILL);
        eventually(CONVERGED, "the VMM ends with the shim", || containerd.processes("vmm").is_empty());
        // containerd cleans up a task whose shim is gone by itself.
        let killed = Instant::now();
        while !client.tasks().await.expect("tasks").is_empty() {
            assert!(killed.elapsed() < CONVERGED, "containerd still has the task");
            // A client that looks at the task may hurry it.
            let _ = Process::of(&client, "one").delete().await;
        }
        client.forget("one").await.expect("removed");
    });
}

fn a_container_outlives_containerd(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async { drop(started(&client).await) });
    containerd.kill();
    containerd.boot();
    let client = containerd.client();
    containerd.block_on(async {
        let task = Process::of(&client, "one");
        assert_eq!(task.status().await.expect("status"), "RUNNING");
        assert_eq!(task.run("two", &["echo", "still here"]).await, (0, "still here\n".to_owned()));
        assert_eq!(task.kill_and_remove().await.expect("removed"), 137);
    });
}

fn a_container_that_ends_while_containerd_is_away_is_told_once(containerd: &mut Containerd) {
    let client = containerd.client();
    let go = containerd.path("go");
    std::fs::create_dir_all(&go).expect("a folder");
    containerd.block_on(async {
        let script = ["sh", "-c", "until [ -e /go/now ]; do sleep 0.1; done; exit 9"];
        let mount =
            serde_json::json!({ "destination": "/go", "type": "bind", "source": go, "options": ["rbind", "ro"] });
        let with_volume = |spec: &mut serde_json::Value| spec["mounts"].as_array_mut().expect("mounts").push(mount);
        let mut task = client.create("one", &script, with_volume).await.expect("created");
        task.start().await.expect("started");
    });
    containerd.kill();
    std::fs::write(Path::new(&go).join("now"), "").expect("a file");
    containerd.boot();
    let client = containerd.client();
    containerd.block_on(async {
        let task = Process::of(&client, "one");
        assert_eq!(task.wait().await.expect("waited"), 9);
        assert_eq!(task.remove().await.expect("removed"), 9);
    });
    std::fs::remove_dir_all(go).expect("nothing holds the volume");
}

fn a_stopped_vmm_is_killed(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let task = started(&client).await;
        signal(containerd, "vmm", Signal::STOP);
        let asked = Instant::now();
        task.kill(9).await.expect("killed");
        assert_eq!(task.wait().await.expect("waited"), 137);
        assert!(asked.elapsed() < CONVERGED, "{:?}", asked.elapsed());
        assert_eq!(task.remove().await.expect("removed"), 137);
    });
}

fn nobody_reads_and_the_container_is_killed_in_time(containerd: &mut Containerd) {
    let client = containerd.client();
    let dir = containerd.path("");
    containerd.block_on(async {
        let streams = Streams::unread(&dir, "one");
        let mut task = client.create_with("one", &["yes"], streams, |_| {}).await.expect("created");
        task.start().await.expect("started");
        let asked = Instant::now();
        task.kill(9).await.expect("killed");
        assert_eq!(task.wait().await.expect("waited"), 137);
        assert_eq!(task.remove().await.expect("removed"), 137);
        assert!(asked.elapsed() < CONVERGED, "{:?}", asked.elapsed());
    });
}

fn cycles_leave_nothing(containerd: &mut Containerd) {
    /// Of the 500 that are wanted, what an emulated host does in a minute.
    const IN_A_ROW: usize = 3;
    const AT_A_TIME: usize = 3;
    let client = containerd.client();
    containerd.block_on(async {
        for number in 0..IN_A_ROW {
            let id = format!("row-{number}");
            let mut task = client.create(&id, &SLEEP, |_| {}).await.expect("created");
            task.start().await.expect("started");
            assert_eq!(task.kill_and_remove().await.expect("removed"), 137);
        }
        let at_once = (0..AT_A_TIME).map(|number| {
            let client = client.clone();
            async move { client.run(&format!("time-{number}"), &["echo", "x"], |_| {}).await }
        });
        let ended = join_all(at_once).await;
        assert_eq!(ended, vec![(0, "x\n".to_owned()); AT_A_TIME]);
    });
}
