//! What happens in a running container: more processes, standard input, terminals, limits, statistics, and a reader that is slow.
//!
//! One container has most of it done to it, for a VM takes seconds to start on an emulated host.

use std::fs::File;
use std::io::{Read as _, Write as _};

use serde_json::json;
use tests::checks;
use tests::containerd::{Check, Containerd, Events, Streams, process};
use tonic::Code;

const CHECKS: &[Check] = checks![
    processes_are_executed_in_a_container,
    standard_input_ends_when_it_is_closed,
    a_terminal_has_the_size_that_it_was_given,
    limits_change_and_statistics_tell_what_is_used,
    a_slow_reader_gets_everything,
    output_goes_to_a_file,
];

/// What depends most on the release.
const SHORT_CHECKS: &[Check] = checks![processes_are_executed_in_a_container, standard_input_ends_when_it_is_closed];

tests::tell_each_release!(CHECKS, SHORT_CHECKS);

const SLEEP: [&str; 2] = ["sleep", "1000"];

fn processes_are_executed_in_a_container(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let mut events = Events::subscribe(&client).await.expect("subscribed");
        let mut task = client.create("one", &SLEEP, |_| {}).await.expect("created");
        let early = task.exec("early", &["true"]).await;
        assert!(early.is_err(), "the container does not run yet");
        task.start().await.expect("started");
        assert_eq!(
            task.run("two", &["sh", "-c", "hostname; echo err >&2; exit 6"]).await,
            (6, "one\nerr\n".to_owned())
        );
        assert_eq!(events.topics("one").len(), 0, "nothing was asked for yet");
        let _ = events.until("one", "/tasks/exit").await;
        let first = ["/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"];
        assert_eq!(events.topics("one"), first);
        let added = task.exec("three", &SLEEP).await.expect("added");
        let again = task.exec("three", &SLEEP).await.map(drop).expect_err("the name is taken");
        assert_eq!(again.code(), Code::AlreadyExists, "{again:?}");
        let mut three = added;
        three.start().await.expect("started");
        assert_eq!(three.status().await.expect("status"), "RUNNING");
        assert!(task.pids().await.expect("process ids").len() >= 2);
        three.kill(15).await.expect("killed");
        assert_eq!(three.wait().await.expect("waited"), 143);
        assert_eq!(three.delete().await.expect("deleted"), 143);
        let gone = three.delete().await.expect_err("it was deleted");
        assert_eq!(gone.code(), Code::NotFound, "{gone:?}");
        let mut missing = task.exec("four", &["/bin/missing"]).await.expect("added");
        let refused = missing.start().await.expect_err("it is not there");
        assert!(refused.message().contains("/bin/missing"), "{refused:?}");
        task.kill_and_remove().await.expect("removed");
    });
}

fn standard_input_ends_when_it_is_closed(containerd: &mut Containerd) {
    let client = containerd.client();
    let dir = containerd.path("");
    containerd.block_on(async {
        let streams = Streams::make(&dir, "one").with_stdin(&dir, "one");
        let mut cat = client.create_with("one", &["cat"], streams, |_| {}).await.expect("created");
        cat.start().await.expect("started");
        let mut stdin = Streams::open_stdin(&dir.join("one-stdin"));
        stdin.write_all(b"typed\n").expect("written");
        cat.close_stdin().await.expect("closed");
        drop(stdin);
        assert_eq!(cat.wait().await.expect("waited"), 0);
        assert_eq!(cat.output(), "typed\n");
        cat.remove().await.expect("removed");
    });
}

fn a_terminal_has_the_size_that_it_was_given(containerd: &mut Containerd) {
    let client = containerd.client();
    let dir = containerd.path("");
    containerd.block_on(async {
        let mut task = client.create("one", &SLEEP, |_| {}).await.expect("created");
        task.start().await.expect("started");
        let mut shell =
            process(&["sh", "-c", "tty; trap 'stty size; exit 0' WINCH; echo ready; while true; do sleep 0.1; done"]);
        shell["terminal"] = json!(true);
        let terminal = Streams::terminal(&dir, "two");
        let mut shell = task.exec_with("two", shell, terminal).await.expect("added");
        shell.start().await.expect("started");
        shell.resize(101, 31).await.expect("resized");
        let ended = tokio::time::timeout(std::time::Duration::from_secs(5), shell.wait()).await;
        if ended.is_err() {
            // The size was set before the trap was.
            shell.resize(102, 31).await.expect("resized");
            assert_eq!(shell.wait().await.expect("waited"), 0);
        }
        let shown = shell.output();
        assert!(shown.contains("/dev/pts/") && (shown.contains("31 101") || shown.contains("31 102")), "{shown:?}");
        shell.delete().await.expect("deleted");
        task.kill_and_remove().await.expect("removed");
    });
}

fn limits_change_and_statistics_tell_what_is_used(containerd: &mut Containerd) {
    let client = containerd.client();
    containerd.block_on(async {
        let mut task = client.create("one", &SLEEP, |_| {}).await.expect("created");
        task.start().await.expect("started");
        task.update(&json!({ "memory": { "limit": 64 << 20 }, "pids": { "limit": 50 } })).await.expect("updated");
        let (_, limit) = task.run("two", &["cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/pids.max"]).await;
        assert_eq!(limit, format!("{}\n50\n", 64 << 20));
        let metrics = containerd.ctr(&["tasks", "metrics", "one"]);
        let shown = metrics.success();
        assert!(shown.contains("memory.usage_limit") && shown.contains(&(64 << 20).to_string()), "{shown}");
        assert!(shown.contains("pids.limit"), "{shown}");
        task.kill_and_remove().await.expect("removed");
    });
}

fn a_slow_reader_gets_everything(containerd: &mut Containerd) {
    const LEN: usize = 100_000_000;
    let client = containerd.client();
    let dir = containerd.path("");
    containerd.block_on(async {
        let script = format!("head -c {LEN} /dev/zero; echo end");
        let streams = Streams::unread(&dir, "one");
        let stdout = streams.stdout();
        let reader = std::thread::spawn(move || {
            let mut file = File::open(stdout).expect("a FIFO");
            let (mut total, mut chunk) = (0, [0; 4096]);
            loop {
                let len = file.read(&mut chunk).expect("read");
                if len == 0 {
                    return total;
                }
                total += len;
                std::thread::yield_now();
            }
        });
        let errors = streams.stderr_reader();
        let mut task = client.create_with("one", &["sh", "-c", &script], streams, |_| {}).await.expect("created");
        task.start().await.expect("started");
        assert_eq!(task.wait().await.expect("waited"), 0);
        assert_eq!(task.remove().await.expect("removed"), 0);
        drop(errors);
        assert_eq!(reader.join().expect("read"), LEN + "end\n".len());
    });
}

fn output_goes_to_a_file(containerd: &mut Containerd) {
    let client = containerd.client();
    let file = containerd.path("output");
    containerd.block_on(async {
        let streams = Streams::to(&format!("file://{}", file.display()));
        let mut task = client.create_with("one", &["echo", "kept"], streams, |_| {}).await.expect("created");
        task.start().await.expect("started");
        assert_eq!(task.wait().await.expect("waited"), 0);
        task.remove().await.expect("removed");
    });
    assert_eq!(std::fs::read_to_string(&file).expect("the file"), "kept\n");
}
