//! Containers that run for a while: exec, list, signal, names, and processes that are killed.

use std::io::Read as _;
use std::process::Stdio;
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use tests::{Story, Terminal, outcome};

/// Says that it runs, then waits to be ended.
const WAITING: [&str; 3] = ["sh", "-c", "trap 'exit 3' TERM; echo up; while true; do sleep 1; done"];

/// Short processes in one VM, and how many at a time: what the emulated host does in about a minute. `many.rs` runs a thousand
/// containers without a process of vmrun for each.
const EXEC_COUNT: usize = 64;
const EXEC_CLIENTS: usize = 8;

#[test]
fn a_command_can_be_run_in_a_running_container() {
    let story = Story::new();
    let mut container = story.start("one", &WAITING);
    let ran = outcome(story.vmrun(&["exec", "one", "sh", "-c", "echo inside; hostname; exit 4"]));
    assert_eq!((ran.code, ran.stdout.as_str()), (4, "inside\none\n"), "{ran:?}");
    assert_eq!(outcome(story.vmrun(&["kill", "--signal", "TERM", "one"])).success(), "one\n");
    assert_eq!(container.wait(), 3);
}

#[test]
fn a_running_container_is_listed_and_its_name_is_taken() {
    let story = Story::new();
    let mut container = story.start("one", &WAITING);
    assert!(story.call(&["ps"]).success().contains("Up"));
    let second = story.run(&["--name", "one"], &["true"]);
    assert_eq!(second.code, 125);
    assert!(second.stderr.contains("in use"), "{second:?}");
    assert_eq!(outcome(story.vmrun(&["kill", "one"])).code, 0);
    assert_eq!(container.wait(), 137);
}

#[test]
fn killing_vmrun_ends_the_vm_and_gc_removes_the_rest() {
    let story = Story::new();
    let mut container = story.start("one", &WAITING);
    container.kill();
    assert_eq!(outcome(story.vmrun(&["gc"])).success(), "one\n");
}

#[test]
fn a_container_that_is_not_there_is_named() {
    let story = Story::new();
    let ran = outcome(story.vmrun(&["exec", "nobody", "true"]));
    assert_eq!(ran.code, 125);
    assert!(ran.stderr.contains("no such container: nobody"), "{ran:?}");
}

#[test]
fn what_has_exited_stays_with_its_log_until_it_is_removed() {
    let story = Story::new();
    let image = story.image();
    let ran =
        story.call(&["run", "--name", "one", &image, "sh", "-c", "echo out; echo err >&2; echo kept > /file; exit 5"]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (5, "out\n", "err\n"), "{ran:?}");
    assert_eq!(story.call(&["ps", "--quiet"]).success(), "");
    assert_eq!(story.inspect("one")["State"]["ExitCode"], 5);
    let logs = story.call(&["logs", "one"]);
    assert_eq!((logs.success(), logs.stderr.as_str()), ("out\n", "err\n"));
    let data_dir = story.inspect("one")["LogPath"].as_str().expect("a path").replace("log.json", "upper/file");
    assert_eq!(std::fs::read_to_string(data_dir).expect("the file"), "kept\n");
    assert_eq!(story.call(&["exec", "one", "true"]).stderr, "vmrun: container one is not running\n");
    assert_eq!(story.call(&["rm", "one"]).success(), "one\n");
    assert_eq!(story.call(&["ps", "--all", "--quiet"]).success(), "");
}

#[test]
fn killing_the_vmm_is_a_failure_with_a_cause() {
    let story = Story::new();
    let image = story.image();
    let mut command = story.vmrun(&["run", "--rm", "--name", "one", &image, "sh", "-c", "echo up; sleep 1000"]);
    let mut container = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("vmrun starts");
    container.stdout.as_mut().expect("piped").read_exact(&mut [0; 3]).expect("the command runs");
    let pid = story.inspect("one")["State"]["Pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    kill_process(pid.and_then(Pid::from_raw).expect("a process id"), Signal::KILL).expect("kill");
    let output = container.wait_with_output().expect("wait");
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("the VM ended while the command ran"), "{output:?}");
}

#[test]
fn killing_vmrun_while_the_guest_boots_leaves_what_gc_removes() {
    let story = Story::new();
    let image = story.image();
    let mut command = story.vmrun(&["run", "--rm", "--console", "--name", "one", &image, "true"]);
    let mut vmrun = command.stderr(Stdio::piped()).spawn().expect("vmrun starts");
    vmrun.stderr.as_mut().expect("piped").read_exact(&mut [0; 1]).expect("the guest's kernel says something");
    vmrun.kill().expect("kill");
    vmrun.wait().expect("wait");
    assert_eq!(story.call(&["ps", "--quiet"]).success(), "");
    assert_eq!(story.call(&["gc"]).success(), "one\n");
}

#[test]
fn signals_reach_the_command() {
    let story = Story::new();
    let mut container = story.start("one", &WAITING);
    let pid = i32::try_from(container.pid()).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, Signal::TERM).expect("kill");
    assert_eq!(container.wait(), 3);
}

#[test]
fn a_reader_that_closes_early_ends_the_command() {
    let story = Story::new();
    let image = story.image();
    let mut command = story.vmrun(&["run", "--rm", &image, "yes"]);
    let mut container = command.stdout(Stdio::piped()).spawn().expect("vmrun starts");
    container.stdout.take().expect("piped").read_exact(&mut [0; 2]).expect("output");
    // The command is PID 1, which SIGPIPE does not end: it sees the error and says so by its status.
    assert_eq!(container.wait().expect("wait").code(), Some(1));
}

#[test]
fn a_reader_that_stalls_does_not_keep_a_container_alive() {
    let story = Story::new();
    let image = story.image();
    let mut command = story.vmrun(&["run", "--rm", "--name", "one", &image, "yes"]);
    let mut container = command.stdout(Stdio::piped()).spawn().expect("vmrun starts");
    container.stdout.as_mut().expect("piped").read_exact(&mut [0; 2]).expect("output");
    assert_eq!(story.call(&["kill", "one"]).success(), "one\n");
    assert_eq!(container.wait().expect("wait").code(), Some(137));
}

#[test]
fn a_terminal_is_refused_where_there_is_none() {
    let story = Story::new();
    let ran = story.run(&["--interactive", "--tty"], &["true"]);
    assert_eq!(ran.code, 125);
    assert!(ran.stderr.contains("the input device is not a TTY"), "{ran:?}");
}

#[test]
fn a_terminal_has_our_size_and_interrupts_the_command() {
    let story = Story::new();
    let mut terminal = Terminal::open(33, 77);
    let script = "trap 'echo interrupted; exit 9' INT; stty size; while true; do sleep 1; done";
    let mut container = terminal.spawn(&story.vmrun(&["run", "--rm", "-it", &story.image(), "sh", "-c", script]));
    terminal.expect("33 77\r\n");
    terminal.send("\x03");
    terminal.expect("interrupted\r\n");
    assert_eq!(container.wait().expect("wait").code(), Some(9));
}

#[test]
fn an_exec_has_a_terminal_that_follows_the_size_of_ours() {
    let story = Story::new();
    story.detach("one", &["--rm"], &WAITING);
    let mut terminal = Terminal::open(24, 80);
    let mut shell = terminal.spawn(&story.vmrun(&["exec", "-it", "one", "sh"]));
    terminal.expect("# ");
    terminal.send("stty size\r");
    terminal.expect("24 80\r\n");
    terminal.resize(40, 100);
    terminal.send("until stty size | grep '40 1'; do sleep 1; done\r");
    terminal.expect("40 100\r\n");
    terminal.send("exit 6\r");
    assert_eq!(shell.wait().expect("wait").code(), Some(6));
    assert_eq!(story.call(&["kill", "one"]).code, 0);
}

#[test]
fn an_init_reaps_what_the_command_leaves_and_passes_signals_on() {
    let story = Story::new();
    let script = "trap 'exit 3' TERM; sh -c 'sleep 0 & exec sleep 1' & wait; echo up; while true; do sleep 1; done";
    story.detach("one", &["--init", "--read-only"], &["sh", "-c", script]);
    let waited = story.call(&[
        "exec",
        "one",
        "sh",
        "-c",
        "until test \"$(ps -o stat | grep -c Z)\" = 0; do sleep 1; done; cat /proc/1/cmdline",
    ]);
    assert!(waited.success().starts_with("/dev/init\0init\0sh\0"), "{waited:?}");
    assert_eq!(story.call(&["kill", "--signal", "TERM", "one"]).success(), "one\n");
    assert_eq!(story.call(&["wait", "one"]).success(), "3\n");
    assert_eq!(story.call(&["rm", "one"]).code, 0);
}

#[test]
fn the_last_bytes_of_many_execs_arrive() {
    let story = Story::new();
    story.detach("one", &["--rm", "--cpus", "2"], &WAITING);
    let exec = |number: usize| {
        let line = format!("line of exec {number}");
        let ran = story.call(&["exec", "one", "echo", &line]);
        assert_eq!(ran.success(), format!("{line}\n"), "{ran:?}");
    };
    thread::scope(|scope| {
        for first in 0..EXEC_CLIENTS {
            scope.spawn(move || (first..EXEC_COUNT).step_by(EXEC_CLIENTS).for_each(exec));
        }
    });
    assert_eq!(story.call(&["kill", "one"]).code, 0);
}

#[test]
fn completions_are_printed() {
    let story = Story::new();
    assert!(story.call(&["completions", "bash"]).success().contains("_vmrun"));
}
