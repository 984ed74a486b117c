//! A VMM that a guest has taken over, for the story `tests/escape.rs`: started and confined as the real one, it then tries to get out, as
//! each kind of thread in turn. Prints what became of each attempt, a JSON line each.
//!
//!     escape --config-fd N OWNER SOCKET ABSTRACT
//!
//! OWNER is the process id of the story, SOCKET and ABSTRACT are sockets that it listens at, as the sockets of other VMs do.
#![expect(unsafe_code, reason = "an attacker makes system calls as it likes, and forks to have each one once")]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};

use nix::sys::signal::{SigHandler, Signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use tests::escape::{Became, Tried};
use vmm::inherited::{self, InheritedFds};
use vmm::jail::{self, Jail, ThreadKind};
use vmm_api::{Fd, VmConfig};

#[path = "escape/attempts.rs"]
mod attempts;

/// A call that blocks is ended by an alarm.
const PATIENCE_S: u32 = 5;
/// System calls have numbers below this.
const CALLS: i64 = 480;

/// What the attacker holds, and what it knows of the host.
struct Scene {
    kvm: RawFd,
    share: RawFd,
    read_only_share: RawFd,
    /// A file of the share that may be executed.
    program: RawFd,
    owner: i64,
    socket: Vec<u8>,
    abstract_name: Vec<u8>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, _, config_fd, owner, socket, abstract_name] = arguments.as_slice() else { panic!("{arguments:?}") };
    let mut fds = InheritedFds::default();
    let config = fds.take(Fd(config_fd.parse().expect("a number"))).expect("a configuration");
    let config: VmConfig = serde_json::from_reader(File::from(config)).expect("a configuration");
    inherited::close_others(&config).expect("closed");
    let shares: Vec<OwnedFd> = config.shares.iter().map(|share| fds.take(share.root).expect("a share")).collect();
    let program = rustix::fs::openat(&shares[0], "program", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
    let program = program.expect("a file of the share");
    let kvm = vmm::kvm::open_device().expect("/dev/kvm");
    let (jail, _) = jail::enter().expect("a jail");
    for signal in [Signal::SIGSEGV, Signal::SIGBUS] {
        // SAFETY: no handler of ours is put in its place. The standard library's makes system calls of its own.
        unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }.expect("a signal");
    }
    let scene = Scene {
        kvm: kvm.as_raw_fd(),
        share: shares[0].as_raw_fd(),
        read_only_share: shares[1].as_raw_fd(),
        program: program.as_raw_fd(),
        owner: owner.parse().expect("a number"),
        socket: socket.clone().into_bytes(),
        abstract_name: abstract_name.clone().into_bytes(),
    };
    for kind in ThreadKind::ALL {
        for (name, attempt) in attempts::ALL {
            tell(kind, name, alone(&jail, kind, || attempt(&scene).map(drop)));
        }
        for number in 0..CALLS {
            tell(kind, &number.to_string(), alone(&jail, kind, || attempts::call(number, [-1; 6]).map(drop)));
        }
    }
}

/// Does something in a process of its own that is confined as a thread of this kind.
fn alone(jail: &Jail, kind: ThreadKind, act: impl FnOnce() -> io::Result<()>) -> Became {
    let (mut told, mut tell) = io::pipe().expect("a pipe");
    // SAFETY: the process has one thread, so the child finds no lock held and may do what the parent may.
    match unsafe { fork() }.expect("forked") {
        ForkResult::Child => {
            // SAFETY: alarm(2) takes any number.
            unsafe { libc::alarm(PATIENCE_S) };
            jail.confine(kind);
            let errno = act().map_or_else(|error| error.raw_os_error().unwrap_or(-1), |()| 0);
            let _ = tell.write(&errno.to_le_bytes());
            loop {
                // Few kinds of threads may end; the others are ended for it.
                let _ = attempts::call(libc::SYS_exit_group, []);
            }
        }
        ForkResult::Parent { child } => {
            drop(tell);
            let mut errno = [0; 4];
            let answered = told.read_exact(&mut errno).is_ok();
            match (answered, waitpid(child, None).expect("waited")) {
                (true, _) => match i32::from_le_bytes(errno) {
                    0 => Became::Done,
                    errno => Became::Refused(errno),
                },
                (false, WaitStatus::Signaled(_, Signal::SIGSYS, _)) => Became::Ended,
                // It came back from the filter and ended, or went on, in some other way.
                (false, _) => Became::Done,
            }
        }
    }
}

fn tell(kind: ThreadKind, attempt: &str, became: Became) {
    let tried = Tried { thread: format!("{kind:?}"), attempt: attempt.to_owned(), became };
    println!("{}", serde_json::to_string(&tried).expect("JSON"));
}
