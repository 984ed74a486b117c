//! The program that chooses the socket of a connection (`BPF_PROG_TYPE_SK_LOOKUP`, Linux 5.9), and the calls that put it in place (bpf(2)).
#![expect(unsafe_code, reason = "bpf(2) takes addresses")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

// linux/bpf.h
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_FUNC_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_FUNC_SK_RELEASE: i32 = 86;
const BPF_FUNC_SK_ASSIGN: i32 = 124;
const BPF_PSEUDO_MAP_FD: u8 = 1;
const SK_PASS: i32 = 1;

// Places in `struct bpf_sk_lookup`. An address of the other family is all zeros.
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];

// linux/bpf_common.h, linux/bpf.h: operation codes.
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const LOAD_CONSTANT: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW, of two instructions
const STORE_WORD: u8 = 0x62; // BPF_ST | BPF_MEM | BPF_W
const MOVE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const MOVE_REGISTER: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const ADD: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
const AND: u8 = 0x57; // BPF_ALU64 | BPF_AND | BPF_K
const JUMP_IF_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_IF_NOT_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

// Registers: what a call returns, its arguments, two that calls leave alone, the end of the stack.
const RESULT: u8 = 0;
const FIRST: u8 = 1;
const SECOND: u8 = 2;
const THIRD: u8 = 3;
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const STACK: u8 = 10;

/// Offset of a jump to the last two instructions, which leave the choice to the kernel.
const TO_THE_END: i16 = i16::MAX;
/// Place of the map's key on the stack.
const KEY: i16 = -4;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    constant: i32,
}

/// `union bpf_attr` as each command reads it (linux/bpf.h), to the last field that is used.
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
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Gives `listener` every connection to loopback of `namespace`, until the returned descriptor is closed.
pub(super) fn attach(namespace: &OwnedFd, listener: &impl AsFd) -> io::Result<OwnedFd> {
    let map = MapCreate { map_type: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 1, map_flags: 0 };
    let map = owned(call(BPF_MAP_CREATE, &map)?);
    let (key, value) = (0_u32, u64::from(number(listener)));
    let update = MapUpdate { map_fd: number(&map), padding: 0, key: address(&key), value: address(&value), flags: 0 };
    call(BPF_MAP_UPDATE_ELEM, &update)?;
    let program = owned(load(&program(number(&map)))?);
    let link =
        LinkCreate { prog_fd: number(&program), target_fd: number(namespace), attach_type: BPF_SK_LOOKUP, flags: 0 };
    Ok(owned(call(BPF_LINK_CREATE, &link)?))
}

/// To the socket in the map goes TCP to 127.0.0.0/8 or `::1`; addresses are in network order.
fn program(map: u32) -> Vec<Instruction> {
    let mut program = vec![instruction(MOVE_REGISTER, CONTEXT, FIRST, 0, 0)];
    program.extend(end_unless(PROTOCOL, libc::IPPROTO_TCP));
    program.extend([
        instruction(LOAD_WORD, SECOND, CONTEXT, LOCAL_IP4, 0),
        instruction(AND, SECOND, 0, 0, i32::from_ne_bytes([0xff, 0, 0, 0])),
        // Over the two instructions for each part of an IPv6 address.
        instruction(JUMP_IF_EQUAL, SECOND, 0, 8, i32::from_ne_bytes([127, 0, 0, 0])),
    ]);
    let [first, second, third, last] = LOCAL_IP6;
    for part in [first, second, third] {
        program.extend(end_unless(part, 0));
    }
    program.extend(end_unless(last, i32::from_ne_bytes([0, 0, 0, 1])));
    program.extend([
        instruction(STORE_WORD, STACK, 0, KEY, 0),
        instruction(MOVE_REGISTER, SECOND, STACK, 0, 0),
        instruction(ADD, SECOND, 0, 0, KEY.into()),
        instruction(LOAD_CONSTANT, FIRST, BPF_PSEUDO_MAP_FD, 0, map.cast_signed()),
        instruction(0, 0, 0, 0, 0),
        instruction(CALL, 0, 0, 0, BPF_FUNC_MAP_LOOKUP_ELEM),
        instruction(JUMP_IF_EQUAL, RESULT, 0, TO_THE_END, 0),
        instruction(MOVE_REGISTER, SOCKET, RESULT, 0, 0),
        instruction(MOVE_REGISTER, FIRST, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, SECOND, SOCKET, 0, 0),
        instruction(MOVE, THIRD, 0, 0, 0),
        instruction(CALL, 0, 0, 0, BPF_FUNC_SK_ASSIGN),
        instruction(MOVE_REGISTER, FIRST, SOCKET, 0, 0),
        instruction(CALL, 0, 0, 0, BPF_FUNC_SK_RELEASE),
        instruction(MOVE, RESULT, 0, 0, SK_PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    let end = program.len() - 2;
    for (place, instruction) in program.iter_mut().enumerate() {
        if instruction.offset == TO_THE_END {
            // Jumps count from the next instruction; there are some thirty.
            instruction.offset = i16::try_from(end - place - 1).unwrap_or(TO_THE_END);
        }
    }
    program
}

fn end_unless(place: i16, value: i32) -> [Instruction; 2] {
    [instruction(LOAD_WORD, SECOND, CONTEXT, place, 0), instruction(JUMP_IF_NOT_EQUAL, SECOND, 0, TO_THE_END, value)]
}

const fn instruction(code: u8, destination: u8, source: u8, offset: i16, constant: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, constant }
}

fn load(instructions: &[Instruction]) -> io::Result<i32> {
    const LICENSE: &CStr = c"Apache-2.0";
    let load = ProgramLoad {
        prog_type: BPF_PROG_TYPE_SK_LOOKUP,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: instructions.as_ptr().addr() as u64,
        license: LICENSE.as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"loopback\0\0\0\0\0\0\0\0",
        prog_ifindex: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    call(BPF_PROG_LOAD, &load)
}

/// What `attributes` holds addresses of outlives the call.
fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads the structure of this command and what its addresses lead to, all of which outlive the call.
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
