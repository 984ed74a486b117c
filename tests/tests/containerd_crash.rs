//! Each process is killed with SIGKILL, and containerd comes to know the truth; containers are made and ended again and again. Nothing is left.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt as _};
use rustix::process::Signal;
use tests::containerd::{Check, Client, Containerd, Process, Streams};
use tests::{checks, eventually};

const CHECKS: &[Check] = checks![
    a_vmm_killed_at_any_step_ends_the_container_with_137,
    a_shim_killed_at_any_step_leaves_nothing,
    a_guest_that_resets_itself_ends_the_container,
    a_container_outlives_containerd,
    a_container_that_ends_while_containerd_is_away_is_told_once,
    a_stopped_vmm_is_killed,
    nobody_reads_and_the_container_is_killed_in_time,
    output_to_a_full_disk_does_not_stop_the_deletion,
    cycles_leave_nothing,
];

/// What depends most on the release.
const SHORT_CHECKS: &[Check] = checks![
    a_shim_killed_at_any_step_leaves_nothing,
    a_container_outlives_containerd,
    a_container_that_ends_while_containerd_is_away_is_told_once,
];

tests::tell_each_release!(CHECKS, SHORT_CHECKS);

const SLEEP: [&str; 2] = ["sleep", "1000"];

/// Time in which the truth is known, on a host that is emulated and busy.
const CONVERGED: Duration = Duration::from_secs(20);

/// What a container is at when somebody is killed.
#[derive(Clone, Copy, Debug)]
enum Step {
    Created,
    Executing,
    /// Its deletion was asked for, and nobody has answered yet.
    Deleting,
}

async fn started(client: &Client) -> Process {
    let mut task = client.create("one", &SLEEP, |_| {}).await.expect("created");
    task.start().await.expect("started");
    task
}

/// A container at a step, or about to be.
async fn at(client: &Client, step: Step) -> Process {
    let mut task = client.create("one", &SLEEP, |_| {}).await.expect("created");
    if matches!(step, Step::Created) {
        return task;
    }
    task.start().await.expect("started");
    let mut exec = task.exec("two", &SLEEP).await.expect("added");
    exec.start().await.expect("started");
    if matches!(step, Step::Executing) {
        return task;
    }
    task.kill(9).await.expect("killed");
    assert_eq!(task.wait().await.expect("waited"), 137);
    task
}

/// Kills a program, where that is the step while the container's deletion is on its way.
async fn kill_at(containerd: &Containerd, program: &str, task: &Process, step: Step) {
    let kill = async { containerd.signal_all(program, Signal::KILL) };
    match step {
        // The request is sent first; it may be answered, or lose whom it has asked.
        Step::Deleting => _ = tokio::join!(task.delete(), kill),
        Step::Created | Step::Executing => kill.await,
    }
}

/// Waits until containerd has no task, as a client that asks for the deletion again and again, and removes the container.
async fn assert_gone(client: &Client, step: Step) {
    let killed = Instant::now();
    while !client.tasks().await.expect("tasks").is_empty() {
        assert!(killed.elapsed() < CONVERGED, "{step:?}: containerd still has the task");
        let _ = Process::of(client, "one").delete().await;
    }
    println!("{step:?}: gone after {} ms", killed.elapsed().as_millis());
    client.forget("one").await.expect("removed");
}

fn a_vmm_killed_at_any_step_ends_the_container_with_137(containerd: &mut Containerd) {
    let client = containerd.client();
    let tell = |step| {
        containerd.block_on(async {
            let task = at(&client, step).await;
            kill_at(containerd, "vmm", &task, step).await;
            if !matches!(step, Step::Deleting) {
                assert_eq!(task.wait().await.expect("waited"), 137, "{step:?}");
                assert_eq!(task.delete().await.expect("deleted"), 137, "{step:?}");
            }
            assert_gone(&client, step).await;
        });
    };
    [Step::Created, Step::Executing, Step::Deleting].into_iter().for_each(tell);
}

fn a_shim_killed_at_any_step_leaves_nothing(containerd: &mut Containerd) {
    let client = containerd.client();
    let tell = |step| {
        containerd.block_on(async {
            let task = at(&client, step).await;
            kill_at(containerd, "containerd-shim-vm-v2", &task, step).await;
            eventually(CONVERGED, "the VMM ends with the shim", || containerd.processes("vmm").is_empty());
            assert_gone(&client, step).await;
        });
    };
    [Step::Created, Step::Executing, Step::Deleting].into_iter().for_each(tell);
}

/// The agent cannot be killed; what a guest without it does is a reset.
fn a_guest_that_resets_itself_ends_the_container(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let in_namespaces_of_the_guest = |spec: &mut serde_json::Value| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
            namespaces.retain(|namespace| namespace["type"] != "pid");
            for set in ["bounding", "effective", "permitted"] {
                spec["process"]["capabilities"][set].as_array_mut().expect("a set").push("CAP_SYS_BOOT".into());
            }
        };
        let script = ["sh", "-c", "reboot -f; sleep 1000"];
        let mut task = client.create("one", &script, in_namespaces_of_the_guest).await.expect("created");
        // The guest may be gone before the start is answered.
        let _ = task.start().await;
        let asked = Instant::now();
        assert_eq!(task.wait().await.expect("waited"), 255, "nobody knows how it ended");
        assert!(asked.elapsed() < CONVERGED, "{:?}", asked.elapsed());
        assert_eq!(task.remove().await.expect("removed"), 255);
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

/// Each write to /dev/full fails as on a disk without space (full(4)).
fn output_to_a_full_disk_does_not_stop_the_deletion(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let streams = Streams::to("file:///dev/full");
        let mut task = client.create_with("one", &["yes"], streams, |_| {}).await.expect("created");
        task.start().await.expect("started");
        assert_eq!(task.wait().await.expect("waited"), 128 + 13, "its output is a broken pipe");
        let asked = Instant::now();
        assert_eq!(task.remove().await.expect("removed"), 128 + 13);
        assert!(asked.elapsed() < CONVERGED, "{:?}", asked.elapsed());
    });
}

fn cycles_leave_nothing(containerd: &mut Containerd) {
    /// Of 500, what an emulated host does in a minute; `STORY_CYCLES=500` is for a host with time.
    const CYCLES: usize = 3;
    /// At most.
    const AT_A_TIME: usize = 20;
    let cycles = std::env::var("STORY_CYCLES").map_or(CYCLES, |cycles| cycles.parse().expect("a number"));
    let client = containerd.client();
    let started = Instant::now();
    containerd.block_on(async {
        for number in 0..cycles {
            let id = format!("row-{number}");
            let mut task = client.create(&id, &SLEEP, |_| {}).await.expect("created");
            task.start().await.expect("started");
            assert_eq!(task.kill_and_remove().await.expect("removed"), 137);
        }
        println!("{cycles} cycles in a row: {} ms", started.elapsed().as_millis());
        let run = |number| {
            let client = client.clone();
            async move { client.run(&format!("time-{number}"), &["echo", "x"], |_| {}).await }
        };
        let ended: Vec<_> = stream::iter(0..cycles).map(run).buffer_unordered(AT_A_TIME).collect().await;
        assert_eq!(ended, vec![(0, "x\n".to_owned()); cycles]);
        println!("and at a time: {} ms", started.elapsed().as_millis());
    });
}
