//! Containers that run for a while: exec, list, signal, names, and processes that are killed.

use tests::{Story, outcome};

/// Says that it runs, then waits to be ended.
const WAITING: [&str; 3] = ["sh", "-c", "trap 'exit 3' TERM; echo up; while true; do sleep 1; done"];

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
    assert!(outcome(story.vmrun(&["ps"])).success().contains("running"));
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
