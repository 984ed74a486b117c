//! Markdown tables and JSON of all runs: the goals, then every count. A figure is the median of the rounds, and behind it the spread
//! where there is one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::counts::Counts;

/// The counts of each round, by subject.
pub(crate) type Samples = BTreeMap<&'static str, Vec<Counts>>;

/// One goal: what, subject, count, and the most that it may be.
const GOALS: [(&str, &str, &str, u64); 7] = [
    ("userspace exits until the agent is ready", "vmrun run", "agent.userspace exits", 600),
    ("host system calls of vmrun and vmm, cold run", "vmrun run", "run.system calls", 700),
    ("private memory of vmrun and vmm beside another VM, KiB", "vmrun idle", "idle.private KiB", 6 << 10),
    ("idle VM of 128 MiB beside another, its processes, KiB", "vmrun idle", "idle.total KiB", 28 << 10),
    ("what one more of five such VMs takes of the host's memory, KiB", "vmrun idle", "idle.used KiB", 28 << 10),
    ("host system calls of vmrun for an address of a pod", "vmrun address", "system calls for an address", 10),
    ("proportional memory of the shim, KiB", "containerd exec", "idle.proportional KiB.shim", 6 << 10),
];

/// A subject and a count.
type Figure = (&'static str, &'static str);

/// Goals that are ratios in one run: what, ours, theirs, and the most in hundredths.
const RATIOS: [(&str, Figure, Figure, u64); 8] = [
    ("exits until the agent is ready, to QEMU microvm", ("vmrun run", "agent.exits"), ("qemu", "agent.exits"), 50),
    ("userspace exits, the same", ("vmrun run", "agent.userspace exits"), ("qemu", "agent.userspace exits"), 50),
    (
        "system calls until the command, to `runc run`",
        ("vmrun run", "command.system calls"),
        ("runc", "command.system calls"),
        300,
    ),
    (
        "system calls until the command, `vmrun exec` to `runc run`",
        ("vmrun exec", "command.system calls"),
        ("runc", "command.system calls"),
        50,
    ),
    ("system calls of a stop, to QEMU microvm", ("vmrun run", "stop.system calls"), ("qemu", "stop.system calls"), 50),
    ("page faults of a stop, the same", ("vmrun run", "stop.host page faults"), ("qemu", "stop.host page faults"), 50),
    (
        "time to the first output, containerd to `vmrun run`",
        ("containerd output", "first output us"),
        ("vmrun output", "first output us"),
        150,
    ),
    (
        "time of `true` in a container of containerd, to the same with runc",
        ("containerd exec", "exec us"),
        ("containerd exec, runc", "exec us"),
        100,
    ),
];

/// The tables.
pub(crate) fn markdown(samples: &Samples) -> String {
    let mut text = String::from("| goal | at most | measured |\n|---|---|---|\n");
    for (what, subject, count, most) in GOALS {
        let measured = figure(samples, subject, count);
        writeln!(text, "| {what} | {most} | {measured} |").expect("a string grows");
    }
    for (what, ours, theirs, most) in RATIOS {
        let hundredths = ratio(median(samples, ours.0, ours.1), median(samples, theirs.0, theirs.1));
        writeln!(text, "| {what} | {} | {} |", decimal(Some(most)), decimal(hundredths)).expect("a string grows");
    }
    let subjects: Vec<&str> = samples.keys().copied().collect();
    writeln!(text, "\n| count | {} |\n|---{}|", subjects.join(" | "), "|---".repeat(subjects.len()))
        .expect("a string grows");
    let names: BTreeSet<&String> = samples.values().flatten().flat_map(Counts::keys).collect();
    for name in names {
        let figures: Vec<String> = subjects.iter().map(|subject| figure(samples, subject, name)).collect();
        writeln!(text, "| {name} | {} |", figures.join(" | ")).expect("a string grows");
    }
    text
}

/// All values in ascending order.
fn values(samples: &Samples, subject: &str, count: &str) -> Vec<u64> {
    let mut values: Vec<u64> =
        samples.get(subject).into_iter().flatten().filter_map(|run| run.get(count).copied()).collect();
    values.sort_unstable();
    values
}

fn median(samples: &Samples, subject: &str, count: &str) -> Option<u64> {
    let values = values(samples, subject, count);
    values.get(values.len() / 2).copied()
}

fn figure(samples: &Samples, subject: &str, count: &str) -> String {
    let values = values(samples, subject, count);
    match (values.first(), values.get(values.len() / 2), values.last()) {
        (Some(least), Some(median), Some(most)) if least != most => format!("{median} ({least} to {most})"),
        (Some(only), ..) => only.to_string(),
        _ => String::new(),
    }
}

/// In hundredths.
fn ratio(ours: Option<u64>, theirs: Option<u64>) -> Option<u64> {
    (ours? * 100).checked_div(theirs?)
}

fn decimal(hundredths: Option<u64>) -> String {
    hundredths.map_or_else(String::new, |value| format!("{}.{:02}", value / 100, value % 100))
}

#[cfg(test)]
mod tests {
    use super::{Samples, decimal, figure, markdown};

    fn samples() -> Samples {
        let run = |value| [("agent.userspace exits".to_owned(), value)].into();
        Samples::from([("vmrun run", vec![run(30), run(10), run(20)]), ("qemu", vec![run(80)])])
    }

    #[test]
    fn a_figure_is_the_median_and_the_spread() {
        assert_eq!(figure(&samples(), "vmrun run", "agent.userspace exits"), "20 (10 to 30)");
        assert_eq!(figure(&samples(), "qemu", "agent.userspace exits"), "80");
        assert_eq!(figure(&samples(), "qemu", "no such count"), "");
    }

    #[test]
    fn goals_stand_before_the_counts() {
        let text = markdown(&samples());
        assert!(text.contains("| userspace exits until the agent is ready | 600 | 20 (10 to 30) |"), "{text}");
        assert!(text.contains("| userspace exits, the same | 0.50 | 0.25 |"), "{text}");
        assert!(text.ends_with("| agent.userspace exits | 80 | 20 (10 to 30) |\n"), "{text}");
        assert_eq!(decimal(Some(1205)), "12.05");
    }
}
