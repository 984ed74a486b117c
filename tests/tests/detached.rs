//! Detached containers: their supervisor, their log, and every command that asks for them by name.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tests::{Story, outcome};

/// Says that it runs, then waits to be ended.
const WAITING: [&str; 3] = ["sh", "-c", "trap 'exit 3' TERM; echo up; while true; do sleep 1; done"];

fn process(pid: &serde_json::Value) -> Pid {
    pid.as_i64().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw).expect("a process id")
}

fn signal(pid: &serde_json::Value, signal: Signal) {
    kill_process(process(pid), signal).expect("the process is there");
}

/// Waits until a process has ended, which must not take long.
fn assert_ends(process: &OwnedFd) {
    let deadline = Timespec { tv_sec: 10, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&deadline)).expect("poll");
    assert_eq!(ended, 1, "the process still runs");
}

#[test]
fn a_detached_container_runs_until_it_is_stopped_and_stays_until_it_is_removed() {
    let story = Story::new();
    story.detach("one", &[], &WAITING);
    assert!(story.call(&["ps"]).success().contains("Up"));
    assert_eq!(story.call(&["stop", "one"]).success(), "one\n");
    assert_eq!(story.call(&["ps", "--quiet"]).success(), "");
    assert!(story.call(&["ps", "--all"]).success().contains("Exited (3)"));
    assert_eq!(story.call(&["wait", "one"]).success(), "3\n");
    assert_eq!(story.call(&["logs", "one"]).success(), "up\n");
    assert_eq!(story.inspect("one")["State"]["ExitCode"], 3);
    assert_eq!(story.call(&["rm", "one"]).success(), "one\n");
    assert_eq!(story.call(&["logs", "one"]).stderr, "vmrun: no such container: one\n");
}

/// Sends all of `request`, ends it, and reads to the end.
fn over_tcp(port: &str, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut connection = TcpStream::connect(("127.0.0.1", port.parse().expect("a port")))?;
    let mut writer = connection.try_clone()?;
    let mut answer = Vec::new();
    std::thread::scope(|scope| {
        let sent = scope.spawn(move || writer.write_all(request).and_then(|()| writer.shutdown(Shutdown::Write)));
        connection.read_to_end(&mut answer)?;
        sent.join().expect("no panic")
    })?;
    Ok(answer)
}

#[test]
fn ports_of_a_container_without_a_network_are_forwarded_until_it_ends() {
    let story = Story::new();
    // Each connection gets back what it sent, once it has ended its side.
    story.detach("one", &[], &["nc", "-ll", "-p", "7", "-e", "cat"]);
    let mut forward = story.vmrun(&["port-forward", "one", ":7", ":8"]);
    let mut forward = forward.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("vmrun starts");
    let mut lines = BufReader::new(forward.stdout.take().expect("piped")).lines();
    let mut port = |remote: &str| {
        let line = lines.next().expect("a line").expect("text");
        let local = line.strip_prefix("Forwarding from 127.0.0.1:").and_then(|line| line.strip_suffix(remote));
        local.unwrap_or_else(|| panic!("{line}")).to_owned()
    };
    let (open, closed) = (port(" -> 7"), port(" -> 8"));
    let much: Vec<u8> = (0..1 << 20).map(|at: u32| at.to_le_bytes()[at as usize % 3]).collect();
    for request in [&b"hello"[..], &much, b""] {
        assert!(over_tcp(&open, request).expect("an echo") == request, "{} bytes came back otherwise", request.len());
    }
    assert_eq!(over_tcp(&closed, b"").expect("an end"), b"");
    assert_eq!(story.call(&["kill", "one"]).code, 0);
    let forwarded = forward.wait_with_output().expect("ended");
    assert_eq!(forwarded.status.code(), Some(1));
    let said = String::from_utf8_lossy(&forwarded.stderr);
    assert!(said.contains("cannot connect to port 8 of the container: Connection refused"), "{said}");
    assert!(said.ends_with("container one has ended\n"), "{said}");
    let refused = story.call(&["port-forward", "one", "7"]);
    assert_eq!((refused.code, refused.stderr.as_str()), (1, "vmrun: container one is not running\n"));
    assert_eq!(story.call(&["rm", "one"]).code, 0);
}

#[test]
fn a_caller_that_waits_for_its_descriptors_to_close_is_not_kept_waiting() {
    let story = Story::new();
    let run = story.vmrun(&["run", "--detach", "--rm", "--name", "one", &story.image(), "sleep", "1000"]);
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"exec 7>&1; name=$("$@"); echo "got $name""#, "sh"]);
    shell.arg(run.get_program()).args(run.get_args());
    assert_eq!(outcome(shell).success(), "got one\n");
    assert_eq!(story.call(&["kill", "one"]).success(), "one\n");
}

#[test]
fn a_command_that_does_not_start_is_told_to_the_caller_and_leaves_nothing() {
    let story = Story::new();
    let missing = story.call(&["run", "--detach", &story.image(), "/bin/missing"]);
    assert_eq!((missing.code, missing.stdout.as_str()), (127, ""), "{missing:?}");
    assert!(missing.stderr.contains("/bin/missing"), "{missing:?}");
    let user = story.call(&["run", "--detach", "--user", "nobody", &story.image(), "true"]);
    assert_eq!(user.code, 125, "{user:?}");
    assert!(user.stderr.contains("nobody"), "{user:?}");
    let image = story.call(&["run", "--detach", "rootfs:/does/not/exist", "true"]);
    assert_eq!(image.code, 125, "{image:?}");
    assert!(image.stderr.contains("/does/not/exist"), "{image:?}");
}

#[test]
fn logs_follow_to_the_end_and_keep_the_streams_apart() {
    let story = Story::new();
    story.detach("one", &[], &["sh", "-c", "echo first; echo wrong >&2; sleep 5; printf last"]);
    let followed = story.call(&["logs", "--follow", "one"]);
    assert_eq!((followed.success(), followed.stderr.as_str()), ("first\nlast", "wrong\n"));
    assert_eq!(story.call(&["logs", "--tail", "1", "one"]).success(), "last");
    assert!(story.call(&["logs", "--timestamps", "one"]).success().starts_with("20"));
    assert_eq!(story.call(&["logs", "--since", "2099-01-01T00:00:00Z", "one"]).success(), "");
    assert_eq!(story.call(&["rm", "one"]).code, 0);
}

#[test]
fn a_reader_of_logs_that_stalls_blocks_nothing_and_a_full_log_is_rotated() {
    let story = Story::new();
    let script = "seq 1 100000; echo end";
    story.detach("one", &["--log-opt", "max-size=1m", "--log-opt", "max-file=2"], &["sh", "-c", script]);
    let mut stalled = story.vmrun(&["logs", "--follow", "one"]).stdout(Stdio::piped()).spawn().expect("vmrun starts");
    assert_eq!(story.call(&["wait", "one"]).success(), "0\n");
    assert_eq!(story.call(&["logs", "--tail", "1", "one"]).success(), "end\n");
    assert!(!story.call(&["logs", "one"]).success().starts_with("1\n"), "the oldest lines are dropped");
    stalled.kill().expect("kill");
    stalled.wait().expect("wait");
    assert_eq!(story.call(&["rm", "one"]).code, 0);
}

#[test]
fn everybody_who_waits_learns_the_exit_status() {
    let story = Story::new();
    story.detach("one", &["--rm"], &WAITING);
    let wait = || story.vmrun(&["wait", "one"]).stdout(Stdio::piped()).spawn().expect("vmrun starts");
    let (first, second) = (wait(), wait());
    assert_eq!(story.call(&["exec", "one", "true"]).code, 0);
    assert_eq!(story.call(&["kill", "--signal", "TERM", "one"]).success(), "one\n");
    assert_eq!(first.wait_with_output().expect("wait").stdout, b"3\n");
    assert_eq!(second.wait_with_output().expect("wait").stdout, b"3\n");
}

#[test]
fn killing_the_supervisor_ends_the_vm_and_gc_removes_the_rest() {
    let story = Story::new();
    story.detach("one", &[], &WAITING);
    let state = story.inspect("one")["State"].take();
    let vmm = pidfd_open(process(&state["Pid"]), PidfdFlags::empty()).expect("the VMM");
    signal(&state["OwnerPid"], Signal::KILL);
    assert_ends(&vmm);
    let lost = story.call(&["wait", "one"]);
    assert_eq!(lost.code, 1, "{lost:?}");
    assert_eq!(story.call(&["ps", "--quiet"]).success(), "");
    assert_eq!(story.call(&["gc"]).success(), "one\n");
}

#[test]
fn killing_the_vmm_is_an_exit_with_a_cause() {
    let story = Story::new();
    story.detach("one", &[], &WAITING);
    signal(&story.inspect("one")["State"]["Pid"], Signal::KILL);
    assert_eq!(story.call(&["wait", "one"]).success(), "125\n");
    let error = story.inspect("one")["State"]["Error"].to_string();
    assert!(error.contains("the VM ended while the command ran"), "{error}");
    assert_eq!(story.call(&["rm", "one"]).code, 0);
}

#[test]
fn a_vm_that_is_stuck_can_be_killed() {
    let story = Story::new();
    story.detach("one", &[], &WAITING);
    signal(&story.inspect("one")["State"]["Pid"], Signal::STOP);
    let asked = Instant::now();
    assert_eq!(story.call(&["kill", "one"]).success(), "one\n");
    // Two seconds, and what the emulated host needs to start vmrun.
    assert!(asked.elapsed() < Duration::from_secs(8), "{:?}", asked.elapsed());
    assert_eq!(story.call(&["wait", "one"]).success(), "137\n");
    assert_eq!(story.call(&["rm", "one"]).code, 0);
}

#[test]
fn an_owner_that_is_stuck_is_killed_with_its_vm() {
    let story = Story::new();
    story.detach("one", &[], &WAITING);
    let state = story.inspect("one")["State"].take();
    let vmm = pidfd_open(process(&state["Pid"]), PidfdFlags::empty()).expect("the VMM");
    signal(&state["Pid"], Signal::STOP);
    signal(&state["OwnerPid"], Signal::STOP);
    assert_eq!(story.call(&["rm", "--force", "one"]).success(), "one\n");
    assert_ends(&vmm);
}

#[test]
fn a_paused_container_runs_nothing_and_can_be_stopped() {
    let story = Story::new();
    story.detach("one", &[], &WAITING);
    assert_eq!(story.call(&["pause", "one"]).success(), "one\n");
    assert!(story.call(&["ps"]).success().contains("(Paused)"));
    let refused = story.call(&["exec", "one", "true"]);
    assert!(refused.stderr.contains("paused"), "{refused:?}");
    assert_eq!(story.call(&["unpause", "one"]).success(), "one\n");
    assert_eq!(story.call(&["pause", "one"]).success(), "one\n");
    assert_eq!(story.call(&["stop", "one"]).success(), "one\n");
    assert_eq!(story.call(&["wait", "one"]).success(), "3\n");
    assert_eq!(story.call(&["rm", "one"]).code, 0);
}

#[test]
fn a_paused_container_can_be_killed() {
    let story = Story::new();
    story.detach("one", &["--rm"], &WAITING);
    assert_eq!(story.call(&["pause", "one"]).success(), "one\n");
    assert_eq!(story.call(&["kill", "one"]).success(), "one\n");
}

#[test]
fn a_command_that_ignores_the_stop_signal_is_killed() {
    let story = Story::new();
    story.detach("one", &["--stop-signal", "USR1"], &["sh", "-c", "trap '' TERM USR1; echo up; sleep 1000"]);
    assert_eq!(story.call(&["stop", "--timeout", "1", "one"]).success(), "one\n");
    assert_eq!(story.call(&["wait", "one"]).success(), "137\n");
    assert_eq!(story.call(&["rm", "one"]).code, 0);
}

#[test]
fn time_runs_out_with_124() {
    let story = Story::new();
    story.detach("one", &["--timeout", "3s"], &["sleep", "1000"]);
    assert_eq!(story.call(&["wait", "one"]).success(), "124\n");
    let error = story.inspect("one")["State"]["Error"].to_string();
    assert!(error.contains("--timeout"), "{error}");
    assert_eq!(story.call(&["rm", "one"]).code, 0);
}

#[test]
fn an_exec_inherits_what_it_does_not_say() {
    let story = Story::new();
    story.detach("one", &["--rm", "--user", "user", "--env", "COLOUR=blue", "--workdir", "/tmp"], &WAITING);
    let inherited = story.call(&["exec", "one", "sh", "-c", "id -u; echo $COLOUR; pwd"]);
    assert_eq!(inherited.success(), "1000\nblue\n/tmp\n");
    let said = ["exec", "--user", "root", "--env", "COLOUR=red", "--workdir", "/", "one", "sh", "-c"];
    let changed = story.call(&[&said[..], &["id -u; id -g; echo $COLOUR; pwd; echo $HOME"]].concat());
    assert_eq!(changed.success(), "0\n0\nred\n/\n/root\n");
    let input = story.volume().join("input");
    fs::write(&input, "line\n".repeat(10_000)).expect("input");
    let mut count = story.vmrun(&["exec", "--interactive", "one", "wc", "-l"]);
    count.stdin(fs::File::open(input).expect("input"));
    assert_eq!(outcome(count).success(), "10000\n");
    let unknown = story.call(&["exec", "--user", "nobody", "one", "true"]);
    assert_eq!(unknown.code, 125, "{unknown:?}");
    assert_eq!(story.call(&["exec", "--detach", "--user", "root", "one", "sh", "-c", "echo done > /tmp/file"]).code, 0);
    let missing = story.call(&["exec", "one", "missing"]);
    assert_eq!(missing.code, 127, "{missing:?}");
    assert_eq!(story.call(&["exec", "one", "sh", "-c", "until cat /tmp/file; do sleep 1; done"]).stdout, "done\n");
    assert_eq!(story.call(&["kill", "one"]).code, 0);
}

#[test]
fn of_two_that_want_one_name_one_gets_it() {
    let story = Story::new();
    let image = story.image();
    let run = || {
        let mut command = story.vmrun(&["run", "--detach", "--name", "one", &image, "sleep", "1000"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("vmrun starts")
    };
    let (first, second) = (run(), run());
    let outputs = [first.wait_with_output().expect("wait"), second.wait_with_output().expect("wait")];
    let mut codes = outputs.clone().map(|output| output.status.code().expect("an exit status"));
    codes.sort_unstable();
    assert_eq!(codes, [0, 125], "{outputs:?}");
    let errors: Vec<u8> = outputs.into_iter().flat_map(|output| output.stderr).collect();
    assert!(String::from_utf8_lossy(&errors).contains("in use"));
    assert_eq!(story.call(&["rm", "--force", "one"]).success(), "one\n");
}

#[test]
fn what_runs_is_not_removed_unless_forced() {
    let story = Story::new();
    story.detach("one", &[], &WAITING);
    let refused = story.call(&["rm", "one", "two"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("container one is running") && refused.stderr.contains("no such container: two"));
    assert_eq!(story.call(&["rm", "--force", "one"]).success(), "one\n");
}

#[test]
fn a_detached_terminal_stays_open() {
    let story = Story::new();
    story.detach(
        "one",
        &["--rm", "--interactive", "--tty"],
        &["sh", "-c", "test -t 0 && test -t 1 && echo terminal; cat"],
    );
    assert_eq!(story.call(&["exec", "one", "true"]).code, 0);
    assert_eq!(story.call(&["logs", "one"]).success(), "terminal\r\n");
    assert_eq!(story.call(&["kill", "one"]).code, 0);
}

#[test]
fn use_is_measured() {
    let story = Story::new();
    story.detach("one", &["--rm", "--memory", "100m"], &["sh", "-c", "while true; do :; done"]);
    let printed = story.call(&["stats", "--no-stream", "--json", "one"]).success().to_owned();
    let measured: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
    assert!(measured[0]["cpu_percent"].as_f64().expect("a number") > 20.0, "{printed}");
    assert_eq!(measured[0]["memory_limit_bytes"], 100 << 20);
    assert!(story.call(&["stats", "--no-stream"]).success().contains("100.00MiB"));
    assert_eq!(story.call(&["rm", "--force", "one"]).code, 0);
}

#[test]
fn a_caller_that_dies_before_the_start_leaves_nothing() {
    let story = Story::new();
    let image = story.image();
    let mut caller = story.vmrun(&["run", "--detach", "--console", &image, "sleep", "1000"]);
    let mut caller = caller.stderr(Stdio::piped()).spawn().expect("vmrun starts");
    caller.kill().expect("kill");
    caller.wait().expect("wait");
    // The supervisor holds this until it has a log of its own, or has ended.
    let mut said = String::new();
    caller.stderr.take().expect("piped").read_to_string(&mut said).expect("the end");
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"until test -z "$("$@")"; do sleep 1; done"#, "sh"]);
    let list = story.vmrun(&["ps", "--all", "--quiet"]);
    shell.arg(list.get_program()).args(list.get_args());
    assert_eq!(outcome(shell).code, 0);
}
