//! The VMM, but that one kind of its threads has no filter of system calls: the kind whose name this was called by. For the story
//! `tests/confinement.rs`, which must notice.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::IntoRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use vmm::control::report_exit;
use vmm::inherited::{self, InheritedFds};
use vmm::jail::{self, ThreadKind};
use vmm::machine::Machine;
use vmm::memory::Backing;
use vmm_api::{Fd, VmConfig};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let name = Path::new(&arguments[0]).file_name().expect("a name").to_string_lossy();
    let kind = ThreadKind::ALL.into_iter().find(|kind| format!("{kind:?}") == name).expect("a kind of threads");
    let config_fd = arguments.iter().skip_while(|argument| *argument != "--config-fd").nth(1).expect("a descriptor");
    let mut fds = InheritedFds::default();
    let config = fds.take(Fd(config_fd.parse().expect("a number"))).expect("a configuration");
    let mut config: VmConfig = serde_json::from_reader(File::from(config)).expect("a configuration");
    inherited::close_others(&config).expect("closed");
    let control = UnixStream::from(fds.take(config.control).expect("a control socket"));
    control.set_nonblocking(true).expect("a socket");
    if let Some(fd) = config.cgroup {
        let mut procs = File::from(fds.take(fd).expect("a cgroup"));
        procs.write_all(b"0").expect("joined");
    }
    let kvm = vmm::kvm::open_device().expect("/dev/kvm");
    config.kvm.get_or_insert_with(|| Fd(kvm.into_raw_fd()));
    let jail = jail::enter().expect("a jail").without(kind);
    let machine = Machine::build(&config, &mut fds, jail, Backing::default()).expect("a machine");
    report_exit(&control, machine.run(&control).expect("the VM runs"));
}
