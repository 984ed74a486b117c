//! The devices that a container may use: the rules of its spec as a program for its cgroup (cgroup-v2, Device controller).
//!
//! As with runc, everything is denied at first, the rules of the spec follow in their order, and a few devices that every
//! container has come last. A later rule goes before an earlier one, for each of read, write and mknod. The program
//! therefore looks at the rules from the last to the first and drops each access that one allows from those asked for:
//!
//! ```text
//!   r2 = type, r3 = access asked for, r4 = major, r5 = minor
//!   for each rule, last first:  if it is for the device {  deny: if r3 & access, return 0
//!                                                          allow: r3 &= !access; if r3 == 0, return 1  }
//!   return 0
//! ```

use std::io;

use bpf::{AND, EXIT, Instruction, JUMP_IF_EQUAL, JUMP_IF_NOT_EQUAL, LOAD_WORD, MOVE, MOVE_REGISTER, SHIFT_RIGHT};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// Most rules of a spec.
const MAX_RULES: usize = 256;

// linux/bpf.h: types and accesses of struct bpf_cgroup_dev_ctx.
const BPF_DEVCG_DEV_BLOCK: i32 = 1;
const BPF_DEVCG_DEV_CHAR: i32 = 2;
const BPF_DEVCG_ACC_MKNOD: i32 = 1;
const BPF_DEVCG_ACC_READ: i32 = 2;
const BPF_DEVCG_ACC_WRITE: i32 = 4;
const ALL_ACCESS: i32 = BPF_DEVCG_ACC_MKNOD | BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE;

const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;
const RESULT: u8 = 0;

#[derive(Clone, Copy)]
struct Rule {
    allow: bool,
    /// None: block and character devices.
    typ: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

const fn character(major: i32, minor: Option<i32>) -> Rule {
    Rule { allow: true, typ: Some(BPF_DEVCG_DEV_CHAR), major: Some(major), minor, access: ALL_ACCESS }
}

const fn make_any(typ: i32) -> Rule {
    Rule { allow: true, typ: Some(typ), major: None, minor: None, access: BPF_DEVCG_ACC_MKNOD }
}

/// Devices of every container: making nodes, null, zero, full, random, urandom, tty, console, ptmx and terminals.
const ALWAYS: [Rule; 11] = [
    make_any(BPF_DEVCG_DEV_CHAR),
    make_any(BPF_DEVCG_DEV_BLOCK),
    character(1, Some(3)),
    character(1, Some(5)),
    character(1, Some(7)),
    character(1, Some(8)),
    character(1, Some(9)),
    character(5, Some(0)),
    character(5, Some(1)),
    character(5, Some(2)),
    character(136, None),
];

/// The instructions of the program.
pub(crate) fn program(rules: &[LinuxDeviceCgroup]) -> io::Result<Vec<Instruction>> {
    if rules.len() > MAX_RULES {
        return Err(io::Error::other(format!("{} device rules: at most {MAX_RULES}", rules.len())));
    }
    let rules = rules.iter().map(Rule::from_oci).collect::<io::Result<Vec<_>>>()?;
    let mut code = vec![
        Instruction::new(LOAD_WORD, TYPE, CONTEXT, 0, 0),
        Instruction::new(MOVE_REGISTER, ACCESS, TYPE, 0, 0),
        Instruction::new(AND, TYPE, 0, 0, 0xffff),
        Instruction::new(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        Instruction::new(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        Instruction::new(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().chain(&ALWAYS).rev() {
        rule.append_to(&mut code);
    }
    code.extend(return_value(0));
    Ok(code)
}

impl Rule {
    fn from_oci(rule: &LinuxDeviceCgroup) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let typ = match rule.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(BPF_DEVCG_DEV_BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(BPF_DEVCG_DEV_CHAR),
            Some(LinuxDeviceType::P) => return Err(invalid()),
        };
        // Negative numbers are any, as an absent one is.
        let number = |value: Option<i64>| {
            value.filter(|value| *value >= 0).map(|value| i32::try_from(value).map_err(|_| invalid())).transpose()
        };
        let mut access = 0;
        for letter in rule.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm").chars() {
            access |= match letter {
                'r' => BPF_DEVCG_ACC_READ,
                'w' => BPF_DEVCG_ACC_WRITE,
                'm' => BPF_DEVCG_ACC_MKNOD,
                _ => return Err(invalid()),
            };
        }
        Ok(Self { allow: rule.allow(), typ, major: number(rule.major())?, minor: number(rule.minor())?, access })
    }

    fn append_to(self, code: &mut Vec<Instruction>) {
        let act = self.act();
        let tests: Vec<(u8, i32)> = [(TYPE, self.typ), (MAJOR, self.major), (MINOR, self.minor)]
            .into_iter()
            .filter_map(|(register, wanted)| Some((register, wanted?)))
            .collect();
        for (index, &(register, wanted)) in tests.iter().enumerate() {
            // Past the other tests and the act, to the next rule.
            let skipped = tests.len() - index - 1 + act.len();
            code.push(Instruction::new(JUMP_IF_NOT_EQUAL, register, 0, i16::try_from(skipped).unwrap_or(0), wanted));
        }
        code.extend(act);
    }

    /// What is done when the rule is for the device.
    fn act(self) -> Vec<Instruction> {
        let mut act = Vec::new();
        let (tested, jump) = if self.allow {
            act.push(Instruction::new(AND, ACCESS, 0, 0, ALL_ACCESS & !self.access));
            (ACCESS, JUMP_IF_NOT_EQUAL)
        } else {
            act.push(Instruction::new(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0));
            act.push(Instruction::new(AND, SCRATCH, 0, 0, self.access));
            (SCRATCH, JUMP_IF_EQUAL)
        };
        act.push(Instruction::new(jump, tested, 0, 2, 0));
        act.extend(return_value(i32::from(self.allow)));
        act
    }
}

fn return_value(value: i32) -> [Instruction; 2] {
    [Instruction::new(MOVE, RESULT, 0, 0, value), Instruction::new(EXIT, 0, 0, 0, 0)]
}

#[cfg(test)]
mod tests;
