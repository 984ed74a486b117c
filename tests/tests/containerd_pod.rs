//! Pods through containerd's CRI plugin, as the kubelet makes them: with a pause container, and through the sandbox service of the shim.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use k8s_cri::v1::{LinuxContainerResources, MountPropagation, NamespaceMode};
use rustix::process::Signal;
use tests::containerd::{Check, Containerd, Release, share_of, tell, tell_share};
use tests::cri::{
    CONTAINER_RUNNING, ConfigVolume, Cri, Pod, SANDBOX_READY, WAIT, container, handler, holds_a_guest, mount,
};
use tests::{becomes_true, checks, eventually, outcome};

const CHECKS: &[Check] = checks![
    a_pod_has_its_name_its_resolver_and_its_sysctls,
    containers_of_a_pod_share_what_the_pod_says,
    volumes_are_those_of_kubernetes,
    volumes_in_memory_are_memory_of_the_guest,
    a_swap_of_a_volume_is_told_to_who_watches_it_and_a_socket_leads_to_the_host,
    out_of_memory_is_the_reason_that_the_status_gives,
    ten_containers_of_a_pod_are_one_vm,
    mounts_of_the_host_come_to_a_container_that_asks_for_them,
];

/// The checks of a pod in sandbox mode, which containerd 1.6 does not have. Last, for they change how containerd 1.7 makes pods.
const SANDBOX_CHECKS: &[Check] = checks![
    a_pod_of_the_sandbox_service_runs_containers,
    a_pod_of_the_sandbox_service_outlives_containerd_and_not_its_vm,
];

/// How often a container crashes.
const CRASHES: u32 = 3;
/// What runs in the container that watches a volume: a Python of the host, which says the name of what was moved to the volume.
const WATCH: &str = r#"
lib=/host/lib/x86_64-linux-gnu
PYTHONHOME=/host exec $lib/ld-linux-x86-64.so.2 --library-path $lib /host/bin/python3 -SBc '
import ctypes, os
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(0)
libc.inotify_add_watch(fd, b"/settings", 0x80)
while True:
    print(os.read(fd, 4096)[16:].split(b"\0")[0].decode(), flush=True)'
"#;
/// The same Python, which reads what a socket has to say.
const CONNECT: &str = r#"
lib=/host/lib/x86_64-linux-gnu
PYTHONHOME=/host exec $lib/ld-linux-x86-64.so.2 --library-path $lib /host/bin/python3 -SBc '
import _socket
peer = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0)
peer.connect("/run/host.sock")
print(peer.recv(100, _socket.MSG_WAITALL).decode(), end="")'
"#;

/// What depends most on the release.
const SHORT_CHECKS: &[Check] = checks![volumes_in_memory_are_memory_of_the_guest];

#[test]
fn bookworm() {
    tell_share(Release::Bookworm, CHECKS, SHORT_CHECKS);
}

#[test]
fn trixie() {
    tell(Release::Trixie, &[&share_of(Release::Trixie, CHECKS, SHORT_CHECKS), SANDBOX_CHECKS].concat());
}

#[test]
fn sid() {
    let of_sandboxes = share_of(Release::Sid, SANDBOX_CHECKS, &SANDBOX_CHECKS[..1]);
    tell(Release::Sid, &[share_of(Release::Sid, CHECKS, SHORT_CHECKS), of_sandboxes].concat());
}

async fn assert_pod_runs(cri: &mut Cri, pod: &Pod) {
    let one = cri.start(pod, container("one", WAIT)).await.expect("started");
    pod.log_shows("one", "up");
    assert_eq!(cri.status(&one).await.state, CONTAINER_RUNNING);
    assert_eq!(cri.shell(&one, "hostname; cat /proc/1/comm").await, "story-pod\nsh\n");
    let short = cri.start(pod, container("short", "echo out; echo err >&2; exit 4")).await.expect("started");
    let ended = cri.until_exited(&short).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (4, "Error"));
    pod.log_shows("short", "out\n");
    pod.log_shows("short", "err\n");
    cri.remove(&short).await.expect("removed");
    assert_eq!(cri.status(&one).await.state, CONTAINER_RUNNING);
}

fn a_pod_has_its_name_its_resolver_and_its_sysctls(containerd: &mut Containerd) {
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let mut config = cri.pod_config("story-pod");
        let linux = config.linux.as_mut().expect("linux");
        linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "80".to_owned());
        let pod = cri.run_pod(config, handler()).await.expect("a pod");
        let status = cri.pod_status(&pod).await;
        assert_eq!(status.state, SANDBOX_READY);
        assert!(status.network.as_ref().is_some_and(|network| network.ip.starts_with("10.88.")), "{status:?}");
        assert_pod_runs(&mut cri, &pod).await;
        assert!(handler() != "vm" || holds_a_guest(&cri.task_metrics(&pod).await), "the pod's task stands for its VM");
        let one = cri.start(&pod, container("two", WAIT)).await.expect("started");
        let resolver = cri.shell(&one, "cat /etc/resolv.conf").await;
        assert!(resolver.contains("nameserver 192.0.2.53") && resolver.contains("story.example.org"), "{resolver}");
        assert_eq!(cri.shell(&one, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start").await, "80\n");
        let script = "until stty size | grep 99; do sleep 0.2; done; read line; echo got $line";
        let mut terminal = cri.exec_on_terminal(containerd, &one, &["sh", "-c", script]).await;
        terminal.send(4, br#"{"Width": 99, "Height": 33}"#);
        terminal.send(0, b"hello\n");
        let output = terminal.receive_until(1, "got hello");
        assert!(output.contains("33 99"), "{output}");
        assert!(terminal.receive_until(3, "}").contains("Success"), "its exit status is told");
        let resources = LinuxContainerResources { memory_limit_in_bytes: 100 << 20, ..Default::default() };
        cri.update(&one, resources).await.expect("updated");
        assert_eq!(cri.shell(&one, "cat /sys/fs/cgroup/memory.max").await, format!("{}\n", 100 << 20));
        cri.remove_pod(&pod).await.expect("removed");
        assert_eq!(cri.pod_count().await.expect("listed"), 0);
    });
}

fn containers_of_a_pod_share_what_the_pod_says(containerd: &mut Containerd) {
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let mut config = cri.pod_config("story-pod");
        let linux = config.linux.as_mut().expect("linux");
        let security = linux.security_context.as_mut().expect("security context");
        security.namespace_options.as_mut().expect("namespaces").pid = NamespaceMode::Pod.into();
        let pod = cri.run_pod(config, handler()).await.expect("a pod");
        let shared = |name: &str, script: &str| {
            let mut config = container(name, script);
            let linux = config.linux.as_mut().expect("linux");
            let security = linux.security_context.as_mut().expect("security context");
            security.namespace_options.as_mut().expect("namespaces").pid = NamespaceMode::Pod.into();
            config
        };
        let _sleeper = cri.start(&pod, shared("sleeper", "exec sleep 12345")).await.expect("started");
        let looker = cri.start(&pod, shared("looker", WAIT)).await.expect("started");
        let processes = cri.shell(&looker, "cat /proc/*/cmdline | tr '\\0' ' '").await;
        assert!(processes.contains("sleep 12345"), "{processes}");
        assert_ne!(
            cri.shell(&looker, "cat /proc/1/comm").await,
            "sh\n",
            "the pod's first process is not a container's"
        );
        cri.shell(&looker, "echo shared >/dev/shm/note").await;
        let third = cri.start(&pod, shared("third", WAIT)).await.expect("started");
        assert_eq!(cri.shell(&third, "cat /dev/shm/note").await, "shared\n");
        cri.remove_pod(&pod).await.expect("removed");
        assert_eq!(cri.pod_count().await.expect("listed"), 0);
    });
}

fn volumes_are_those_of_kubernetes(containerd: &mut Containerd) {
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let config = cri.pod_config("story-pod");
        let pod = cri.run_pod(config, handler()).await.expect("a pod");
        let volumes = containerd.path("volumes");
        let mut settings = ConfigVolume::create(volumes.join("settings"), "key", "old");
        let empty = volumes.join("empty");
        fs::create_dir(&empty).expect("a folder");
        let log = volumes.join("termination-log");
        fs::write(&log, "").expect("a file");
        fs::create_dir(empty.join("sub")).expect("a folder");
        // As the kubelet does for `subPath`: a mount of what is meant, at a place of its own.
        let (part, file) = (volumes.join("part"), volumes.join("file"));
        fs::create_dir(&part).expect("a folder");
        fs::write(&file, "").expect("a file");
        containerd.mount(&["--bind"], &empty.join("sub"), &part);
        containerd.mount(&["--bind"], &settings.path().join("..data/key"), &file);
        let with_volumes = |name: &str| {
            let mut config = container(name, WAIT);
            config.mounts = vec![
                mount(settings.path(), "/settings", true),
                mount(&empty, "/empty", false),
                mount(&part, "/part", false),
                mount(&file, "/etc/app/key", true),
                mount(&log, "/dev/termination-log", false),
            ];
            config
        };
        let (first, second) = (with_volumes("first"), with_volumes("second"));
        let first = cri.start(&pod, first).await.expect("started");
        let second = cri.start(&pod, second).await.expect("started");
        assert_eq!(cri.shell(&first, "cat /settings/key").await, "old");
        settings.update("key", "new");
        // The guest asks the host again for a name after a second.
        let watch = "for i in $(seq 100); do grep -q new /settings/key && break; sleep 0.1; done; cat /settings/key";
        assert_eq!(cri.shell(&first, watch).await, "new");
        assert_eq!(cri.shell(&first, "cat /etc/app/key").await, "old", "a part of a volume is not swapped");
        assert_ne!(cri.exec(&first, &["touch", "/settings/x"]).await.expect("executed").0, 0, "it is read-only");
        cri.shell(&first, "echo from-first >/empty/note; echo last words >/dev/termination-log").await;
        assert_eq!(cri.shell(&second, "cat /empty/note").await, "from-first\n");
        cri.shell(&first, "echo in-part >/part/note").await;
        assert_eq!(cri.shell(&second, "cat /empty/sub/note").await, "in-part\n");
        assert_eq!(fs::read_to_string(&log).expect("the log"), "last words\n");
        cri.remove_pod(&pod).await.expect("removed");
        containerd.unmount(&[&part, &file]);
        fs::remove_dir_all(&volumes).expect("nothing holds the volumes");
    });
}

fn mounts_of_the_host_come_to_a_container_that_asks_for_them(containerd: &mut Containerd) {
    let in_room = |script: &str| outcome(containerd.command("sh", &["-c", script])).success().to_owned();
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let pod = cri.run_pod(cri.pod_config("story-pod"), handler()).await.expect("a pod");
        let volume = containerd.path("volume");
        let disk = volume.join("disk");
        fs::create_dir_all(&disk).expect("a folder");
        let (at, disk_at) = (volume.display(), disk.display());
        in_room(&format!("mount --bind {at} {at} && mount --make-shared {at}"));
        let with_volume = |name: &str, propagation: MountPropagation| {
            let mut config = container(name, WAIT);
            config.mounts = vec![mount(&volume, "/volume", false)];
            config.mounts[0].propagation = propagation.into();
            config
        };
        let slave = with_volume("slave", MountPropagation::PropagationHostToContainer);
        let slave = cri.start(&pod, slave).await.expect("started");
        let private = with_volume("private", MountPropagation::PropagationPrivate);
        let private = cri.start(&pod, private).await.expect("started");
        in_room(&format!("mount -t tmpfs later {disk_at} && echo later >{disk_at}/note"));
        assert_eq!(cri.shell(&slave, "cat /volume/disk/note; echo reply >/volume/disk/reply").await, "later\n");
        assert_eq!(in_room(&format!("cat {disk_at}/reply")), "reply\n");
        assert_eq!(cri.shell(&private, "ls /volume/disk").await, "");
        eventually(Duration::from_secs(10), "the host unmounts it", || {
            outcome(containerd.command("umount", &[disk.to_str().expect("a path of ours")])).code == 0
        });
        assert_eq!(cri.shell(&slave, "ls /volume/disk").await, "");
        let shared = with_volume("shared", MountPropagation::PropagationBidirectional);
        let refused = cri.start(&pod, shared).await.expect_err("refused");
        assert!(refused.message().contains("ask for rslave (HostToContainer)"), "{refused}");
        cri.remove_pod(&pod).await.expect("removed");
        containerd.unmount(&[&volume]);
        fs::remove_dir_all(&volume).expect("nothing holds the volume");
    });
}

fn volumes_in_memory_are_memory_of_the_guest(containerd: &mut Containerd) {
    const SIZE_OF: &str = "df -k /cache /dev/shm | awk 'NR > 1 { print $2, $6 }'";
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let pod = cri.run_pod(cri.pod_config("story-pod"), handler()).await.expect("a pod");
        // An `emptyDir` of the kubelet with `medium: Memory` and `sizeLimit: 8Mi`, and a `subPath` in it.
        let volumes = containerd.path("volumes");
        let (cache, part) = (volumes.join("kubernetes.io~empty-dir/cache"), volumes.join("part"));
        fs::create_dir_all(&cache).expect("a folder");
        fs::create_dir_all(&part).expect("a folder");
        containerd.mount(&["-t", "tmpfs", "-o", "size=8m,mode=2770,gid=1234"], Path::new("memory"), &cache);
        let made = outcome(containerd.command("mkdir", &["-m", "700", cache.join("part").to_str().expect("a path")]));
        let _ = made.success();
        containerd.mount(&["--bind"], &cache.join("part"), &part);
        let with_volumes = |name: &str, script: &str| {
            let mut config = container(name, script);
            config.mounts = vec![mount(&cache, "/cache", false), mount(&part, "/part", false)];
            config
        };
        // An init container has ended before the next one is made.
        let init = with_volumes("init", "echo from-init >/cache/note; echo in-part >/part/note");
        let init = cri.start(&pod, init).await.expect("started");
        assert_eq!(cri.until_exited(&init).await.exit_code, 0);
        cri.remove(&init).await.expect("removed");
        let main = cri.start(&pod, with_volumes("main", WAIT)).await.expect("started");
        assert_eq!(cri.shell(&main, "cat /cache/note /cache/part/note").await, "from-init\nin-part\n");
        let paths = [&cache, &part].map(|path| path.to_str().expect("a path of ours"));
        let owners = outcome(containerd.command("stat", &["-c", "%a:%g", paths[0], paths[1]]));
        assert_eq!(cri.shell(&main, "stat -c %a:%g /cache /part").await, owners.success());
        assert_eq!(cri.shell(&main, SIZE_OF).await, "8192 /cache\n65536 /dev/shm\n");
        let filled = cri.exec(&main, &["dd", "if=/dev/zero", "of=/cache/big", "bs=1M", "count=9"]).await;
        assert!(filled.expect("executed").2.contains("No space left on device"));
        let on_host = outcome(containerd.command("ls", &[paths[0]]));
        assert_eq!(on_host.success(), "part\n", "nothing of it is memory of the host");
        cri.remove_pod(&pod).await.expect("removed");
        containerd.unmount(&[&part, &cache]);
        fs::remove_dir_all(&volumes).expect("nothing holds the volumes");
    });
}

fn a_swap_of_a_volume_is_told_to_who_watches_it_and_a_socket_leads_to_the_host(containerd: &mut Containerd) {
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let pod = cri.run_pod(cri.pod_config("story-pod"), handler()).await.expect("a pod");
        let volumes = containerd.path("volumes");
        let mut settings = ConfigVolume::create(volumes.join("kubernetes.io~configmap/settings"), "key", "old");
        let socket = volumes.join("socket");
        let listener = UnixListener::bind(&socket).expect("bound");
        let server = std::thread::spawn(move || listener.accept().expect("a connection").0.write_all(b"from the host"));
        let mut watcher = container("watcher", WATCH);
        watcher.mounts = vec![
            mount(settings.path(), "/settings", true),
            mount(Path::new("/usr"), "/host", true),
            mount(&socket, "/run/host.sock", false),
        ];
        let watcher = cri.start(&pod, watcher).await.expect("started");
        assert_eq!(cri.shell(&watcher, CONNECT).await, "from the host");
        server.join().expect("no panic").expect("written");
        assert_eq!(cri.shell(&watcher, "cat /settings/key").await, "old");
        // The first swaps may come before it watches.
        let is_told = becomes_true(Duration::from_secs(60), || {
            settings.update("key", "new");
            pod.log("watcher").contains("..data")
        });
        assert!(is_told, "inotify tells nothing: {:?}", pod.log("watcher"));
        settings.update("key", "last");
        let watch = "until grep -q last /settings/key; do sleep 0.1; done; cat /settings/key; ls -A /settings | wc -l";
        assert_eq!(cri.shell(&watcher, watch).await, "last3\n", "the link, `..data` and one generation");
        assert_ne!(cri.exec(&watcher, &["touch", "/settings/x"]).await.expect("executed").0, 0, "it is read-only");
        cri.remove_pod(&pod).await.expect("removed");
        fs::remove_dir_all(&volumes).expect("nothing holds the volumes");
    });
}

fn out_of_memory_is_the_reason_that_the_status_gives(containerd: &mut Containerd) {
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let config = cri.pod_config("story-pod");
        let pod = cri.run_pod(config, handler()).await.expect("a pod");
        let mut hungry = container("hungry", "head -c 100m /dev/zero | tail >/dev/null; exit $?");
        hungry.command = ["sh", "-c", "exec tail /dev/zero"].map(str::to_owned).to_vec();
        let linux = hungry.linux.as_mut().expect("linux");
        let memory = LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..Default::default() };
        linux.resources = Some(memory);
        let hungry = cri.start(&pod, hungry).await.expect("started");
        let ended = cri.until_exited(&hungry).await;
        assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"));
        assert_eq!(cri.pod_status(&pod).await.state, SANDBOX_READY, "the pod goes on");
        cri.remove_pod(&pod).await.expect("removed");
    });
}

/// One life of a container that crashes.
async fn crash(cri: &mut Cri, pod: &Pod, attempt: u32) {
    let mut looping = container("looping", "exit 1");
    looping.metadata.as_mut().expect("metadata").attempt = attempt;
    let looping = cri.start(pod, looping).await.expect("started");
    assert_eq!(cri.until_exited(&looping).await.exit_code, 1);
    cri.remove(&looping).await.expect("removed");
}

/// How many the shim and the VMM have open.
fn descriptors(containerd: &Containerd) -> usize {
    let pids = ["vmm", "containerd-shim-vm-v2"].into_iter().flat_map(|program| containerd.processes(program));
    pids.map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)).sum()
}

fn ten_containers_of_a_pod_are_one_vm(containerd: &mut Containerd) {
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let config = cri.pod_config("story-pod");
        let pod = cri.run_pod(config, handler()).await.expect("a pod");
        let mut running = Vec::new();
        for number in 0..9 {
            running.push(cri.start(&pod, container(&format!("number-{number}"), WAIT)).await.expect("started"));
        }
        crash(&mut cri, &pod, 0).await;
        let descriptors = descriptors(containerd);
        for attempt in 1..CRASHES {
            crash(&mut cri, &pod, attempt).await;
        }
        // A connection of containerd ends a moment later.
        eventually(Duration::from_secs(10), "no descriptor stays of a container that came and went", || {
            self::descriptors(containerd) <= descriptors
        });
        for container in &running {
            assert_eq!(cri.status(container).await.state, CONTAINER_RUNNING);
        }
        assert_eq!(containerd.processes("vmm").len(), 1);
        cri.remove_pod(&pod).await.expect("removed");
    });
}

fn a_pod_of_the_sandbox_service_runs_containers(containerd: &mut Containerd) {
    containerd.serve_sandboxes();
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let config = cri.pod_config("story-pod");
        let pod = cri.run_pod(config, "vm-sandbox").await.expect("a pod");
        let status = cri.pod_status(&pod).await;
        assert_eq!(status.state, SANDBOX_READY);
        assert!(cri.pod_info(&pod).await.contains_key("memory_mib"), "it is the shim that tells about its VM");
        assert_pod_runs(&mut cri, &pod).await;
        assert_eq!(containerd.processes("vmm").len(), 1, "a pod is one VM");
        if containerd.release == Release::Sid {
            // The first with this method.
            assert!(holds_a_guest(&cri.sandbox_metrics(&pod).await), "it is the VM that the host pays for");
        }
        let looker = cri.start(&pod, container("looker", WAIT)).await.expect("started");
        let files = cri.shell(&looker, "cat /etc/hostname /etc/hosts /etc/resolv.conf").await;
        assert!(files.starts_with("story-pod\n127.0.0.1\tlocalhost\n"), "{files}");
        assert!(files.contains("nameserver 192.0.2.53\n"), "{files}");
        let own = cri.shell(&looker, "ip addr show eth0").await;
        let address = status.network.expect("a network").ip;
        assert!(own.contains(&format!("inet {address}/16")), "{own}");
        cri.shell(&looker, "echo shared >/dev/shm/note").await;
        let second = cri.start(&pod, container("second", WAIT)).await.expect("started");
        assert_eq!(cri.shell(&second, "cat /dev/shm/note").await, "shared\n");
        cri.remove_pod(&pod).await.expect("removed");
        assert_eq!(cri.pod_count().await.expect("listed"), 0);
    });
}

fn a_pod_of_the_sandbox_service_outlives_containerd_and_not_its_vm(containerd: &mut Containerd) {
    containerd.serve_sandboxes();
    let (pod, looker) = containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        let pod = cri.run_pod(cri.pod_config("story-pod"), "vm-sandbox").await.expect("a pod");
        let looker = cri.start(&pod, container("looker", WAIT)).await.expect("started");
        (pod, looker)
    });
    containerd.kill();
    containerd.boot();
    containerd.block_on(async {
        let mut cri = Cri::connect(containerd).await;
        assert_eq!(cri.pod_status(&pod).await.state, SANDBOX_READY);
        assert_eq!(cri.shell(&looker, "echo still here").await, "still here\n");
        containerd.signal("vmm", Signal::KILL);
        cri.until_not_ready(&pod).await;
        cri.remove_pod(&pod).await.expect("removed");
        assert_eq!(cri.pod_count().await.expect("listed"), 0);
    });
}
