//! From the trace of one run to its counts, window by window:
//!
//! ```text
//!   program starts ─► first exit of a guest ─► agent ready ─► first instruction of the command ─► program ends
//!   run.   ├──────────────────────────────────────────────────────────────────────────────────────────────┤
//!   command. ├──────────────────────────────────────────────────────────────────┤
//!   agent.                   ├───────────────────┤
//!   stop.                                                                            ├──────────────────────┤
//! ```
//! The command ends at once, so what follows its first instruction is the stop. A guest that runs none stops with its last exit.

use std::collections::{BTreeMap, HashMap};

use crate::trace::Event;

/// Counts of one run by their names.
pub(crate) type Counts = BTreeMap<String, u64>;

/// The leaf that `tests/bench/marker.rs` asks for.
const MARKER_LEAF: &str = "func 4f4b0001 ";
const MARKER_PROGRAM: &str = "/marker ";
const SENDMSG: &str = "NR 46 ";
/// No system call but where the clock source is slow, as in an emulated host.
const CLOCK_GETTIME: &str = "NR 228 ";

/// Counts what is in a trace that begins before the program was executed.
pub(crate) fn count(events: &[Event]) -> Counts {
    let started = events.iter().position(|event| event.name == "sched_process_exec").unwrap_or(events.len());
    let events = &events[started..];
    let programs = Programs::of(events);
    let mut counts = Counts::new();
    add(&mut counts, "run", events, &programs);
    let command = events.iter().position(is_command);
    if let Some(command) = command {
        add(&mut counts, "command", &events[..command], &programs);
    }
    if let Some(last) = command.or_else(|| events.iter().rposition(|event| event.name == "kvm_exit")) {
        add(&mut counts, "stop", &events[last..], &programs);
    }
    if let Some(first_exit) = events.iter().position(|event| event.name == "kvm_exit") {
        // The agent is ready when the VMM passes its connection on; a peer that cannot do that ends then.
        let is_ready = |event: &Event| is_call(event, SENDMSG) && programs.name(event) == "vmm";
        let after = &events[first_exit..];
        let ready = after.iter().position(is_ready).unwrap_or(after.len());
        add(&mut counts, "agent", &after[..ready], &programs);
    }
    counts
}

/// The name of each process: the last that its main thread had.
struct Programs<'a>(HashMap<u32, &'a str>);

impl<'a> Programs<'a> {
    fn of(events: &'a [Event]) -> Self {
        let mains = events.iter().filter(|event| event.tid == event.pid);
        Self(mains.map(|event| (event.pid, event.thread.as_str())).collect())
    }

    fn name(&self, event: &'a Event) -> &'a str {
        self.0.get(&event.pid).copied().unwrap_or(&event.thread)
    }
}

fn is_command(event: &Event) -> bool {
    match event.name.as_str() {
        "kvm_cpuid" => event.fields.starts_with(MARKER_LEAF),
        "sched_process_exec" => event.fields.contains(MARKER_PROGRAM),
        _ => false,
    }
}

fn is_call(event: &Event, number: &str) -> bool {
    event.name == "sys_enter" && event.fields.starts_with(number)
}

fn add<'a>(counts: &mut Counts, window: &str, events: &'a [Event], programs: &Programs<'a>) {
    let mut add = |name: &str| *counts.entry(format!("{window}.{name}")).or_default() += 1;
    for event in events {
        match event.name.as_str() {
            "kvm_exit" => {
                add("exits");
                add(&format!("exits.{}", word_after(&event.fields, "reason ")));
            }
            "kvm_userspace_exit" => {
                add("userspace exits");
                add(&format!("userspace exits.{}", word_after(&event.fields, "reason KVM_EXIT_").to_lowercase()));
            }
            "sys_enter" if !is_call(event, CLOCK_GETTIME) => {
                add("system calls");
                add(&format!("system calls.{}", programs.name(event)));
            }
            // A thread that is preempted stays runnable, and kernel threads idle in a state of their own.
            "sched_switch" if ["prev_state=S ", "prev_state=D "].iter().any(|state| event.fields.contains(state)) => {
                add("sleeps");
            }
            "srcu" | "srcu_expedited" => add("waits for SRCU"),
            "page_fault_user" | "page_fault_kernel" => {
                add("host page faults");
                add(&format!("host page faults.{}", programs.name(event)));
            }
            _ => {}
        }
    }
}

fn word_after<'a>(text: &'a str, before: &str) -> &'a str {
    let after = text.split_once(before).map_or(text, |(_, after)| after);
    after.split_whitespace().next().unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::count;
    use crate::trace::Event;

    fn event(thread: &str, tid: u32, pid: u32, name: &str, fields: &str) -> Event {
        Event { thread: thread.to_owned(), tid, pid, name: name.to_owned(), fields: fields.to_owned() }
    }

    #[test]
    fn each_event_is_in_its_windows() {
        let counts = count(&[
            event("vmrun", 1, 1, "sys_enter", "NR 1 ()"),
            event("vmrun", 1, 1, "sched_process_exec", "filename=/x/vmrun pid=1 old_pid=1"),
            event("vmm", 2, 2, "sys_enter", "NR 46 ()"),
            event("vcpu0", 3, 2, "kvm_exit", "vcpu 0 reason npf rip 0x1"),
            event("vcpu0", 3, 2, "kvm_userspace_exit", "reason KVM_EXIT_IO (2)"),
            event("vmm", 2, 2, "sys_enter", "NR 46 ()"),
            event("vcpu0", 3, 2, "kvm_exit", "vcpu 0 reason cpuid rip 0x1"),
            event("vcpu0", 3, 2, "kvm_cpuid", "func 4f4b0001 idx 0 rax 0"),
            event("vcpu0", 3, 2, "sys_enter", "NR 16 ()"),
        ]);
        let of = |name: &str| counts.get(name).copied().unwrap_or(0);
        assert_eq!((of("run.system calls"), of("command.system calls"), of("agent.system calls")), (3, 2, 0));
        assert_eq!((of("run.exits"), of("command.exits"), of("agent.exits")), (2, 2, 1));
        assert_eq!((of("stop.system calls"), of("stop.exits")), (1, 0));
        assert_eq!((of("run.exits.npf"), of("agent.userspace exits.io"), of("run.system calls.vmm")), (1, 1, 3));
    }

    #[test]
    fn a_guest_without_a_command_stops_with_its_last_exit() {
        let counts = count(&[
            event("qemu", 1, 1, "sched_process_exec", "filename=/x/qemu pid=1 old_pid=1"),
            event("qemu", 2, 1, "kvm_exit", "vcpu 0 reason npf rip 0x1"),
            event("qemu", 2, 1, "sys_enter", "NR 16 ()"),
            event("qemu", 2, 1, "kvm_exit", "vcpu 0 reason shutdown rip 0x1"),
            event("qemu", 1, 1, "sys_enter", "NR 231 ()"),
        ]);
        assert_eq!(counts.get("stop.system calls"), Some(&1));
    }
}
