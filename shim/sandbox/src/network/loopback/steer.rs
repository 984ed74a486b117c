//! The program that chooses the socket of a connection (`BPF_PROG_TYPE_SK_LOOKUP`, Linux 5.9).

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use bpf::{
    ADD, AND, BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, CALL, EXIT, Instruction, JUMP_IF_EQUAL, JUMP_IF_NOT_EQUAL,
    LOAD_CONSTANT, LOAD_WORD, MOVE, MOVE_REGISTER, PSEUDO_MAP_FD, STORE_WORD,
};

// linux/bpf.h
const BPF_FUNC_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_FUNC_SK_RELEASE: i32 = 86;
const BPF_FUNC_SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;

// Places in `struct bpf_sk_lookup`. An address of the other family is all zeros.
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];

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

/// Gives `listener` every connection to loopback of `namespace`, until the returned descriptor is closed.
pub(super) fn attach(namespace: &OwnedFd, listener: &impl AsFd) -> io::Result<OwnedFd> {
    let map = bpf::socket_map(listener)?;
    let program = bpf::load(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, &program(map.as_raw_fd()))?;
    bpf::link(&program, namespace, BPF_SK_LOOKUP)
}

/// To the socket in the map goes TCP to 127.0.0.0/8 or `::1`; addresses are in network order.
fn program(map: i32) -> Vec<Instruction> {
    let instruction = Instruction::new;
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
        instruction(LOAD_CONSTANT, FIRST, PSEUDO_MAP_FD, 0, map),
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
    [
        Instruction::new(LOAD_WORD, SECOND, CONTEXT, place, 0),
        Instruction::new(JUMP_IF_NOT_EQUAL, SECOND, 0, TO_THE_END, value),
    ]
}
