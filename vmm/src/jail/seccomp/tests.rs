//! The lists are short, and what is not on them ends the process.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Barrier};

use syscalls::Sysno;

use super::lists::{Allowed, When, calls};
use super::{Filters, OWN_PROCESS, PROGRAMS, ThreadKind, program, program_of};
use crate::device_thread::DeviceThread;
use crate::jail::Jail;

fn count(kind: ThreadKind) -> usize {
    calls(kind).chunk_by(|one, next| one.call == next.call).count()
}

#[test]
fn each_kind_of_thread_has_few_calls() {
    let counts = ThreadKind::ALL.map(|kind| (kind, count(kind)));
    assert!(count(ThreadKind::Vcpu) <= 12, "{counts:?}");
    assert!(count(ThreadKind::EventLoop) <= 26, "{counts:?}");
    assert!(count(ThreadKind::Net) <= 26, "{counts:?}");
    assert!(count(ThreadKind::Fs) <= 66, "{counts:?}");
}

/// The lists as text, for `vmm/system-calls.txt`.
fn printed() -> String {
    let mut text = "# Which system calls each kind of thread may make; src/jail/seccomp/lists.rs says why. Any other ends the process.\n".to_owned();
    for kind in ThreadKind::ALL {
        let mut lines = BTreeMap::<&str, BTreeSet<String>>::new();
        for Allowed { call, when } in kind.lists().iter().copied().flatten() {
            let name = Sysno::new(usize::try_from(*call).expect("a number")).expect("a system call").name();
            lines.entry(name).or_default().insert(condition(*when));
        }
        text += &format!("\n{kind:?}: {}\n", lines.len());
        for (name, conditions) in lines {
            // Allowed always is allowed always.
            let conditions = if conditions.contains("") { BTreeSet::new() } else { conditions };
            text += &format!(
                "  {}\n",
                [&[name.to_owned()][..], &conditions.into_iter().collect::<Vec<_>>()].concat().join(" ")
            );
        }
    }
    text
}

fn condition(when: When) -> String {
    let hex = |values: &[u32]| values.iter().map(|value| format!("{value:#x}")).collect::<Vec<_>>().join("|");
    match when {
        When::Always => String::new(),
        When::NotThere => "ENOSYS".to_owned(),
        When::OneOf(argument, values) => format!("arg{argument}={}", hex(values)),
        When::Without(argument, bits) => format!("arg{argument}&{bits:#x}=0"),
        When::OwnProcess(argument) => format!("arg{argument}=own-process"),
    }
}

/// To write the file anew: `UPDATE_SNAPSHOT=1 cargo test -p vmm the_lists_are_those_of_the_snapshot`.
#[test]
fn the_lists_are_those_of_the_snapshot() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/system-calls.txt");
    if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
        std::fs::write(path, printed()).expect("written");
    }
    assert_eq!(printed(), std::fs::read_to_string(path).expect("a snapshot"));
}

#[test]
fn each_kind_has_the_program_of_its_list() {
    for kind in ThreadKind::ALL {
        let compiled = program::program(&calls(kind)).expect("a program");
        assert_eq!(format!("{:?}", PROGRAMS[kind as usize]), format!("{compiled:?}"), "{kind:?}");
        assert!(program_of(kind).iter().all(|instruction| instruction.k != OWN_PROCESS), "{kind:?}");
    }
}

/// Names what the process that [`end_of`] starts does.
const PART: &str = "VMM_SECCOMP_TEST";

/// Runs this test again, in a process in which [`PART`] says what to do; returns how it ended.
fn end_of(test: &str, part: &str) -> ExitStatus {
    let program = std::env::current_exe().expect("the test's program");
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture"]).env(PART, part);
    command.output().expect("the test's program starts").status
}

#[test]
fn a_call_that_is_not_listed_ends_the_process() {
    const TEST: &str = "jail::seccomp::tests::a_call_that_is_not_listed_ends_the_process";
    let part = std::env::var(PART);
    let Ok(part) = part else {
        assert_eq!(end_of(TEST, "none").signal(), None);
        assert_eq!(end_of(TEST, "none").code(), Some(0));
        for part in ["open", "socket", "thread", "process", "signal"] {
            assert_eq!(end_of(TEST, part).signal(), Some(libc::SIGSYS), "{part}");
        }
        return;
    };
    Filters::default().apply(ThreadKind::EventLoop).expect("confined");
    match part.as_str() {
        "open" => drop(std::fs::File::open("/")),
        "socket" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
        "thread" => drop(std::thread::Builder::new().spawn(|| ())),
        "process" => drop(Command::new("/bin/true").spawn()),
        "signal" => drop(rustix::process::kill_process_group(rustix::process::getpid(), rustix::process::Signal::HUP)),
        _ => std::process::exit(0),
    }
}

/// Often enough that threads meet in the middle of a step.
const HAND_OVERS: u32 = 40_000;

#[test]
fn a_vcpu_hands_work_to_the_device_thread() {
    const TEST: &str = "jail::seccomp::tests::a_vcpu_hands_work_to_the_device_thread";
    if std::env::var_os(PART).is_none() {
        let ended = end_of(TEST, "all");
        assert_eq!((ended.signal(), ended.code()), (None, Some(0)));
        return;
    }
    let jail = Jail { filters: Some(Filters::default()) };
    let device_thread = DeviceThread::start(jail.clone()).expect("a thread");
    let done = Arc::new(Barrier::new(17));
    for _ in 1..17 {
        let (jail, device_thread, done) = (jail.clone(), device_thread.clone(), done.clone());
        std::thread::spawn(move || {
            jail.confine(ThreadKind::Vcpu);
            for sent in 0..HAND_OVERS {
                assert_eq!(device_thread.call(move || sent), sent);
            }
            done.wait();
            // As a vCPU's thread, it never ends.
            loop {
                std::thread::park();
            }
        });
    }
    done.wait();
    std::process::exit(0);
}
