//! A trace of one command and of all that it starts: system calls, exits of guests, context switches, page faults. It has an
//! instance of tracefs of its own. Knows neither `vmrun` nor its peers.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is recorded.
const EVENTS: [&str; 8] = [
    "kvm/kvm_exit",
    "kvm/kvm_userspace_exit",
    "kvm/kvm_cpuid",
    "raw_syscalls/sys_enter",
    "sched/sched_switch",
    "sched/sched_process_exec",
    "exceptions/page_fault_user",
    "exceptions/page_fault_kernel",
];
/// Probes of our own: what waits for readers of SRCU, for milliseconds.
const PROBES: [(&str, &str); 2] = [("srcu", "synchronize_srcu"), ("srcu_expedited", "synchronize_srcu_expedited")];
const ALL_PROBES: &str = "/sys/kernel/tracing/kprobe_events";
/// For each CPU; a run that does not fit is an error.
const BUFFER_KIB: &str = "65536";

/// One recorded event.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Event {
    /// Name of the thread; the last one that it had.
    pub(crate) thread: String,
    pub(crate) tid: u32,
    /// Id of its process; 0 when the kernel no longer knew it.
    pub(crate) pid: u32,
    /// What happened: the name of a tracepoint.
    pub(crate) name: String,
    /// Its fields as text.
    pub(crate) fields: String,
}

/// An instance of tracefs; removed when dropped.
pub(crate) struct Trace {
    dir: PathBuf,
}

impl Trace {
    /// Makes an instance that records nothing yet.
    pub(crate) fn create() -> io::Result<Self> {
        let dir = Path::new("/sys/kernel/tracing/instances").join(format!("bench-{}", std::process::id()));
        fs::create_dir(&dir)?;
        let trace = Self { dir };
        trace.set("tracing_on", "0")?;
        trace.set("trace_clock", "counter")?;
        trace.set("buffer_size_kb", BUFFER_KIB)?;
        trace.set("options/event-fork", "1")?;
        trace.set("options/record-tgid", "1")?;
        for event in EVENTS {
            trace.set(&format!("events/{event}/enable"), "1")?;
        }
        for (name, function) in PROBES {
            probe(&format!("p:bench/{name} {function}"))?;
            trace.set(&format!("events/bench/{name}/enable"), "1")?;
        }
        Ok(trace)
    }

    /// Empties the buffer; records from now on what the threads `tids` do, and what they start.
    pub(crate) fn begin(&self, tids: &[u32]) -> io::Result<()> {
        self.set("trace", "")?;
        // Emptied by the first write, so nobody else's id is in it.
        let tids: Vec<String> = tids.iter().map(u32::to_string).collect();
        fs::write(self.dir.join("set_event_pid"), tids.join(" "))?;
        self.set("tracing_on", "1")
    }

    /// A command that adds itself to those recorded, then becomes `command`.
    pub(crate) fn recorded(&self, command: &[&str]) -> Command {
        let mut recorded = Command::new("/bin/sh");
        recorded.arg("-c").arg("echo $$ >>\"$0\" && exec \"$@\"").arg(self.dir.join("set_event_pid")).args(command);
        recorded
    }

    /// Stops recording; returns all events in their order.
    pub(crate) fn end(&self) -> io::Result<Vec<Event>> {
        self.set("tracing_on", "0")?;
        let text = fs::read_to_string(self.dir.join("trace"))?;
        let lost =
            text.lines().take_while(|line| line.starts_with('#')).filter_map(entries).any(|(kept, all)| kept != all);
        if lost {
            return Err(io::Error::other("events were lost: the buffer is too small"));
        }
        Ok(text.lines().filter_map(parse).collect())
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.dir.join(file), value).map_err(|error| io::Error::other(format!("{file}: {error}")))
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // They go with the host.
        let _ = fs::remove_dir(&self.dir);
        for (name, _) in PROBES {
            let _ = probe(&format!("-:bench/{name}"));
        }
    }
}

/// Adds or removes one; what overwrites the file removes all.
fn probe(definition: &str) -> io::Result<()> {
    File::options().append(true).open(ALL_PROBES)?.write_all(definition.as_bytes())
}

/// Kept and written entries, of the line `# entries-in-buffer/entries-written: 12/12   #P:2`.
fn entries(line: &str) -> Option<(u64, u64)> {
    let counts = line.strip_prefix("# entries-in-buffer/entries-written: ")?.split_whitespace().next()?;
    let (kept, written) = counts.split_once('/')?;
    Some((kept.parse().ok()?, written.parse().ok()?))
}

/// A line like `  vcpu0-71  (     70) [001] d..1.  4711: kvm_exit: vcpu 0 reason npf ...`.
fn parse(line: &str) -> Option<Event> {
    if line.starts_with('#') {
        return None;
    }
    let (task, rest) = line.split_once(" [")?;
    let (task, pid) = task.rsplit_once('(')?;
    let (thread, tid) = task.trim().rsplit_once('-')?;
    let (_, event) = rest.split_once(": ")?;
    let (name, fields) = event.split_once(':')?;
    Some(Event {
        thread: thread.to_owned(),
        tid: tid.parse().ok()?,
        pid: pid.trim_end_matches(')').trim().parse().unwrap_or(0),
        name: name.to_owned(),
        fields: fields.trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::{entries, parse};

    #[test]
    fn a_line_is_taken_apart() {
        let event =
            parse("    runc:[1:CHILD]-71      (     70) [001] d..1.  4711: sys_enter: NR 59 (1, 2)").expect("an event");
        assert_eq!((event.thread.as_str(), event.tid, event.pid), ("runc:[1:CHILD]", 71, 70));
        assert_eq!((event.name.as_str(), event.fields.as_str()), ("sys_enter", "NR 59 (1, 2)"));
        assert_eq!(parse("           <...>-9  (-------) [000] ..... 1: print: x").expect("an event").pid, 0);
        assert_eq!(parse("# tracer: nop"), None);
    }

    #[test]
    fn lost_events_are_seen() {
        assert_eq!(entries("# entries-in-buffer/entries-written: 205/250   #P:2"), Some((205, 250)));
    }
}
