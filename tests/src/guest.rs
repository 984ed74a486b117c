//! Hand-made guests: a few bytes of 32-bit code in an ELF file with a PVH note, run by the VMM in this process.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Seek as _, Write as _};
use std::os::fd::{IntoRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use command_fds::{CommandFdExt as _, FdMapping};
use vmm::control::report_exit;
use vmm::inherited::InheritedFds;
use vmm::jail::Jail;
use vmm::machine::Machine;
use vmm::memory::Backing;
use vmm_api::control::{Exit, Message, Reply, Request};
use vmm_api::{Fd, VmConfig};

/// Where the code is loaded and entered, in 32-bit protected mode with flat segments and without paging.
const LOAD_ADDRESS: u32 = 0x10_0000;

/// `out 0x80, al`, then `jmp` back to it: a guest that does nothing for ever, with an exit each time.
pub const BUSY: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];

/// No guest here takes longer, and none of them ends by itself when it is lost: tests/kvm-host/README.md, Limits.
const DEADLINE: Duration = Duration::from_secs(120);

/// A VM that runs; its owner is this value.
pub struct Vm {
    control: UnixStream,
    messages: BufReader<UnixStream>,
    thread: JoinHandle<()>,
}

impl Vm {
    /// Builds and starts a VM with one vCPU.
    ///
    /// # Panics
    /// When it cannot be built.
    #[must_use]
    pub fn start(kernel: OwnedFd) -> Self {
        Self::of(&config(Fd(kernel.into_raw_fd())))
    }

    /// Builds and starts the VM of a configuration, whose descriptors it takes.
    ///
    /// # Panics
    /// When it cannot be built.
    #[must_use]
    pub fn of(config: &VmConfig) -> Self {
        let (control, theirs) = UnixStream::pair().expect("a socket pair");
        theirs.set_nonblocking(true).expect("a socket");
        control.set_read_timeout(Some(DEADLINE)).expect("a socket");
        let machine =
            Machine::build(config, &mut InheritedFds::default(), Jail::default(), &Backing::Small).expect("a machine");
        let thread = thread::spawn(move || report_exit(&theirs, machine.run(&theirs).expect("the VM runs")));
        let messages = BufReader::new(control.try_clone().expect("a socket"));
        Self { control, messages, thread }
    }

    /// Sends a request; returns the answer.
    ///
    /// # Panics
    /// When the VM has ended.
    pub fn ask(&mut self, request: &Request) -> Reply {
        let line = serde_json::to_string(request).expect("JSON");
        writeln!(self.control, "{line}").expect("the VM runs");
        match self.message() {
            Message::Reply(reply) => reply,
            other => panic!("not a reply: {other:?}"),
        }
    }

    /// Waits for the end of the VM.
    ///
    /// # Panics
    /// When something else comes.
    #[must_use]
    pub fn end(mut self) -> Exit {
        let message = self.message();
        self.thread.join().expect("the VMM does not panic");
        match message {
            Message::Exited(exit) => exit,
            other => panic!("not an end: {other:?}"),
        }
    }

    fn message(&mut self) -> Message {
        let mut line = String::new();
        self.messages.read_line(&mut line).expect("a line in time");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }
}

/// The smallest VM that boots `kernel`.
#[must_use]
pub fn config(kernel: Fd) -> VmConfig {
    VmConfig {
        name: "story".to_owned(),
        kvm: None,
        vcpus: 1,
        boot_vcpus: 1,
        cgroup: None,
        memory_mib: 128,
        kernel,
        root_image: None,
        cmdline: String::new(),
        console: None,
        control: Fd(0),
        entropy: false,
        vsock: None,
        shares: Vec::new(),
        networks: Vec::new(),
    }
}

/// The VMM as a program: its descriptors from 3 on are `passed`, in their order, and its configuration comes behind them.
///
/// # Panics
/// When `VMRUN_VMM` does not name it.
#[must_use]
pub fn vmm(config: &VmConfig, passed: Vec<OwnedFd>) -> Command {
    let path = std::env::var_os("VMRUN_VMM").expect("VMRUN_VMM names the VMM: use `make test`");
    program(Path::new(&path), config, passed)
}

/// A program that is called as the VMM is.
///
/// # Panics
/// When there is no temporary file to be had.
#[must_use]
pub fn program(path: &Path, config: &VmConfig, mut passed: Vec<OwnedFd>) -> Command {
    let mut file = tempfile::tempfile().expect("a temporary file");
    serde_json::to_writer(&file, config).expect("written");
    file.rewind().expect("rewound");
    passed.push(file.into());
    let config_fd = passed.len() + 2;
    let mappings = (3..).zip(passed).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect();
    let mut command = Command::new(path);
    command.args(["--config-fd", &config_fd.to_string()]).fd_mappings(mappings).expect("distinct numbers");
    command
}

/// A file that the VMM boots as a kernel and that runs `code`.
///
/// # Panics
/// When there is no temporary file to be had.
#[must_use]
pub fn kernel(code: &[u8]) -> OwnedFd {
    const HEADER_LEN: u32 = 64;
    const PROGRAM_HEADER_LEN: u32 = 56;
    let code_offset = HEADER_LEN + 2 * PROGRAM_HEADER_LEN;
    let code_len = u32::try_from(code.len()).expect("short");
    let note_offset = (code_offset + code_len).next_multiple_of(4);
    // XEN_ELFNOTE_PHYS32_ENTRY: lengths of name and value, type 18, "Xen", the entry.
    let note = [words(&[4, 8, 18]), b"Xen\0".to_vec(), words(&[LOAD_ADDRESS, 0])].concat();

    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend_from_slice(&[2, 0, 62, 0]);
    file.extend(words(&[1, LOAD_ADDRESS, 0, HEADER_LEN, 0, 0, 0, 0]));
    file.extend_from_slice(&[64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    for (kind, offset, address, len) in
        [(1, code_offset, LOAD_ADDRESS, code_len), (4, note_offset, 0, u32::try_from(note.len()).expect("short"))]
    {
        file.extend(words(&[kind, 7, offset, 0, address, 0, address, 0, len, 0, len, 0, 4, 0]));
    }
    file.extend_from_slice(code);
    file.resize(usize::try_from(note_offset).expect("short"), 0);
    file.extend(note);

    let mut kernel: File = tempfile::tempfile().expect("a temporary file");
    kernel.write_all(&file).expect("written");
    kernel.into()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
