//! The VM itself: how it ends and what is then known, how it is controlled, what a guest finds of its CPUs.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{IntoRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use tests::Story;
use tests::guest::{self, BUSY, Vm, config, kernel};
use vmm_api::Fd;
use vmm_api::control::{Exit, ExitReason, Message, Reply, Request, State};

/// `mov al, 0xfe; out 0x64, al; hlt`: the reset line of the keyboard controller.
const RESET: [u8; 5] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4];

/// What `make build` leaves beside vmrun.
fn beside_vmrun(name: &str) -> PathBuf {
    let vmrun = std::env::var_os("VMRUN").expect("VMRUN names the program: use `make test`");
    PathBuf::from(vmrun).with_file_name(name)
}

fn guest_kernel() -> OwnedFd {
    File::open(beside_vmrun("vmlinux")).expect("the guest kernel beside vmrun").into()
}

#[test]
fn a_reset_ends_the_vm_and_the_last_lines_of_the_console_are_kept() {
    // For each byte of the text behind the code: out to the console's port; then the reset.
    let code = [
        &[0xbe, 0x16, 0, 0x10, 0][..], // mov esi, text
        &[0x66, 0xba, 0xf8, 0x03],     // mov dx, 0x3f8
        &[0xb9, 10, 0, 0, 0],          // mov ecx, 10
        &[0xf3, 0x6e],                 // rep outsb
        &[0x90],                       // nop
        &RESET,
        b"last words",
    ]
    .concat();
    let exit = Vm::start(kernel(&code)).end();
    assert_eq!(exit.reason, ExitReason::GuestReset);
    assert_eq!(exit.console_tail, "last words");
}

#[test]
fn a_panic_of_the_guests_kernel_is_in_the_console_tail() {
    let exit = Vm::start(guest_kernel()).end();
    assert_eq!(exit.reason, ExitReason::GuestReset);
    assert!(exit.console_tail.contains("Unable to mount root fs"), "{}", exit.console_tail);
}

#[test]
fn a_triple_fault_says_what_is_known_of_the_vcpu() {
    // out 0x80, al; lidt of an empty table; an undefined instruction.
    let code = [&[0xe6, 0x80, 0x0f, 0x01, 0x1d, 0, 0, 0x11, 0, 0x0f, 0x0b][..]].concat();
    let exit = Vm::start(kernel(&code)).end();
    let ExitReason::TripleFault { registers } = exit.reason else { panic!("{exit:?}") };
    assert!(registers.contains("rip=0x10000") || registers.contains("lost on this CPU"), "{registers}");
    assert!(registers.contains("port 0x80"), "{registers}");
}

#[test]
fn code_that_kvm_cannot_emulate_ends_the_vm_with_its_registers() {
    // mov eax, 0xd0000000; jmp eax: there is neither RAM nor a device.
    let exit = Vm::start(kernel(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0])).end();
    let ExitReason::KvmError { detail } = exit.reason else { panic!("{exit:?}") };
    assert!(detail.contains("cannot emulate"), "{detail}");
    assert!(detail.contains("rip=0xd0000000"), "{detail}");
}

#[test]
fn accesses_to_ports_and_addresses_without_a_device_are_harmless() {
    // Every port below 0x1000 but the reset line's: in and out of 1, 2 and 4 bytes; then addresses of the hole; then a reset.
    let code = [
        &[0x31, 0xd2, 0x31, 0xc0][..],                  // xor edx, edx; xor eax, eax
        &[0x66, 0x83, 0xfa, 0x64, 0x74, 0x0a],          // next: cmp dx, 0x64; je skip
        &[0xec, 0x66, 0xed, 0xed],                      // in al, dx; in ax, dx; in eax, dx
        &[0x31, 0xc0, 0xee, 0x66, 0xef, 0xef],          // xor eax, eax; out dx, al; out dx, ax; out dx, eax
        &[0x42, 0x81, 0xfa, 0, 0x10, 0, 0, 0x75, 0xe8], // skip: inc edx; cmp edx, 0x1000; jne next
        &[0xbb, 0, 0, 0, 0xc0],                         // mov ebx, 0xc0000000
        &[0x8b, 0x03, 0x8a, 0x43, 0x07, 0x89, 0x03],    // more: mov eax, [ebx]; mov al, [ebx+7]; mov [ebx], eax
        &[0x81, 0xc3, 0x03, 0x10, 0, 0],                // add ebx, 0x1003
        &[0x81, 0xfb, 0, 0, 0x20, 0xc0, 0x72, 0xeb],    // cmp ebx, 0xc0200000; jb more
        &RESET,
    ]
    .concat();
    let exit = Vm::start(kernel(&code)).end();
    assert_eq!(exit.reason, ExitReason::GuestReset, "{exit:?}");
}

/// A pause may come before the guest's first instruction; each question gives the guest time to get there.
fn wait_for_a_port_exit(vm: &mut Vm) {
    let ran = (0..100_000).any(|_| match vm.ask(&Request::Stats) {
        Reply::Stats(stats) => stats.port_exits > 0,
        other => panic!("{other:?}"),
    });
    assert!(ran, "the guest has not run");
}

#[test]
fn a_running_vm_can_be_paused_resumed_counted_and_shut_down() {
    let mut vm = Vm::start(kernel(&BUSY));
    assert_eq!(vm.ask(&Request::State), Reply::State(State::Running));
    wait_for_a_port_exit(&mut vm);
    assert_eq!(vm.ask(&Request::Pause), Reply::Done);
    assert_eq!(vm.ask(&Request::State), Reply::State(State::Paused));
    let paused = vm.ask(&Request::Stats);
    let Reply::Stats(stats) = paused else { panic!("{paused:?}") };
    assert!(stats.port_exits > 0, "{stats:?}");
    assert_eq!(vm.ask(&Request::Stats), paused);
    assert_eq!(vm.ask(&Request::Resume), Reply::Done);
    assert_eq!(vm.ask(&Request::State), Reply::State(State::Running));
    let removed = vm.ask(&Request::RemoveShare { tag: "none".to_owned() });
    assert_eq!(removed, Reply::Refused("the VM has no device \"share none\"".to_owned()));
    assert_eq!(vm.ask(&Request::Shutdown), Reply::Done);
    assert_eq!(vm.end().reason, ExitReason::Requested);
}

#[test]
fn eight_cpus_are_one_package_of_eight_cores_and_the_clock_is_kvms() {
    let story = Story::new();
    let script = "nproc; grep -c ^processor /proc/cpuinfo; grep -e ^siblings -e '^cpu cores' /proc/cpuinfo | sort -u; \
        grep ^apicid /proc/cpuinfo | cut -d: -f2 | tr -d '\\n'; echo; \
        cat /sys/devices/system/clocksource/clocksource0/current_clocksource; \
        grep -c -w -e vmx -e svm -e arch_perfmon /proc/cpuinfo";
    let ran = story.run(&["--cpus", "8"], &["sh", "-c", script]);
    let expected = "8\n8\ncpu cores\t: 8\nsiblings\t: 8\n 0 1 2 3 4 5 6 7\nkvm-clock\n0\n";
    assert_eq!(ran.stdout, expected, "{ran:?}");
}

#[test]
fn kernel_and_image_lie_in_large_pages_by_the_policy_of_the_host() {
    const POLICY: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    let story = Story::new();
    let before = fs::read_to_string(POLICY).expect("a policy");
    let chosen = |text: &str| text.split(['[', ']']).nth(1).expect("one is chosen").to_owned();
    fs::write(POLICY, "madvise").expect("the policy is set");
    story.detach("one", &[], &["sleep", "1000"]);
    fs::write(POLICY, chosen(&before)).expect("the policy is set back");
    let smaps = format!("/proc/{}/smaps", story.inspect("one")["State"]["Pid"]);
    let smaps = fs::read_to_string(smaps).expect("its memory");
    let of_shmem = smaps.lines().filter_map(|line| line.strip_prefix("ShmemPmdMapped:"));
    let kib: u64 = of_shmem.map(|size| size.trim().trim_end_matches(" kB").parse::<u64>().expect("a size")).sum();
    assert!(kib >= 10 << 10, "{kib} KiB are in large pages");
    let _ = story.call(&["rm", "--force", "one"]).success();
}

#[test]
fn vcpus_beyond_the_first_ones_are_present_but_do_not_start() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let console = File::create(dir.path().join("console")).expect("a file");
    let mut config = config(Fd(guest_kernel().into_raw_fd()));
    config.console = Some(Fd(console.into_raw_fd()));
    (config.vcpus, config.boot_vcpus) = (4, 2);
    assert_eq!(Vm::of(&config).end().reason, ExitReason::GuestReset);
    let console = fs::read_to_string(dir.path().join("console")).expect("text");
    assert!(console.contains("Brought up 1 node, 2 CPUs"), "{console}");
    assert!(console.contains("Allowing 4 present CPUs"), "{console}");
}

#[test]
fn a_signal_ends_the_vm_and_is_named() {
    let (mut control, theirs) = UnixStream::pair().expect("a socket pair");
    let mut config = config(Fd(4));
    config.control = Fd(3);
    let mut vmm = guest::vmm(&config, vec![theirs.into(), kernel(&BUSY)]).spawn().expect("the VMM starts");
    let mut lines = BufReader::new(control.try_clone().expect("a socket")).lines();
    // Its answer says that it watches for signals.
    writeln!(control, r#"{{"request":"state"}}"#).expect("written");
    lines.next().expect("a line").expect("readable");
    let killed = Command::new("kill").args(["-TERM", &vmm.id().to_string()]).status().expect("kill runs");
    assert!(killed.success());
    let last: Message = serde_json::from_str(&lines.next().expect("a line").expect("readable")).expect("a message");
    let Message::Exited(Exit { reason, .. }) = last else { panic!("{last:?}") };
    assert_eq!(reason, ExitReason::Signal { signal: 15 });
    assert_eq!(vmm.wait().expect("wait").code(), Some(143));
}

#[test]
fn check_passes_here_and_says_so_as_json() {
    let story = Story::new();
    let checked = tests::outcome(story.vmrun(&["check", "--json"]));
    let lines: Vec<serde_json::Value> = serde_json::from_str(&checked.stdout).expect("JSON");
    let failed: Vec<_> = lines.iter().filter(|line| line["ok"] != true).collect();
    assert!(failed.is_empty(), "{failed:?}");
    assert!(lines.iter().any(|line| line["name"] == "kvm speed"), "{lines:?}");
    // What this host lacks is no matter here.
    let checked = tests::outcome(story.vmrun(&["check", "--security", "--json"]));
    let lines: Vec<serde_json::Value> = serde_json::from_str(&checked.stdout).expect("JSON");
    let levels = ["PASS", "WARN", "FAIL"];
    assert!(
        lines.len() > 10 && lines.iter().all(|line| levels.iter().any(|level| line["level"] == *level)),
        "{lines:?}"
    );
}
