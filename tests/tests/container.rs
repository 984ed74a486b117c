//! One container in one microVM: output, exit status, identity, limits, volumes, bad input.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use tests::{Story, outcome};

#[test]
fn output_and_exit_status_are_the_commands() {
    let story = Story::new();
    let ran = story.run(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (7, "out\n", "err\n"), "{ran:?}");
}

#[test]
fn the_kernel_is_the_guests() {
    let story = Story::new();
    let guest = story.run(&[], &["cat", "/proc/sys/kernel/osrelease"]).success().to_owned();
    assert_ne!(guest, fs::read_to_string("/proc/sys/kernel/osrelease").expect("release"));
}

#[test]
fn several_cpus_come_up() {
    let story = Story::new();
    assert_eq!(story.run(&["--cpus", "2"], &["nproc"]).success(), "2\n");
}

#[test]
fn a_signal_is_128_more() {
    let story = Story::new();
    assert_eq!(story.run(&[], &["sh", "-c", "kill -9 $$; sh -c 'kill -9 $$'; exit $?"]).code, 137);
}

#[test]
fn standard_input_reaches_the_command() {
    let story = Story::new();
    let input = story.volume().join("input");
    fs::write(&input, "line\n".repeat(100_000)).expect("input");
    let image = story.image();
    let mut command = story.vmrun(&["run", "--rm", "-i", &image, "wc", "-l"]);
    command.stdin(fs::File::open(input).expect("input"));
    assert_eq!(outcome(command).success().trim(), "100000");
}

#[test]
fn large_output_is_complete() {
    let story = Story::new();
    let ran = story.run(&[], &["sh", "-c", "dd if=/dev/zero bs=1M count=8 2>/dev/null; echo end"]);
    assert_eq!(ran.code, 0);
    assert_eq!(ran.stdout.len(), (8 << 20) + 4);
    assert!(ran.stdout.ends_with("end\n"));
}

#[test]
fn user_environment_folder_and_host_name_are_as_asked() {
    let story = Story::new();
    let options = ["--user", "user", "--env", "COLOUR=blue", "--workdir", "/tmp", "--hostname", "box"];
    let ran = story.run(&options, &["sh", "-c", "id -u; id -g; echo $COLOUR; echo $PWD; hostname"]);
    assert_eq!(ran.success(), "1000\n1000\nblue\n/tmp\nbox\n");
}

#[test]
fn limits_are_the_containers() {
    let story = Story::new();
    let options = ["--memory", "100m", "--cpus", "0.5", "--pids-limit", "50"];
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max";
    assert_eq!(story.run(&options, &["sh", "-c", script]).success(), "104857600\n50000 100000\n50\n");
}

#[test]
fn what_a_container_writes_to_its_root_stays_out_of_the_image() {
    let story = Story::new();
    assert_eq!(story.run(&[], &["sh", "-c", "echo new > /file; cat /file"]).success(), "new\n");
    assert_eq!(story.run(&[], &["ls", "/file"]).code, 1);
}

#[test]
fn a_volume_is_written_through() {
    let story = Story::new();
    let volume = story.volume_at_mnt();
    let ran =
        story.run(&["-v", &volume], &["sh", "-c", "echo data > /mnt/a; mv /mnt/a /mnt/b; ln -s b /mnt/c; cat /mnt/c"]);
    assert_eq!(ran.success(), "data\n");
    assert_eq!(fs::read_to_string(story.volume().join("b")).expect("file"), "data\n");
}

#[test]
fn a_read_only_volume_cannot_be_written() {
    let story = Story::new();
    fs::write(story.volume().join("a"), "old").expect("file");
    let volume = format!("{}:/mnt:ro", story.volume().display());
    let script = "cat /mnt/a; echo new > /mnt/a; mount -o remount,rw /mnt; touch /mnt/b";
    let ran = story.run(&["-v", &volume, "--cap-add", "SYS_ADMIN"], &["sh", "-c", script]);
    assert!(ran.stdout.starts_with("old"), "{ran:?}");
    assert_ne!(ran.code, 0);
    assert_eq!(fs::read_to_string(story.volume().join("a")).expect("file"), "old");
    assert!(!story.volume().join("b").exists());
}

#[test]
fn a_single_file_can_be_a_volume() {
    let story = Story::new();
    fs::write(story.volume().join("secret"), "neighbour").expect("file");
    fs::write(story.volume().join("one"), "one").expect("file");
    let volume = format!("{}:/one", story.volume().join("one").display());
    assert_eq!(story.run(&["-v", &volume], &["cat", "/one"]).success(), "one");
}

#[test]
fn a_command_that_is_not_there_is_127_and_one_that_cannot_run_is_126() {
    let story = Story::new();
    assert_eq!(story.run(&[], &["/bin/missing"]).code, 127);
    let file = story.volume().join("data");
    fs::write(&file, "").expect("file");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("mode");
    let volume = format!("{}:/data", file.display());
    assert_eq!(story.run(&["-v", &volume], &["/data"]).code, 126);
}

#[test]
fn bad_input_is_refused_with_a_cause_and_leaves_nothing() {
    let story = Story::new();
    let refused = |options: &[&str], word: &str| {
        let ran = story.run(options, &["true"]);
        assert_eq!(ran.code, 125, "{ran:?}");
        assert!(ran.stderr.contains(word), "{ran:?}");
    };
    refused(&["--cpus", "1000"], "1 to 64");
    refused(&["--memory", "9999999g"], "MiB");
    refused(&["--user", "nobody"], "nobody");
    refused(&["-v", "/does/not/exist:/mnt"], "/does/not/exist");
    refused(&["-v", "/proc:/mnt"], "/proc");
    refused(&["--no-such-flag"], "--no-such-flag");
    refused(&["--name", "../up"], "not a valid name");
}

#[test]
fn an_image_that_is_not_there_is_named() {
    let story = Story::new();
    let ran = outcome(story.vmrun(&["run", "--rm", "rootfs:/does/not/exist", "true"]));
    assert_eq!(ran.code, 125);
    assert!(ran.stderr.contains("/does/not/exist"), "{ran:?}");
}
