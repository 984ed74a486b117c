//! What the processes of a container have of the host's memory. A guest's RAM is the memory of its VMM that is mapped from the file
//! `guest-ram`; it is counted apart.

use std::fs;

use ::tests::Story;
use anyhow::{Context as _, Result, ensure};

use crate::counts::Counts;

/// A process of a container: its owner, its VMM, or its shim.
pub(crate) struct HostProcess {
    pub(crate) program: &'static str,
    pub(crate) pid: u32,
}

impl HostProcess {
    /// Its threads.
    pub(crate) fn tids(&self) -> Vec<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect()
    }
}

/// Owner and VMM of the container `bench`.
pub(crate) fn processes_of(story: &Story) -> Result<[HostProcess; 2]> {
    let inspected = story.inspect("bench");
    let vmm = inspected["State"]["Pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("no VMM is known")?;
    let status = fs::read_to_string(format!("/proc/{vmm}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
    let owner = parent.context("the VMM has no parent")?;
    Ok([HostProcess { program: "vmrun", pid: owner }, HostProcess { program: "vmm", pid: vmm }])
}

/// What the host's kernel counts as used by processes and for them, in `/proc/meminfo`; `VmallocUsed` has the kernel's stacks. What
/// is available is not told to the page: each CPU keeps some large pages that were freed.
const USED: [&str; 7] = ["Shmem:", "AnonPages:", "Slab:", "PageTables:", "SecPageTables:", "VmallocUsed:", "Percpu:"];

/// KiB of the host's memory that are used.
pub(crate) fn used_kib() -> Result<u64> {
    let memory = fs::read_to_string("/proc/meminfo")?;
    let figures = memory.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let is_use = USED.contains(&words.next()?);
        words.next()?.parse::<u64>().ok().filter(|_| is_use)
    });
    Ok(figures.sum())
}

/// By how much `values` rise from one to the next: the slope of a line through them by least squares, rounded down, or 0 when it falls.
pub(crate) fn rise(values: &[u64]) -> u64 {
    let count = i64::try_from(values.len()).unwrap_or(0);
    // Twice the distance from the middle, which has no half.
    let distances = (0..).map(|index: i64| 2 * index - count + 1);
    let (mut covariance, mut variance) = (0, 0);
    for (distance, value) in distances.zip(values) {
        covariance += distance * i64::try_from(*value).unwrap_or(0);
        variance += distance * distance;
    }
    u64::try_from(2 * covariance / variance).unwrap_or(0)
}

/// KiB of each kind.
pub(crate) fn measure(processes: &[HostProcess]) -> Result<Counts> {
    let mut counts = Counts::new();
    for HostProcess { program, pid } in processes {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        ensure!(!smaps.is_empty(), "{program} has ended");
        let mut in_guest = false;
        for line in smaps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            // A line without a colon behind its first word begins a mapping.
            if !words.first().is_some_and(|word| word.ends_with(':')) {
                in_guest = line.contains("guest-ram");
                continue;
            }
            let kib: u64 = words.get(1).and_then(|word| word.parse().ok()).unwrap_or(0);
            let mut add = |name: String| *counts.entry(name).or_default() += kib;
            match (words[0], in_guest) {
                ("Pss:", true) => add("idle.guest KiB".to_owned()),
                ("Pss:", false) => {
                    add(format!("idle.proportional KiB.{program}"));
                    add("idle.proportional KiB".to_owned());
                }
                ("Private_Clean:" | "Private_Dirty:", false) => {
                    add(format!("idle.private KiB.{program}"));
                    add("idle.private KiB".to_owned());
                }
                _ => {}
            }
        }
    }
    let of = |name: &str| counts.get(name).copied().unwrap_or(0);
    let total = of("idle.guest KiB") + of("idle.proportional KiB");
    counts.insert("idle.total KiB".to_owned(), total);
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::rise;

    #[test]
    fn a_rise_is_that_of_the_line_through_all() {
        assert_eq!(rise(&[10, 40, 70, 100]), 30);
        assert_eq!(rise(&[10, 50, 60, 100]), 28);
        assert_eq!(rise(&[30, 20, 10]), 0);
    }
}
