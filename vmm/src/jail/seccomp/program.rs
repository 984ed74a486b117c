//! A list of calls as a program of classic BPF (`seccomp(2)`, `linux/filter.h`), which finds a call's number by halves: a tenth of
//! the instructions that a test of each number in turn takes, and the kernel runs a filter for each number when it is loaded.

use std::io;

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO,
    SECCOMP_RET_KILL_PROCESS,
};
use seccompiler::{BpfProgram, sock_filter};

use super::kind::OWN_PROCESS;
use super::lists::{Allowed, When};

/// `seccomp_data`: where the kernel shows the number, the architecture and the arguments, of which the lower half comes first.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
const ARGUMENT_SIZE: u32 = 8;

/// The only one that a filter is for (`linux/audit.h`).
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;

/// What becomes of a call.
#[derive(Clone, Copy, PartialEq)]
enum Answer<'a> {
    Return(u32),
    /// Allowed when one of them holds.
    Conditions(&'a [Allowed]),
}

const REFUSED: Answer<'_> = Answer::Return(SECCOMP_RET_KILL_PROCESS);

impl<'a> From<&'a [Allowed]> for Answer<'a> {
    fn from(conditions: &'a [Allowed]) -> Self {
        match conditions {
            [Allowed { when: When::NotThere, .. }] => Self::Return(SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
            _ if conditions.iter().any(|allowed| allowed.when == When::Always) => Self::Return(SECCOMP_RET_ALLOW),
            _ => Self::Conditions(conditions),
        }
    }
}

/// Ends the process at any call that is not among these, which are sorted by number, or whose conditions all fail.
///
/// # Errors
///
/// A list so long that a jump does not reach.
pub(super) fn program(calls: &[Allowed]) -> io::Result<BpfProgram> {
    // From each number up to the next.
    let mut ranges = vec![(0, REFUSED)];
    let mut becomes = |number: u32, answer| {
        ranges.pop_if(|(first, _)| *first == number);
        if ranges.last().is_none_or(|(_, last)| *last != answer) {
            ranges.push((number, answer));
        }
    };
    for conditions in calls.chunk_by(|one, next| one.call == next.call) {
        let number = u32::try_from(conditions[0].call).map_err(io::Error::other)?;
        becomes(number, conditions.into());
        becomes(number + 1, REFUSED);
    }
    let mut program = Reversed::default();
    let refused = program.answer(REFUSED)?;
    let calls = program.halves(&ranges)?;
    program.push(load(NUMBER));
    debug_assert_eq!(calls + 1, program.instructions.len(), "it goes on with the number");
    program.jump(BPF_JEQ, AUDIT_ARCH, program.instructions.len(), refused)?;
    program.push(load(ARCHITECTURE));
    program.instructions.reverse();
    Ok(program.instructions)
}

/// A program from its end, for jumps go forward only: where one goes to is there already. A place is the number of instructions up
/// to it and with it.
#[derive(Default)]
struct Reversed {
    instructions: BpfProgram,
    /// Where each value is returned.
    returns: Vec<(u32, usize)>,
}

impl Reversed {
    fn push(&mut self, instruction: sock_filter) -> usize {
        self.instructions.push(instruction);
        self.instructions.len()
    }

    fn jump(&mut self, test: u32, value: u32, holds: usize, fails: usize) -> io::Result<usize> {
        let distance = |place| u8::try_from(self.instructions.len() - place);
        let (Ok(holds), Ok(fails)) = (distance(holds), distance(fails)) else {
            return Err(io::Error::other("a list of system calls is too long for a filter"));
        };
        Ok(self.push(instruction(BPF_JMP | test | BPF_K, value, holds, fails)))
    }

    /// Goes to the answer of the range that the loaded number is in.
    fn halves(&mut self, ranges: &[(u32, Answer<'_>)]) -> io::Result<usize> {
        if let [(_, answer)] = ranges {
            return self.answer(*answer);
        }
        let (lower, upper) = ranges.split_at(ranges.len() / 2);
        let first = upper[0].0;
        let (upper, lower) = (self.halves(upper)?, self.halves(lower)?);
        self.jump(BPF_JGE, first, upper, lower)
    }

    /// Of every argument that is looked at, the kernel ignores the upper half or refuses to have anything in it.
    fn answer(&mut self, answer: Answer<'_>) -> io::Result<usize> {
        let conditions = match answer {
            Answer::Return(action) => return Ok(self.ret(action)),
            Answer::Conditions(conditions) => conditions,
        };
        let (allowed, mut otherwise) = (self.ret(SECCOMP_RET_ALLOW), self.ret(SECCOMP_RET_KILL_PROCESS));
        for Allowed { when, .. } in conditions {
            let (argument, values) = match *when {
                When::OneOf(argument, values) => (argument, values),
                When::OwnProcess(argument) => (argument, &[OWN_PROCESS][..]),
                When::Without(argument, bits) => {
                    self.jump(BPF_JSET, bits, otherwise, allowed)?;
                    otherwise = self.push(load(ARGUMENTS + ARGUMENT_SIZE * argument));
                    continue;
                }
                When::Always | When::NotThere => continue,
            };
            for value in values {
                otherwise = self.jump(BPF_JEQ, *value, allowed, otherwise)?;
            }
            otherwise = self.push(load(ARGUMENTS + ARGUMENT_SIZE * argument));
        }
        Ok(otherwise)
    }

    /// One for all that return this.
    fn ret(&mut self, action: u32) -> usize {
        if let Some((_, there)) = self.returns.iter().find(|(known, _)| *known == action) {
            return *there;
        }
        let there = self.push(instruction(BPF_RET | BPF_K, action, 0, 0));
        self.returns.push((action, there));
        there
    }
}

const fn load(offset: u32) -> sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0)
}

#[expect(clippy::cast_possible_truncation, reason = "codes are below 256")]
const fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use libc::c_long;

    use super::super::kind::ThreadKind;
    use super::super::lists::calls;
    use super::*;

    /// What the kernel does with a call: `Documentation/networking/filter.rst`, as far as programs here go.
    fn run(program: &BpfProgram, number: u32, arguments: [u64; 6]) -> u32 {
        let bytes: Vec<u8> = arguments.iter().flat_map(|argument| argument.to_le_bytes()).collect();
        let words = bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().expect("4 bytes")));
        let data: Vec<u32> = [number, AUDIT_ARCH, 0, 0].into_iter().chain(words).collect();
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let holds = match u32::from(code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    loaded = data[k as usize / 4];
                    at += 1;
                    continue;
                }
                code if code == BPF_RET | BPF_K => return k,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => loaded == k,
                code if code == BPF_JMP | BPF_JGE | BPF_K => loaded >= k,
                code if code == BPF_JMP | BPF_JSET | BPF_K => loaded & k != 0,
                code => panic!("no code of ours: {code:#x}"),
            };
            at += 1 + usize::from(if holds { jt } else { jf });
        }
    }

    /// For each number, also those of x32 and what is no number at all.
    fn numbers() -> impl Iterator<Item = u32> {
        (0..1000).chain(0x4000_0000..0x4000_0400).chain([u32::MAX - 1, u32::MAX])
    }

    #[test]
    fn a_program_says_what_its_list_says() {
        for kind in ThreadKind::ALL {
            let calls = calls(kind);
            let program = program(&calls).expect("a program");
            for number in numbers() {
                let of_number = calls.iter().filter(|allowed| allowed.call == c_long::from(number));
                let expected = match of_number.map(|allowed| allowed.when).collect::<Vec<_>>().as_slice() {
                    [] => SECCOMP_RET_KILL_PROCESS,
                    [When::NotThere] => SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs(),
                    when if when.contains(&When::Always) => SECCOMP_RET_ALLOW,
                    // Those below say more.
                    _ => continue,
                };
                assert_eq!(run(&program, number, [0; 6]), expected, "{kind:?}, {number}");
            }
        }
    }

    #[test]
    fn each_condition_is_enough_and_none_is_too_little() {
        let own = OWN_PROCESS;
        let conditions = [When::OneOf(1, &[3, 5]), When::Without(0, 6), When::OneOf(1, &[7]), When::OwnProcess(2)];
        let program = program(&conditions.map(|when| Allowed { call: 16, when })).expect("a program");
        let allowed = |arguments| run(&program, 16, arguments) == SECCOMP_RET_ALLOW;
        for second in [3, 5, 7, 0xffff_ffff_0000_0005] {
            assert!(allowed([2, second, 0, 0, 0, 0]), "{second:#x}");
        }
        assert!(allowed([0xffff_fff9, 4, 0, 0, 0, 0]));
        assert!(allowed([4, 4, own.into(), 0, 0, 0]));
        assert!(!allowed([2, 4, 0, 3, 5, 7]));
        assert!(!allowed([4, 6, u64::from(own) - 1, 3, 5, 7]));
    }

    #[test]
    fn another_architecture_has_no_calls() {
        let mut program = program(&[Allowed { call: 0, when: When::Always }]).expect("a program");
        assert_eq!(run(&program, 0, [0; 6]), SECCOMP_RET_ALLOW);
        program[1].k = 0x4000_0003; // AUDIT_ARCH_I386
        assert_eq!(run(&program, 0, [0; 6]), SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn programs_are_short() {
        let lengths = ThreadKind::ALL.map(|kind| (kind, program(&calls(kind)).expect("a program").len()));
        assert!(lengths.iter().all(|(_, length)| *length < 200), "{lengths:?}");
    }
}
