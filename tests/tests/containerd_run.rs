//! Containers through containerd: `ctr run`, each end of a process, the order of events, signals, pauses, standard input and terminals.
//!
//! With `STORY_RUNTIME=io.containerd.runc.v2` the checks are told with runc, which proves that they are right about containerd.

use std::fs;

use serde_json::json;
use tests::checks;
use tests::containerd::{Check, Containerd, Events};

const CHECKS: &[Check] = checks![
    ctr_runs_a_container_and_exits_as_it_does,
    the_native_snapshotter_has_a_root_file_system_too,
    output_and_exit_status_come_to_the_client,
    events_of_a_process_that_exits_at_once_are_in_order,
    a_signal_ends_a_container_with_128_and_its_number,
    a_container_that_was_not_started_is_deleted,
    a_command_that_is_not_there_is_refused_and_leaves_nothing,
    a_paused_container_does_nothing_until_it_is_resumed,
    a_network_that_is_wired_after_the_creation_is_the_container_s,
    hooks_run_on_the_host_at_their_moments_and_one_that_fails_ends_the_creation,
];

/// What depends most on the release.
const SHORT_CHECKS: &[Check] = checks![
    ctr_runs_a_container_and_exits_as_it_does,
    events_of_a_process_that_exits_at_once_are_in_order,
    a_signal_ends_a_container_with_128_and_its_number,
];

tests::tell_each_release!(CHECKS, SHORT_CHECKS);

const SLEEP: [&str; 2] = ["sleep", "1000"];

fn ctr_runs_a_container_and_exits_as_it_does(containerd: &mut Containerd) {
    let ran = containerd.run("one", &[], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (7, "out\n", "err\n"), "{ran:?}");
}

fn the_native_snapshotter_has_a_root_file_system_too(containerd: &mut Containerd) {
    let ran = containerd.run("one", &["--snapshotter", "native"], &["sh", "-c", "echo kept >/note; cat /note"]);
    assert_eq!(ran.success(), "kept\n", "{ran:?}");
}

fn output_and_exit_status_come_to_the_client(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let (exit_status, output) = client.run("one", &["sh", "-c", "echo out; hostname; exit 3"], |_| {}).await;
        assert_eq!((exit_status, output.as_str()), (3, "out\none\n"));
    });
}

fn events_of_a_process_that_exits_at_once_are_in_order(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let mut events = Events::subscribe(&client).await.expect("subscribed");
        let (exit_status, _) = client.run("one", &["true"], |_| {}).await;
        assert_eq!(exit_status, 0);
        let seen = events.until("one", "/tasks/delete").await;
        assert_eq!(events.topics("one"), ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
        assert_eq!(seen[2].exit_status(), 0);
    });
}

fn a_signal_ends_a_container_with_128_and_its_number(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let script = ["sh", "-c", "trap 'exit 5' TERM; echo up; while true; do sleep 0.1; done"];
        let mut trapping = client.create("one", &script, |_| {}).await.expect("created");
        trapping.start().await.expect("started");
        assert_eq!(trapping.status().await.expect("status"), "RUNNING");
        trapping.kill(9).await.expect("killed");
        assert_eq!(trapping.wait().await.expect("waited"), 137);
        assert_eq!(trapping.status().await.expect("status"), "STOPPED");
        let again = trapping.kill(9).await.expect_err("it has ended");
        assert_eq!(again.code(), tonic::Code::NotFound, "{again:?}");
        assert_eq!(trapping.remove().await.expect("removed"), 137);
    });
}

fn a_container_that_was_not_started_is_deleted(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let created = client.create("one", &SLEEP, |_| {}).await.expect("created");
        assert_eq!(created.status().await.expect("status"), "CREATED");
        created.kill(9).await.expect("killed");
        created.wait().await.expect("waited");
        created.remove().await.expect("removed");
    });
}

fn a_command_that_is_not_there_is_refused_and_leaves_nothing(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let refusal = match client.create("one", &["/bin/missing"], |_| {}).await {
            Err(status) => status,
            Ok(mut created) => {
                let status = created.start().await.expect_err("it is not there");
                created.remove().await.expect("removed");
                status
            }
        };
        assert!(refusal.message().contains("/bin/missing"), "{refusal:?}");
    });
}

fn a_paused_container_does_nothing_until_it_is_resumed(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let mut task = client.create("one", &SLEEP, |_| {}).await.expect("created");
        task.start().await.expect("started");
        task.pause().await.expect("paused");
        assert_eq!(task.status().await.expect("status"), "PAUSED");
        task.exec("refused", &["true"]).await.map(drop).expect_err("it is paused");
        task.resume().await.expect("resumed");
        assert_eq!(task.run("two", &["echo", "goes on"]).await, (0, "goes on\n".to_owned()));
        assert_eq!(task.kill_and_remove().await.expect("removed"), 137);
    });
}

fn a_network_that_is_wired_after_the_creation_is_the_container_s(containerd: &mut Containerd) {
    let look = "ip addr show eth0; ip route; ping -c 2 -W 20 10.88.0.1";
    let ran = containerd.run("one", &["--cni"], &["sh", "-c", look]);
    let output = ran.success();
    assert!(output.contains("inet 10.88.0.") && output.contains("default via 10.88.0.1 dev eth0"), "{output}");
    assert!(output.contains("2 packets received"), "{output}");
}

fn hooks_run_on_the_host_at_their_moments_and_one_that_fails_ends_the_creation(containerd: &mut Containerd) {
    let (drop_in, told) = (containerd.path("etc-vmrun/config.d/hooks.toml"), containerd.path("told"));
    fs::create_dir_all(drop_in.parent().expect("a folder")).expect("made");
    fs::write(&drop_in, "[hooks]\nallowed = true\n").expect("written");
    let hook = |moment: &str, exit_status: u8| {
        let script = format!("echo {moment} >>{}; exit {exit_status}", told.display());
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
    };
    let client = containerd.client();
    containerd.block_on(async {
        let hooks = json!({ "createRuntime": hook("created", 0), "poststart": hook("started", 0), "poststop": hook("deleted", 0) });
        let (exit_status, output) = client.run("one", &["echo", "x"], |spec| spec["hooks"] = hooks).await;
        assert_eq!((exit_status, output.as_str()), (0, "x\n"));
        assert_eq!(fs::read_to_string(&told).expect("hooks have run"), "created\nstarted\ndeleted\n");
        let hooks = json!({ "createRuntime": hook("failed", 3) });
        let refused = client.create("two", &["true"], |spec| spec["hooks"] = hooks).await.map(drop);
        let refused = refused.expect_err("its hook fails");
        assert!(refused.message().contains("exit status"), "{refused}");
    });
    fs::remove_file(drop_in).expect("removed");
}
