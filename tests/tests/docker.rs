//! `docker run --runtime io.containerd.vm.v2`: one option more, and the container is a VM.

use std::fs;
use std::path::Path;

use tests::containerd::{BUSYBOX, Check, Containerd, Release, tell};
use tests::docker::Docker;
use tests::{checks, outcome};

const CHECKS: &[Check] = checks![docker_runs_containers_in_vms];
const RUN: [&str; 3] = ["run", "--runtime", "io.containerd.vm.v2"];

#[test]
fn trixie() {
    tell(Release::Trixie, CHECKS);
}

/// The commands of the README's section.
fn readme_commands() -> Vec<String> {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).expect("README");
    let section = readme.split("\n## Docker\n").nth(1).expect("the section").split("\n## ").next();
    let commands = section.expect("the section").lines().filter_map(|line| line.strip_prefix("    "));
    commands.map(str::to_owned).collect()
}

fn docker_runs_containers_in_vms(containerd: &mut Containerd) {
    let docker = Docker::start(containerd);
    let run = |arguments: &[&str]| docker.run(&[&RUN, arguments].concat());
    let refused = run(&["--rm", BUSYBOX, "true"]);
    assert!(refused.code == 125 && refused.stderr.contains("`allowed = true` below `[hooks]`"), "{refused:?}");
    let said: String = readme_commands().iter().map(|command| docker.shell(command).success().to_owned()).collect();
    assert_eq!(said, "hello\n");

    let ran = run(&["--rm", "--network", "none", BUSYBOX, "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (7, "out\n", "err\n"), "{ran:?}");

    let page = "mkdir /www; echo page of the VM >/www/index.html; trap 'exit 3' TERM; httpd -p 80 -h /www; echo up; while true; do sleep 0.1; done";
    let web = run(&["--detach", "--name", "web", "--publish", "8080:80", BUSYBOX, "sh", "-c", page]);
    let _ = web.success();
    let inside = docker.run(&["exec", "web", "sh", "-c", "ip addr show eth0; ping -c 1 -W 20 172.17.0.1"]);
    assert!(inside.success().contains("inet 172.17.0.2/16"), "{inside:?}");
    for address in ["172.17.0.2", "127.0.0.1:8080"] {
        let fetched = outcome(containerd.command("curl", &["--silent", "--show-error", "--max-time", "60", address]));
        assert_eq!(fetched.success(), "page of the VM\n");
    }
    assert_eq!(containerd.processes("vmm").len(), 1);
    assert_eq!(docker.run(&["logs", "web"]).success(), "up\n");
    let _ = docker.run(&["stop", "web"]).success();
    assert_eq!(docker.run(&["wait", "web"]).success(), "3\n");
    let _ = docker.run(&["rm", "web"]).success();
    fs::remove_dir_all(containerd.path("etc-vmrun/config.d")).expect("the README's drop-in");
}
