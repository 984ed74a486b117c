//! What an OCI spec asks for holds in the container; what it asks for in vain is refused by name.

use sandbox::{ProcessId, WantedStreams};
use serde_json::json;
use tests::pod::{ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, Pod, UNIMPLEMENTED, read, refusal};
use tests::python::Python;
use tests::{Story, outcome};

/// The lines of `text` that begin with `name:`, without it.
fn field(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
}

#[test]
fn confinement_is_dockers_by_default() {
    let story = Story::new();
    let script = "cat /proc/self/status; \
        for call in 'unshare -m true' 'unshare -U true' 'mount -t tmpfs x /tmp' 'hostname other'; do $call && echo did: $call; done; \
        cat /proc/keys /proc/kcore 2>/dev/null | wc -c; ls /sys/firmware | wc -l; \
        echo 1 > /proc/sys/vm/drop_caches || echo read-only; ulimit -n; ulimit -Hn; umask; \
        ls /dev | tr '\\n' ' '; mknod /tmp/mem c 1 1 && cat /tmp/mem || echo no-mem; cat /proc/self/cgroup; cat /proc/self/oom_score_adj";
    let ran = story.run(&[], &["sh", "-c", script]);
    let text = ran.success();
    assert_eq!(field(text, "Seccomp"), "2", "{text}");
    assert_eq!(field(text, "NoNewPrivs"), "0");
    assert_eq!(field(text, "CapEff"), "00000000a80425fb");
    assert_eq!(field(text, "CapBnd"), "00000000a80425fb");
    assert_eq!(field(text, "CapInh"), "0000000000000000");
    assert_eq!(field(text, "CapAmb"), "0000000000000000");
    assert_eq!(field(text, "SigIgn"), "0000000000000000");
    assert_eq!(field(text, "SigBlk"), "0000000000000000");
    assert!(!text.contains("did: "), "{text}");
    let rest = &text[text.rfind("Mems_allowed").unwrap_or(0)..];
    assert!(rest.contains("\n0\n0\nread-only\n1024\n524288\n0022\n"), "{rest}");
    let devices = "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero ";
    assert!(rest.contains(devices), "{rest}");
    assert!(rest.ends_with("no-mem\n0::/\n0\n"), "{rest}");
}

#[test]
fn other_users_and_options_change_the_confinement() {
    let story = Story::new();
    let status = ["grep", "-E", "^(Cap|NoNew|Seccomp:|Groups)", "/proc/self/status"];
    let user = story.run(&["--user", "1000:1000", "--security-opt", "no-new-privileges"], &status);
    assert_eq!(field(user.success(), "CapEff"), "0000000000000000");
    assert_eq!(field(user.success(), "CapBnd"), "00000000a80425fb");
    assert_eq!(field(user.success(), "NoNewPrivs"), "1");
    assert_eq!(field(user.success(), "Seccomp"), "2");
    let free = story.run(
        &["--privileged"],
        &[
            "sh",
            "-c",
            "grep -E '^(CapEff|Seccomp:)' /proc/self/status; mount -t tmpfs x /tmp && unshare -m true && echo did",
        ],
    );
    assert_eq!(field(free.success(), "CapEff"), "000001ffffffffff");
    assert_eq!(field(free.success(), "Seccomp"), "0");
    assert!(free.success().ends_with("did\n"));
    let profile = story.volume().join("profile.json");
    std::fs::write(&profile, r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO","errnoRet":95}]}"#)
        .unwrap();
    let option = format!("seccomp={}", profile.display());
    let ran = story.run(&["--security-opt", &option], &["mkdir", "/tmp/new"]);
    assert!(ran.code == 1 && ran.stderr.contains("not supported"), "{ran:?}");
    let bad = story.run(&["--security-opt", "seccomp=/does/not/exist"], &["true"]);
    assert!(bad.code == 125 && bad.stderr.contains("/does/not/exist"), "{bad:?}");
}

/// In the Python of a container: a system call by its number, and its error.
const LIBC: &str = "import ctypes, socket; libc = ctypes.CDLL(None, use_errno=True)
def call(*args): return libc.syscall(*map(ctypes.c_ulong, args)), errno.errorcode.get(ctypes.get_errno())";

#[test]
fn af_vsock_is_the_agents_alone_whatever_a_profile_allows() {
    let story = Story::new();
    let profile = story.volume().join("profile.json");
    std::fs::write(&profile, r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
    let tried = |options: &[&str]| {
        let mut python = Python::start(&story, options);
        assert_eq!(python.exec(LIBC), "None");
        // The kernel reads 32 bits of the family, a filter the whole register.
        let seen =
            ["socket.socket(40, socket.SOCK_STREAM)", "call(41, 1 << 32 | 40, 1, 0)"].map(|line| python.eval(line));
        assert_eq!(python.end(), 0);
        seen
    };
    let closed = ["EPERM", "(-1, 'EPERM')"];
    assert_eq!(tried(&["--security-opt", &format!("seccomp={}", profile.display())]), closed);
    assert_eq!(tried(&["--security-opt", "seccomp=unconfined"]), closed);
    assert_eq!(tried(&[]), closed);
    let [free, _] = tried(&["--privileged"]);
    assert!(free.contains("family=40"), "{free}");
}

#[test]
fn clone_makes_no_namespace_by_dockers_profile() {
    let story = Story::new();
    let mut python = Python::start(&story, &[]);
    assert_eq!(python.exec(LIBC), "None");
    // clone(CLONE_NEWUSER | SIGCHLD); a child that there should not be ends at once.
    let made =
        python.eval("(lambda made: os._exit(0) if made[0] == 0 else made)(call(56, 0x10000000 | 17, 0, 0, 0, 0))");
    assert_eq!(made, "(-1, 'EPERM')");
    assert_eq!(python.end(), 0);
}

#[test]
fn exec_is_confined_as_its_container() {
    let story = Story::new();
    let mut container = story.start("one", &["sh", "-c", "trap 'exit 0' TERM; echo up; while true; do sleep 1; done"]);
    let ran = outcome(story.vmrun(&["exec", "one", "sh", "-c", "cat /proc/self/status; unshare -m true"]));
    assert_eq!((field(&ran.stdout, "Seccomp"), field(&ran.stdout, "CapEff")), ("2".into(), "00000000a80425fb".into()));
    assert_ne!(ran.code, 0);
    assert_eq!(outcome(story.vmrun(&["exec", "one", "/bin/missing"])).code, 127);
    assert_eq!(outcome(story.vmrun(&["exec", "one", "/etc/passwd"])).code, 126);
    assert_eq!(outcome(story.vmrun(&["kill", "--signal", "TERM", "one"])).code, 0);
    assert_eq!(container.wait(), 0);
}

#[test]
fn command_that_cannot_be_executed_says_why() {
    let story = Story::new();
    let root = story.rootfs();
    std::fs::write(root.join("bin/script"), "#!/no/such/interpreter\n").unwrap();
    std::fs::write(root.join("bin/text"), "plain text\n").unwrap();
    std::fs::write(root.join("bin/secret"), "#!/bin/sh\n").unwrap();
    let mode = |name: &str, mode| {
        let mode: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(root.join("bin").join(name), mode).unwrap();
    };
    mode("script", 0o755);
    mode("text", 0o755);
    mode("secret", 0o700);
    let fails = |options: &[&str], command: &str, code: i32, cause: &str| {
        let ran = story.run(options, &[command]);
        assert!(ran.code == code && ran.stderr.contains(cause), "{command}: {ran:?}");
    };
    fails(&[], "/bin/script", 127, "interpreter");
    fails(&[], "/bin/text", 126, "exec format error");
    fails(&[], "/etc", 126, "is a directory");
    fails(&[], "nothing", 127, "not found in $PATH");
    fails(&["--user", "1000"], "secret", 126, "permission denied");
    fails(&["--workdir", "/etc/passwd"], "true", 125, "chdir");
    fails(&["--tmpfs", "/mnt:size=nonsense"], "true", 125, "EINVAL");
}

#[tokio::test(flavor = "current_thread")]
async fn states_refuse_what_they_do_not_allow() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    let init = ProcessId::init("one");
    let exec = ProcessId { container_id: "one".into(), exec_id: "e".into() };
    let nothing = WantedStreams::default();
    let process =
        serde_json::from_value(json!({ "user": { "uid": 0, "gid": 0 }, "args": ["/bin/sleep", "60"], "cwd": "/" }))
            .unwrap();

    assert_eq!(refusal(pod.0.start("one").await).0, NOT_FOUND);
    let _streams = pod.create("one", "trap '' TERM; echo up; sleep 600", |_| {}).await.unwrap();
    assert_eq!(refusal(pod.create("one", "true", |_| {}).await).0, ALREADY_EXISTS);
    assert_eq!(refusal(pod.0.exec(&exec, &process, nothing).await).0, FAILED_PRECONDITION);
    assert_eq!(refusal(pod.0.pause("one").await).0, FAILED_PRECONDITION);
    pod.0.start("one").await.unwrap();
    assert_eq!(refusal(pod.0.start("one").await).0, FAILED_PRECONDITION);
    assert_eq!(refusal(pod.0.delete(&init, false).await).0, FAILED_PRECONDITION);

    pod.0.exec(&exec, &process, nothing).await.unwrap();
    assert_eq!(refusal(pod.0.exec(&exec, &process, nothing).await).0, ALREADY_EXISTS);
    assert_eq!(refusal(pod.0.delete(&exec, false).await).0, FAILED_PRECONDITION);
    let listed = pod.0.list_processes("one").await.unwrap();
    let of_exec = listed.iter().find(|process| process.exec_id == "e").unwrap();
    assert_eq!(of_exec.command, "/bin/sleep 60");
    assert!(listed.len() >= 2, "{listed:?}");

    pod.0.pause("one").await.unwrap();
    assert_eq!(refusal(pod.0.pause("one").await).0, FAILED_PRECONDITION);
    let second = ProcessId { container_id: "one".into(), exec_id: "f".into() };
    assert_eq!(refusal(pod.0.exec(&second, &process, nothing).await).0, FAILED_PRECONDITION);
    pod.0.resume("one").await.unwrap();
    pod.0.pause("one").await.unwrap();
    pod.0.signal(&init, 9, false).await.unwrap();
    assert_eq!(pod.0.wait(&init).await.unwrap().exit_code, 137);
    // The exec ends with its init.
    assert_eq!(pod.0.wait(&exec).await.unwrap().exit_code, 137);
    assert_eq!(refusal(pod.0.signal(&init, 15, false).await).0, NOT_FOUND);
    assert_eq!(refusal(pod.0.exec(&second, &process, nothing).await).0, FAILED_PRECONDITION);
    assert_eq!(refusal(pod.0.signal(&init, 99, false).await).0, INVALID_ARGUMENT);
    pod.0.delete(&init, false).await.unwrap();
    assert_eq!(refusal(pod.0.wait(&init).await).0, NOT_FOUND);
    pod.0.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn fields_of_a_spec_hold() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    let script = "umask; id -u; id -g; id -G; cat /proc/self/oom_score_adj; ulimit -c; ulimit -n; \
        cat /proc/sys/kernel/shm_rmid_forced /proc/sys/kernel/domainname /proc/sys/vm/overcommit_memory; \
        grep ' /ro ' /proc/self/mounts | grep -c 'ro,nosuid,nodev,noexec'; touch /sys/kernel/x || echo sys-ro; \
        grep -E '^Cap(Inh|Amb)' /proc/self/status; cut -d' ' -f19 /proc/self/stat; cat /proc/self/timens_offsets | tr -s ' '";
    let (code, text) = pod
        .run("one", script, |spec| {
            let process = &mut spec["process"];
            process["user"] = json!({ "uid": 1000, "gid": 1001, "umask": 0o77, "additionalGids": [7, 8] });
            process["oomScoreAdj"] = json!(123);
            process["rlimits"] = json!([
                { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 }, { "type": "RLIMIT_NOFILE", "soft": 77, "hard": 99 }
            ]);
            let sets = ["CAP_CHOWN", "CAP_KILL"];
            process["capabilities"] =
                json!({ "bounding": sets, "effective": sets, "permitted": sets, "inheritable": sets, "ambient": ["CAP_KILL"] });
            process["scheduler"] = json!({ "policy": "SCHED_OTHER", "nice": 5 });
            spec["domainname"] = json!("domain");
            let mount = json!({ "destination": "/ro", "type": "tmpfs", "source": "x", "options": ["ro", "nosuid", "nodev", "noexec"] });
            spec["mounts"].as_array_mut().unwrap().push(mount);
            let linux = &mut spec["linux"];
            linux["sysctl"] = json!({ "kernel.shm_rmid_forced": "1", "vm.overcommit_memory": "1" });
            linux["readonlyPaths"] = json!(["/sys"]);
            linux["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time" }));
            linux["timeOffsets"] = json!({ "monotonic": { "secs": 1000, "nanosecs": 0 } });
            spec["root"]["readonly"] = json!(false);
        })
        .await;
    assert_eq!(code, 0, "{text}");
    assert!(text.starts_with("0077\n1000\n1001\n1001 7 8\n123\n0\n77\n1\ndomain\n1\n1\n"), "{text}");
    assert!(text.contains("sys-ro\n"), "{text}");
    assert!(text.contains("CapInh:\t0000000000000021\nCapAmb:\t0000000000000020\n5\n"), "{text}");
    assert!(text.contains("monotonic 1000 0"), "{text}");

    let device =
        json!([{ "path": "/dev/extra", "type": "c", "major": 1, "minor": 5, "fileMode": 0o644, "uid": 5, "gid": 6 }]);
    let script =
        "stat -c '%a %u %g %t %T' /dev/extra; head -c 3 /dev/extra | wc -c; cat /proc/self/uid_map | tr -s ' '";
    let (_, text) = pod
        .run("two", script, |spec| {
            spec["linux"]["devices"] = device;
        })
        .await;
    assert!(text.starts_with("644 5 6 1 5\n3\n 0 0 4294967295"), "{text}");
    pod.0.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn what_cannot_be_honoured_is_refused_and_a_failed_create_leaves_nothing() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    let named =
        |result: (i32, String), word: &str| assert!(result.0 == UNIMPLEMENTED && result.1.contains(word), "{result:?}");
    named(refusal(pod.create("a", "true", |spec| spec["linux"]["intelRdt"] = json!({})).await), "intelRdt");
    named(refusal(pod.create("a", "true", |spec| spec["process"]["selinuxLabel"] = json!("x")).await), "selinuxLabel");
    let hooks = json!({ "startContainer": [{ "path": "/bin/true" }] });
    named(refusal(pod.create("a", "true", |spec| spec["hooks"] = hooks).await), "hooks.startContainer");

    let bad = json!({ "destination": "/m", "type": "nonsense", "source": "x" });
    let failed = refusal(pod.create("a", "true", |spec| spec["mounts"].as_array_mut().unwrap().push(bad)).await);
    assert!(failed.0 == FAILED_PRECONDITION && failed.1.contains("ENODEV"), "{failed:?}");
    let failed = refusal(pod.create("a", "true", |spec| spec["process"]["cwd"] = json!("/etc/passwd")).await);
    assert!(failed.0 == FAILED_PRECONDITION && failed.1.contains("ENOTDIR"), "{failed:?}");
    let failed =
        refusal(pod.create("a", "true", |spec| spec["linux"]["sysctl"] = json!({ "kernel.nonsense": "1" })).await);
    assert!(failed.1.contains("kernel.nonsense"), "{failed:?}");
    // The name is free again, and nothing else is there.
    assert_eq!(pod.run("a", "echo fine", |_| {}).await, (0, "fine\n".to_owned()));
    pod.0.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn streams_end_with_their_process_and_input_ends_after_what_was_sent() {
    use tokio::io::AsyncWriteExt as _;
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    let _streams = pod.create("one", "sleep 600", |_| {}).await.unwrap();
    pod.0.start("one").await.unwrap();
    let process = |script: &str| {
        serde_json::from_value(json!({
            "user": { "uid": 0, "gid": 0 }, "args": ["/bin/sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"]
        }))
        .unwrap()
    };
    let wanted = WantedStreams { stdin: true, output: true, terminal: None };

    // A daemon that inherits the output keeps nobody waiting.
    let daemon = ProcessId { container_id: "one".into(), exec_id: "daemon".into() };
    let streams = pod.0.exec(&daemon, &process("sleep 500 & echo last"), wanted).await.unwrap();
    assert_eq!(read(streams.stdout).await, "last\n");

    let counter = ProcessId { container_id: "one".into(), exec_id: "counter".into() };
    let mut streams = pod.0.exec(&counter, &process("wc -c"), wanted).await.unwrap();
    let mut stdin = streams.stdin.take().unwrap();
    stdin.write_all(&[b'x'; 300_000]).await.unwrap();
    pod.0.close_stdin(&counter, 300_000).await.unwrap();
    assert_eq!(read(streams.stdout).await, "300000\n");
    assert_eq!(pod.0.wait(&counter).await.unwrap().exit_code, 0);

    pod.0.stop().await;
}

#[test]
fn files_are_copied_by_dockers_rules() {
    let story = Story::new();
    let mut container = story.start("one", &["sh", "-c", "trap 'exit 0' TERM; echo up; while true; do sleep 1; done"]);
    let here = story.volume();
    let at = |name: &str| here.join(name).display().to_string();
    std::fs::create_dir_all(here.join("folder/deep")).unwrap();
    std::fs::write(here.join("folder/deep/file"), "text").unwrap();
    std::os::unix::fs::symlink("deep/file", here.join("folder/link")).unwrap();
    let cp = |source: &str, destination: &str| outcome(story.vmrun(&["cp", source, destination]));
    let inside = |script: &str| outcome(story.vmrun(&["exec", "one", "sh", "-c", script])).stdout;

    assert_eq!(cp(&at("folder"), "one:/tmp").code, 0);
    assert_eq!(cp(&at("folder"), "one:/tmp/renamed").code, 0);
    assert_eq!(cp(&at("folder/deep/file"), "one:/tmp/single").code, 0);
    let script = "cd /tmp; cat folder/link renamed/deep/file single; readlink folder/link; stat -c %u single";
    assert_eq!(inside(script), "texttexttextdeep/file\n0\n");

    assert_eq!(cp("one:/tmp/renamed", &at("back")).code, 0);
    assert_eq!(std::fs::read_to_string(here.join("back/link")).unwrap(), "text");
    assert_eq!(cp("one:/tmp/single", &at("back")).code, 0);
    assert_eq!(std::fs::read_to_string(here.join("back/single")).unwrap(), "text");
    let archive = cp("one:/tmp/folder", "-");
    assert!(archive.code == 0 && archive.stdout.contains("folder/deep/file"), "{}", archive.stderr);

    let missing = cp("one:/nothing", &at("x"));
    assert!(missing.code == 1 && missing.stderr.contains("/nothing"), "{missing:?}");
    let onto = cp(&at("folder"), "one:/tmp/single");
    assert!(onto.code == 1 && onto.stderr.contains("onto the file"), "{onto:?}");
    assert_eq!(outcome(story.vmrun(&["kill", "--signal", "TERM", "one"])).code, 0);
    assert_eq!(container.wait(), 0);
}
