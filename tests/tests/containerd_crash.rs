//! Each process is killed with SIGKILL, and containerd comes to know the truth. Nothing is left.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::containerd::{Check, Client, Containerd, Process, Streams};
use tests::{checks, eventually};

const CHECKS: &[Check] = checks![
    a_killed_vmm_ends_the_container_with_137,
    a_killed_shim_leaves_nothing,
    a_container_outlives_containerd,
    a_vmm_is_killed_before_the_start_and_after_the_end,
    a_shim_is_killed_before_the_start_and_after_the_end,
    containerd_is_killed_before_the_start_and_after_the_end,
    a_container_that_ends_while_containerd_is_away_is_told_once,
    a_stopped_vmm_is_killed,
    nobody_reads_and_the_container_is_killed_in_time,
];

/// What depends most on the release.
const SHORT_CHECKS: &[Check] = checks![a_killed_shim_leaves_nothing, a_container_outlives_containerd];

tests::tell_each_release!(CHECKS, SHORT_CHECKS);

const SLEEP: [&str; 2] = ["sleep", "1000"];
const SHIM: &str = "containerd-shim-vm-v2";

/// Time in which the truth is known, on a host that is emulated and busy.
const CONVERGED: Duration = Duration::from_secs(20);

async fn started(client: &Client) -> Process {
    let mut task = client.create("one", &SLEEP, |_| {}).await.expect("created");
    task.start().await.expect("started");
    task
}

/// Kills a program once its process is there, while something is asked for.
async fn kill_during<T>(containerd: &Containerd, program: &str, asked: impl Future<Output = T>) -> T {
    let kill = async {
        while containerd.processes("vmm").is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        containerd.signal(program, Signal::KILL);
    };
    tokio::join!(asked, kill).0
}

/// A container that has ended with 3 and is not deleted.
async fn ended(client: &Client, id: &str) -> Process {
    let mut task = client.create(id, &["sh", "-c", "exit 3"], |_| {}).await.expect("created");
    task.start().await.expect("started");
    assert_eq!(task.wait().await.expect("waited"), 3);
    task
}

/// containerd cleans up a task whose shim is gone by itself.
async fn forgotten(client: &Client, id: &str) {
    let killed = Instant::now();
    while !client.tasks().await.expect("tasks").is_empty() {
        assert!(killed.elapsed() < CONVERGED, "containerd still has the task");
        // A client that looks at the task may hurry it.
        let _ = Process::of(client, id).delete().await;
    }
    client.forget(id).await.expect("removed");
}

fn a_killed_vmm_ends_the_container_with_137(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let task = started(&client).await;
        containerd.signal("vmm", Signal::KILL);
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
        containerd.signal(SHIM, Signal::KILL);
        eventually(CONVERGED, "the VMM ends with the shim", || containerd.processes("vmm").is_empty());
        forgotten(&client, "one").await;
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

fn a_vmm_is_killed_before_the_start_and_after_the_end(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let refused = kill_during(containerd, "vmm", client.create("one", &SLEEP, |_| {})).await;
        let refused = refused.map(drop).expect_err("its VM is gone");
        assert!(refused.message().contains("signal 9"), "{refused}");
        let created = client.create("one", &SLEEP, |_| {}).await.expect("created");
        containerd.signal("vmm", Signal::KILL);
        assert_eq!(created.wait().await.expect("waited"), 137);
        assert_eq!(created.remove().await.expect("removed"), 137);
        let ended = ended(&client, "one").await;
        containerd.signal("vmm", Signal::KILL);
        assert_eq!(ended.remove().await.expect("removed"), 3);
    });
}

fn a_shim_is_killed_before_the_start_and_after_the_end(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let refused = kill_during(containerd, SHIM, client.create("one", &SLEEP, |_| {})).await;
        refused.map(drop).expect_err("its shim is gone");
        // containerd lets go of a name when it has cleaned up.
        let _created = client.create("two", &SLEEP, |_| {}).await.expect("created");
        containerd.signal(SHIM, Signal::KILL);
        forgotten(&client, "two").await;
        let _ended = ended(&client, "three").await;
        containerd.signal(SHIM, Signal::KILL);
        forgotten(&client, "three").await;
    });
}

fn containerd_is_killed_before_the_start_and_after_the_end(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let lost = kill_during(containerd, "containerd", client.create("one", &SLEEP, |_| {})).await;
        lost.map(drop).expect_err("containerd is gone");
    });
    containerd.kill();
    containerd.boot();
    let client = containerd.client();
    containerd.block_on(async {
        forgotten(&client, "one").await;
        drop(client.create("one", &SLEEP, |_| {}).await.expect("created"));
    });
    containerd.kill();
    containerd.boot();
    let client = containerd.client();
    containerd.block_on(async {
        let mut created = Process::of(&client, "one");
        created.start().await.expect("started");
        assert_eq!(created.kill_and_remove().await.expect("removed"), 137);
        drop(ended(&client, "one").await);
    });
    containerd.kill();
    containerd.boot();
    let client = containerd.client();
    containerd.block_on(async {
        let ended = Process::of(&client, "one");
        assert_eq!(ended.status().await.expect("status"), "STOPPED");
        assert_eq!(ended.wait().await.expect("waited"), 3);
        assert_eq!(ended.remove().await.expect("removed"), 3);
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
        containerd.signal("vmm", Signal::STOP);
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
