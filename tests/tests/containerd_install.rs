//! `vmrun install containerd` and its opposite, with the commands that the README shows and the containerd that they change.

use std::fs;
use std::path::Path;

use tests::checks;
use tests::containerd::{Check, Containerd};
use tests::cri::{Cri, SANDBOX_READY};
use tests::{Outcome, outcome};

const CHECKS: &[Check] = checks![
    the_commands_of_the_readme_run,
    a_handler_in_a_file_with_a_section_of_cri_runs_pods_and_is_taken_back,
    a_file_that_containerd_does_not_understand_stays_as_it_is,
];

/// The image of the README's commands, which a story has no registry for.
const README_IMAGE: &str = "docker.io/library/busybox:latest";

tests::tell_each_release!(CHECKS);

/// `vmrun` in containerd's place; the link to the shim is only what it makes.
fn vmrun(containerd: &Containerd, arguments: &[&str]) -> Outcome {
    let program = std::env::var("VMRUN").expect("VMRUN names the program: use `make test`");
    outcome(containerd.command(&program, arguments))
}

fn remove_link(containerd: &Containerd) {
    fs::remove_file(containerd.path("bin/containerd-shim-vm-v2")).expect("the room's link");
}

/// Puts the room's link back, for the checks that follow.
fn restore_link(containerd: &Containerd) {
    let program = std::env::var("VMRUN").expect("VMRUN names the program: use `make test`");
    let shim = Path::new(&program).with_file_name("containerd-shim-vm-v2");
    std::os::unix::fs::symlink(shim, containerd.path("bin/containerd-shim-vm-v2")).expect("a link");
}

/// The commands of the README's section, without those that need a network or systemd.
fn readme_commands() -> Vec<String> {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).expect("README");
    let section = readme.split("\n## containerd and Kubernetes\n").nth(1).expect("the section").split("\n## ").next();
    let commands = section.expect("the section").lines().filter_map(|line| line.strip_prefix("    "));
    let here = commands.filter(|command| !command.starts_with("systemctl") && !command.contains("images pull"));
    here.map(|command| command.split('#').next().expect("a command").trim().to_owned()).collect()
}

fn the_commands_of_the_readme_run(containerd: &mut Containerd) {
    containerd.import_as(README_IMAGE);
    remove_link(containerd);
    let config = fs::read_to_string(containerd.path("etc/config.toml")).expect("configuration");
    // The README's containerd has no handler of that name yet.
    let plain = config.replace("runtimes.vm]", "runtimes.other]");
    fs::write(containerd.path("etc/config.toml"), &plain).expect("configuration");
    let program = std::env::var("VMRUN").expect("VMRUN names the program: use `make test`");
    let commands = readme_commands();
    let ran: Vec<String> = commands
        .iter()
        .map(|command| {
            let command = command.replace("target/release/vmrun", &program);
            outcome(containerd.command("sh", &["-c", &command])).success().to_owned()
        })
        .collect();
    assert!(ran.len() >= 3, "{commands:?}");
    assert!(ran[0].contains("a container ran in a VM"), "{ran:?}");
    assert!(ran[1].contains("hello"), "{ran:?}");
    assert_eq!(fs::read_to_string(containerd.path("etc/config.toml")).expect("configuration"), plain);
    assert!(!containerd.path("bin/containerd-shim-vm-v2").exists(), "the link is taken back");
    fs::write(containerd.path("etc/config.toml"), config).expect("configuration");
    restore_link(containerd);
}

fn a_handler_in_a_file_with_a_section_of_cri_runs_pods_and_is_taken_back(containerd: &mut Containerd) {
    let config = fs::read_to_string(containerd.path("etc/config.toml")).expect("configuration");
    remove_link(containerd);
    let installed = vmrun(containerd, &["install", "containerd", "--handler", "story", "--no-check"]);
    assert!(installed.success().contains("handler: story"), "{installed:?}");
    let again = vmrun(containerd, &["install", "containerd", "--handler", "story", "--no-check"]);
    assert!(again.code == 1 && again.stderr.contains("has the handler story already"), "{again:?}");
    containerd.kill();
    containerd.boot();
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let config = cri.pod_config("story-pod");
        let pod = cri.run_pod(config, "story").await.expect("a pod");
        assert_eq!(cri.pod_status(&pod).await.state, SANDBOX_READY);
        cri.remove_pod(&pod).await.expect("removed");
    });
    let taken_back = vmrun(containerd, &["uninstall", "containerd"]);
    assert!(taken_back.success().contains("restart containerd"), "{taken_back:?}");
    assert_eq!(fs::read_to_string(containerd.path("etc/config.toml")).expect("configuration"), config);
    assert!(!containerd.path("etc/conf.d").exists(), "the drop-in is taken back");
    restore_link(containerd);
}

fn a_file_that_containerd_does_not_understand_stays_as_it_is(containerd: &mut Containerd) {
    let folder = containerd.path("other");
    fs::create_dir_all(&folder).expect("a folder");
    let config = folder.join("config.toml");
    let name = config.to_str().expect("a path of ours");
    fs::write(&config, "root = \"/x\"\n").expect("configuration");
    let old = vmrun(containerd, &["install", "containerd", "--config", name, "--no-check"]);
    assert!(old.code == 1 && old.stderr.contains("version"), "{old:?}");
    fs::write(&config, "version = 2\n[grpc\n").expect("configuration");
    let broken = vmrun(containerd, &["install", "containerd", "--config", name, "--no-check"]);
    assert_eq!(broken.code, 1, "{broken:?}");
    assert_eq!(fs::read_to_string(&config).expect("configuration"), "version = 2\n[grpc\n");
}
