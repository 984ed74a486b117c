//! Ways out of a container that other runtimes had: the agent's program, descriptors and folders of the agent, and images, volumes and
//! mounts that lead what is made for a container out of its root. What is reached by them is the guest, not the host.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;
use std::process::Command;

use sandbox::plan::guest_rootfs;
use sandbox::{CallError, ProcessId};
use serde_json::{Value, json};
use tests::pod::{FAILED_PRECONDITION, Pod, read, refusal};
use tests::{Story, outcome};

/// Descriptors that the agent may have left open, whatever they are.
const LEFT_OPEN: std::ops::Range<u32> = 3..9;

/// A root file system below the story's own, with the commands of busybox.
fn tree(story: &Story, name: &str) -> PathBuf {
    let tree = story.rootfs().join(name);
    fs::create_dir_all(tree.join("inside")).expect("a folder");
    fs::create_dir(tree.join("run")).expect("a folder");
    let mut copy = Command::new("cp");
    copy.arg("-al").arg(story.rootfs().join("bin")).arg(tree.join("bin"));
    assert_eq!(outcome(copy).code, 0);
    tree
}

fn use_tree(spec: &mut Value, name: &str) {
    spec["root"]["path"] = json!(guest_rootfs().join(name));
}

/// Mounts a folder or file of the guest.
fn bind(spec: &mut Value, source: impl Into<PathBuf>, destination: &str) {
    let source: PathBuf = source.into();
    let mount = json!({ "destination": destination, "type": "bind", "source": source, "options": ["bind"] });
    spec["mounts"].as_array_mut().expect("mounts").push(mount);
}

/// What a container of an image sees of the guest itself.
async fn seen_of_the_guest(pod: &Pod) -> String {
    let script = "ls -A /inside/run /inside/tmp /inside/dev; cat /proc/sys/kernel/core_pattern";
    let (code, text) = pod
        .run("witness", script, |spec| {
            use_tree(spec, "witness");
            ["run", "tmp", "dev"].iter().for_each(|name| bind(spec, format!("/{name}"), &format!("/inside/{name}")));
        })
        .await;
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("share") && text.contains("kmsg"), "{text}");
    text
}

/// In which folder a container starts that asks for this one, if it is made at all.
async fn starts_in(pod: &Pod, cwd: &str) -> Option<String> {
    let streams = match pod.create("cwd", "pwd", |spec| spec["process"]["cwd"] = json!(cwd)).await {
        Err(CallError::Refused { .. }) => return None,
        made => made.expect("created"),
    };
    pod.0.start("cwd").await.expect("started");
    let folder = read(streams.stdout).await;
    pod.0.wait(&ProcessId::init("cwd")).await.expect("waited");
    pod.0.delete(&ProcessId::init("cwd"), false).await.expect("deleted");
    Some(folder)
}

#[test]
fn an_exec_gives_a_container_nothing_of_the_agent() {
    let story = Story::new();
    symlink("/proc/self/exe", story.rootfs().join("bin/self")).expect("a link");
    fs::write(story.rootfs().join("bin/script"), "#!/proc/self/exe\n").expect("a script");
    fs::set_permissions(story.rootfs().join("bin/script"), fs::Permissions::from_mode(0o755)).expect("a mode");
    // The process that executes the link is the agent's.
    let waiting = "trap 'exit 0' TERM; echo up; while true; do sleep 1; done";
    let mut container = story.start("one", &["/bin/self", "init", "sh", "-c", waiting]);
    let exec = |command: &[&str]| outcome(story.vmrun(&[&["exec", "one"][..], command].concat()));

    for program in ["/bin/self", "/bin/script"] {
        let ran = exec(&[program]);
        assert!(ran.code == 1 && ran.stderr.contains("the agent runs only as PID 1"), "{ran:?}");
    }
    let writes = "echo x > /proc/1/exe\necho x >> /proc/1/exe\nexec 5< /proc/1/exe; echo x > /proc/self/fd/5\nchmod 777 /proc/1/exe";
    for write in writes.lines() {
        let ran = exec(&["sh", "-c", write]);
        assert!(ran.code != 0 && ran.stderr.contains("Read-only file system"), "{write}: {ran:?}");
    }
    let ran = exec(&["/bin/self", "init", "sh", "-c", "echo x > /proc/$PPID/exe"]);
    assert!(ran.code != 0 && ran.stderr.contains("Read-only file system"), "{ran:?}");

    assert_eq!(exec(&["ls", "/proc/self/fd"]).success(), "0\n1\n2\n3\n");
    for fd in LEFT_OPEN {
        let ran = outcome(story.vmrun(&["exec", "--workdir", &format!("/proc/self/fd/{fd}"), "one", "pwd"]));
        assert!(ran.code != 0 || ran.stdout.starts_with('/'), "{fd}: {ran:?}");
    }
    assert_eq!(exec(&["grep", "CapInh", "/proc/self/status"]).success(), "CapInh:\t0000000000000000\n");
    let ran = exec(&["mkdir", "/sys/fs/cgroup/more"]);
    assert!(ran.code != 0 && ran.stderr.contains("Read-only file system"), "{ran:?}");
    assert_eq!(story.call(&["kill", "--signal", "TERM", "one"]).code, 0);
    assert_eq!(container.wait(), 0);
}

#[tokio::test(flavor = "current_thread")]
async fn no_descriptor_of_the_agent_reaches_a_container() {
    let story = Story::new();
    symlink("/proc/self/fd/7", story.rootfs().join("seven")).expect("a link");
    let pod = Pod::boot(&story).await;
    assert_eq!(pod.run("one", "ls /proc/self/fd", |_| {}).await, (0, "0\n1\n2\n3\n".to_owned()));
    assert_eq!(starts_in(&pod, "/bin").await.as_deref(), Some("/bin\n"));
    for cwd in LEFT_OPEN.map(|fd| format!("/proc/self/fd/{fd}")).chain(["/seven".to_owned()]) {
        let folder = starts_in(&pod, &cwd).await;
        assert!(folder.as_ref().is_none_or(|folder| folder.starts_with('/')), "{cwd}: {folder:?}");
    }
    pod.0.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn links_of_an_image_lead_nothing_out_of_its_root() {
    let story = Story::new();
    tree(&story, "witness");
    let plain = tree(&story, "plain");
    fs::write(plain.join("note"), "note\n").expect("a file");
    fs::create_dir_all(plain.join("proc/sys/kernel")).expect("a folder");
    fs::write(plain.join("proc/sys/kernel/shm_rmid_forced"), "kept").expect("a file");
    let links = tree(&story, "links");
    symlink("/inside", links.join("absolute")).expect("a link");
    symlink("../../../../../../../run", links.join("up")).expect("a link");
    symlink("/proc", links.join("to-proc")).expect("a link");
    symlink("/run", tree(&story, "linked-dev").join("dev")).expect("a link");
    symlink("/inside", tree(&story, "linked-proc").join("proc")).expect("a link");
    let pod = Pod::boot(&story).await;
    let before = seen_of_the_guest(&pod).await;
    let (folder, file) = (guest_rootfs().join("plain"), guest_rootfs().join("plain/note"));

    // What the link leads to is meant as the container sees it.
    let mounted = pod.run("links", "cat /inside/note /run/made", |spec| {
        use_tree(spec, "links");
        bind(spec, &folder, "/absolute");
        bind(spec, &file, "/up/made");
    });
    assert_eq!(mounted.await, (0, "note\nnote\n".to_owned()));
    // The parameter of the kernel is set, and not a file of the image.
    let set = pod.run("set", "cat /proc/sys/kernel/shm_rmid_forced", |spec| {
        use_tree(spec, "plain");
        spec["linux"]["sysctl"] = json!({ "kernel.shm_rmid_forced": "1" });
    });
    assert_eq!(set.await, (0, "1\n".to_owned()));
    let image_file = fs::read_to_string(plain.join("proc/sys/kernel/shm_rmid_forced"));
    assert_eq!(image_file.expect("a file"), "kept");

    let refused = async |tree: &str, destination: Option<&str>| {
        let created = pod.create("refused", "true", |spec| {
            use_tree(spec, tree);
            destination.into_iter().for_each(|destination| bind(spec, &folder, destination));
        });
        let (code, text) = refusal(created.await);
        assert_eq!(code, FAILED_PRECONDITION, "{tree} {destination:?}: {text}");
        text
    };
    assert!(refused("linked-dev", None).await.contains("/dev"));
    assert!(refused("plain", Some("/proc")).await.contains("/proc"));
    assert!(refused("plain", Some("/proc/sys")).await.contains("/proc/sys"));
    refused("linked-proc", None).await;
    refused("links", Some("/to-proc")).await;

    assert_eq!(seen_of_the_guest(&pod).await, before);
    pod.0.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn devices_of_an_image_hide_nothing_and_take_no_writes() {
    let story = Story::new();
    let image = tree(&story, "devices");
    fs::write(image.join("victim"), "kept\n").expect("a file");
    fs::write(image.join("secret"), "secret\n").expect("a file");
    fs::create_dir(image.join("hidden")).expect("a folder");
    fs::write(image.join("hidden/file"), "secret\n").expect("a file");
    fs::create_dir(image.join("dev")).expect("a folder");
    for name in ["null", "console", "ptmx", "pts", "fd", "stdin", "tty", "kcore"] {
        symlink("/victim", image.join("dev").join(name)).expect("a link");
    }
    let pod = Pod::boot(&story).await;
    let script = "cat /secret /hidden/* /proc/keys 2> /dev/null | wc -c; stat -c '%t %T' /dev/null; stat -c %t /dev/console; \
        grep -c ' /dev/pts devpts ' /proc/self/mounts; { echo 3 > /proc/sys/vm/drop_caches; } 2> /dev/null || echo read-only";
    let streams = pod
        .create("one", script, |spec| {
            use_tree(spec, "devices");
            spec["process"]["terminal"] = json!(true);
            spec["linux"]["maskedPaths"] = json!(["/secret", "/hidden", "/proc/keys", "/missing"]);
            spec["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
        })
        .await
        .expect("created");
    pod.0.start("one").await.expect("started");
    // 0x88 is the major number of pseudo-terminals.
    assert_eq!(read(streams.stdout).await, "0\r\n1 3\r\n88\r\n1\r\nread-only\r\n");
    assert_eq!(fs::read_to_string(image.join("victim")).expect("a file"), "kept\n");
    pod.0.stop().await;
}
