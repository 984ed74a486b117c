//! The program is run by a small interpreter of the few operations that it has.

use oci_spec::runtime::LinuxDeviceCgroup;
use serde_json::json;

use super::*;

fn rules(json: serde_json::Value) -> Vec<LinuxDeviceCgroup> {
    serde_json::from_value(json).expect("rules")
}

/// What the program says of one access.
fn allows(rules: &[LinuxDeviceCgroup], typ: i32, access: i32, major: i32, minor: i32) -> bool {
    let program = program(rules).expect("a program");
    let context = [access << 16 | typ, major, minor];
    let mut registers = [0_i32; 8];
    let mut at = 0;
    loop {
        let instruction = program[at];
        let (to, from) = (usize::from(instruction.destination()), usize::from(instruction.source()));
        let Instruction { code, offset, constant, .. } = instruction;
        let offset = usize::try_from(offset).expect("forward");
        at += 1;
        match code {
            LOAD_WORD => registers[to] = context[offset / 4],
            MOVE => registers[to] = constant,
            MOVE_REGISTER => registers[to] = registers[from],
            AND => registers[to] &= constant,
            SHIFT_RIGHT => registers[to] >>= constant,
            JUMP_IF_EQUAL if registers[to] == constant => at += offset,
            JUMP_IF_NOT_EQUAL if registers[to] != constant => at += offset,
            JUMP_IF_EQUAL | JUMP_IF_NOT_EQUAL => {}
            EXIT => return registers[usize::from(RESULT)] == 1,
            other => panic!("unknown operation {other:#x}"),
        }
    }
}

const READ_WRITE: i32 = BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE;

#[test]
fn without_rules_a_container_has_the_usual_devices_only() {
    assert!(allows(&[], BPF_DEVCG_DEV_CHAR, READ_WRITE, 1, 3));
    assert!(allows(&[], BPF_DEVCG_DEV_CHAR, READ_WRITE, 136, 7));
    assert!(allows(&[], BPF_DEVCG_DEV_BLOCK, BPF_DEVCG_ACC_MKNOD, 254, 0));
    assert!(!allows(&[], BPF_DEVCG_DEV_BLOCK, BPF_DEVCG_ACC_READ, 254, 0));
    assert!(!allows(&[], BPF_DEVCG_DEV_CHAR, BPF_DEVCG_ACC_READ, 1, 1));
}

#[test]
fn later_rule_goes_before_an_earlier_one_for_each_access() {
    let rules = rules(json!([
        { "allow": false, "access": "rwm" },
        { "allow": true, "type": "b", "major": 254, "access": "rw" },
        { "allow": false, "type": "b", "major": 254, "minor": 1, "access": "w" },
    ]));
    assert!(allows(&rules, BPF_DEVCG_DEV_BLOCK, READ_WRITE, 254, 0));
    assert!(allows(&rules, BPF_DEVCG_DEV_BLOCK, BPF_DEVCG_ACC_READ, 254, 1));
    assert!(!allows(&rules, BPF_DEVCG_DEV_BLOCK, READ_WRITE, 254, 1));
    assert!(!allows(&rules, BPF_DEVCG_DEV_CHAR, BPF_DEVCG_ACC_READ, 254, 0));
}

#[test]
fn access_may_be_allowed_by_several_rules_together() {
    let rules = rules(json!([
        { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "r" },
        { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "w" },
    ]));
    assert!(allows(&rules, BPF_DEVCG_DEV_CHAR, READ_WRITE, 10, 229));
}

#[test]
fn everything_may_be_allowed() {
    let rules = rules(json!([{ "allow": true, "access": "rwm" }]));
    assert!(allows(&rules, BPF_DEVCG_DEV_BLOCK, READ_WRITE, 254, 0));
}

#[test]
fn rule_with_an_unknown_access_is_invalid() {
    assert!(program(&rules(json!([{ "allow": true, "access": "rx" }]))).is_err());
}
