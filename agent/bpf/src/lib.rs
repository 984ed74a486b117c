//! Small programs for the kernel (bpf(2)): their instructions, and the calls that load them and put them in place. The agent has one
//! for the devices of a container, the host one for the ports of a pod's loopback interface.
#![expect(unsafe_code, reason = "bpf(2) takes addresses")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

// linux/bpf_common.h, linux/bpf.h: operation codes. Those of 64 bits; a loaded word has zeros above it.
/// `BPF_LDX | BPF_MEM | BPF_W`.
pub const LOAD_WORD: u8 = 0x61;
/// `BPF_LD | BPF_IMM | BPF_DW`, of two instructions.
pub const LOAD_CONSTANT: u8 = 0x18;
/// `BPF_ST | BPF_MEM | BPF_W`.
pub const STORE_WORD: u8 = 0x62;
/// `BPF_ALU64 | BPF_MOV | BPF_K`.
pub const MOVE: u8 = 0xb7;
/// `BPF_ALU64 | BPF_MOV | BPF_X`.
pub const MOVE_REGISTER: u8 = 0xbf;
/// `BPF_ALU64 | BPF_ADD | BPF_K`.
pub const ADD: u8 = 0x07;
/// `BPF_ALU64 | BPF_AND | BPF_K`.
pub const AND: u8 = 0x57;
/// `BPF_ALU64 | BPF_RSH | BPF_K`.
pub const SHIFT_RIGHT: u8 = 0x77;
/// `BPF_JMP | BPF_JEQ | BPF_K`.
pub const JUMP_IF_EQUAL: u8 = 0x15;
/// `BPF_JMP | BPF_JNE | BPF_K`.
pub const JUMP_IF_NOT_EQUAL: u8 = 0x55;
/// `BPF_JMP | BPF_CALL`.
pub const CALL: u8 = 0x85;
/// `BPF_JMP | BPF_EXIT`.
pub const EXIT: u8 = 0x95;

/// Source register of [`LOAD_CONSTANT`] by which the constant is a map's descriptor.
pub const PSEUDO_MAP_FD: u8 = 1;

/// Types of programs: the rules of a cgroup's devices.
pub const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
/// The choice of a connection's socket (Linux 5.9).
pub const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
/// Where programs are attached: to a cgroup's devices.
pub const BPF_CGROUP_DEVICE: u32 = 6;
/// To the sockets of a network namespace.
pub const BPF_SK_LOOKUP: u32 = 36;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Times that a load is tried: the kernel's verifier gives up with EAGAIN when a signal comes, as each child that ends sends one.
const LOAD_ATTEMPTS: u32 = 100;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Instruction {
    /// The operation.
    pub code: u8,
    registers: u8,
    /// Of a jump, from the next instruction on; of an access to memory, in bytes.
    pub offset: i16,
    /// The constant.
    pub constant: i32,
}

impl Instruction {
    /// An instruction; what it does not use is 0. Registers are 0 to 10.
    #[must_use]
    pub const fn new(code: u8, destination: u8, source: u8, offset: i16, constant: i32) -> Self {
        Self { code, registers: destination | source << 4, offset, constant }
    }

    /// Its destination register.
    #[must_use]
    pub const fn destination(self) -> u8 {
        self.registers & 0xf
    }

    /// Its source register.
    #[must_use]
    pub const fn source(self) -> u8 {
        self.registers >> 4
    }
}

// `union bpf_attr` as each command reads it (linux/bpf.h), to the last field that is used.

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgramLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct ProgramAttach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Loads a program of a type that is to be attached there.
///
/// # Errors
/// What the kernel says: that it is no such program, or that the caller may not.
pub fn load(prog_type: u32, attach_type: u32, instructions: &[Instruction]) -> io::Result<OwnedFd> {
    const LICENSE: &CStr = c"Apache-2.0";
    let load = ProgramLoad {
        prog_type,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: instructions.as_ptr().addr() as u64,
        license: LICENSE.as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: [0; 16],
        prog_ifindex: 0,
        expected_attach_type: attach_type,
    };
    let mut attempts = 1;
    loop {
        match call(BPF_PROG_LOAD, &load) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && attempts < LOAD_ATTEMPTS => attempts += 1,
            loaded => return loaded.map(owned),
        }
    }
}

/// Attaches a program to a cgroup beside those that it has, for as long as the cgroup exists.
///
/// # Errors
/// What the kernel says.
pub fn attach(program: &impl AsFd, cgroup: &impl AsFd, attach_type: u32) -> io::Result<()> {
    let attach = ProgramAttach {
        target_fd: number(cgroup),
        attach_bpf_fd: number(program),
        attach_type,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    call(BPF_PROG_ATTACH, &attach).map(drop)
}

/// Attaches a program to `target` until the returned descriptor is closed.
///
/// # Errors
/// What the kernel says.
pub fn link(program: &impl AsFd, target: &impl AsFd, attach_type: u32) -> io::Result<OwnedFd> {
    let link = LinkCreate { prog_fd: number(program), target_fd: number(target), attach_type, flags: 0 };
    call(BPF_LINK_CREATE, &link).map(owned)
}

/// Makes a map (`BPF_MAP_TYPE_SOCKMAP`) with one socket, at key 0; it does not keep the socket open.
///
/// # Errors
/// What the kernel says.
pub fn socket_map(socket: &impl AsFd) -> io::Result<OwnedFd> {
    let map = MapCreate { map_type: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 1, map_flags: 0 };
    let map = owned(call(BPF_MAP_CREATE, &map)?);
    let (key, value) = (0_u32, u64::from(number(socket)));
    let update = MapUpdate { map_fd: number(&map), padding: 0, key: address(&key), value: address(&value), flags: 0 };
    call(BPF_MAP_UPDATE_ELEM, &update)?;
    Ok(map)
}

/// Makes a call. What `attributes` holds addresses of outlives it.
fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads the structure of this command and what its addresses lead to, all of which outlive the call; of
    // descriptors it takes references of its own.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    let result = i32::try_from(result).map_err(io::Error::other)?;
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: &impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}

fn address<T>(value: &T) -> u64 {
    (&raw const *value).addr() as u64
}
