//! What the processes of a cgroup use, as its files say it (Documentation/admin-guide/cgroup-v2.rst): in the guest a container's, on the host
//! a VM's.

use std::collections::HashMap;
use std::path::Path;
use std::{fs, io};

use crate::message::{Pressure, StatsReply};

/// Reads every controller. A file that a controller lacks in this kernel counts as zero.
///
/// # Errors
/// The cgroup is not there.
pub fn stats(folder: &Path) -> io::Result<StatsReply> {
    Files(folder).stats()
}

/// Lines of `key value`; others are left out.
pub fn keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// The folder of a cgroup.
struct Files<'a>(&'a Path);

impl Files<'_> {
    fn stats(&self) -> io::Result<StatsReply> {
        let mut stats = StatsReply::new();
        for (key, value) in keyed(&self.read("cpu.stat")?) {
            match key {
                "usage_usec" => stats.cpu_usage_us = value,
                "user_usec" => stats.cpu_user_us = value,
                "system_usec" => stats.cpu_system_us = value,
                "nr_periods" => stats.cpu_periods = value,
                "nr_throttled" => stats.cpu_throttled_periods = value,
                "throttled_usec" => stats.cpu_throttled_us = value,
                _ => {}
            }
        }
        stats.memory_current = self.number("memory.current");
        stats.memory_max = self.number("memory.max");
        stats.memory_peak = self.number("memory.peak");
        stats.swap_current = self.number("memory.swap.current");
        stats.swap_max = self.number("memory.swap.max");
        stats.pids_current = self.number("pids.current");
        stats.pids_max = self.number("pids.max");
        stats.memory_stat = self.table("memory.stat");
        stats.memory_events = self.table("memory.events");
        for (key, value) in nested(&self.read("io.stat").unwrap_or_default()) {
            match key {
                "rbytes" => stats.io_read_bytes += value,
                "wbytes" => stats.io_write_bytes += value,
                "rios" => stats.io_reads += value,
                "wios" => stats.io_writes += value,
                _ => {}
            }
        }
        stats.hugetlb_current = self.hugetlb();
        stats.cpu_pressure = Some(self.pressure("cpu.pressure")).into();
        stats.memory_pressure = Some(self.pressure("memory.pressure")).into();
        stats.io_pressure = Some(self.pressure("io.pressure")).into();
        Ok(stats)
    }

    fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.0.join(file))
    }

    fn number(&self, file: &str) -> u64 {
        self.read(file).map_or(0, |text| number(&text))
    }

    fn table(&self, file: &str) -> HashMap<String, u64> {
        let text = self.read(file).unwrap_or_default();
        keyed(&text).map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// The files are `hugetlb.SIZE.current`.
    fn hugetlb(&self) -> HashMap<String, u64> {
        let names = fs::read_dir(self.0).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        let sizes = names.filter_map(|name| Some(name.strip_prefix("hugetlb.")?.strip_suffix(".current")?.to_owned()));
        sizes
            .filter(|size| !size.contains('.'))
            .map(|size| (size.clone(), self.number(&format!("hugetlb.{size}.current"))))
            .collect()
    }

    fn pressure(&self, file: &str) -> Pressure {
        pressure(&self.read(file).unwrap_or_default())
    }
}

/// Numbers of lines such as `8:0 rbytes=1 wbytes=2`, whatever the device.
fn nested(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.split_whitespace().filter_map(|word| {
        let (key, value) = word.split_once('=')?;
        Some((key, value.parse().ok()?))
    })
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=1`, then the same for `full` (Documentation/accounting/psi.rst).
fn pressure(text: &str) -> Pressure {
    let total = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        line.split_whitespace().find_map(|word| word.strip_prefix("total="))?.parse().ok()
    };
    let (some_us, full_us) = (total("some ").unwrap_or(0), total("full ").unwrap_or(0));
    Pressure { some_us, full_us, ..Default::default() }
}

/// A number, or `max`.
fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{keyed, nested, number, pressure};

    #[test]
    fn flat_keyed_files_are_read_and_nonsense_is_skipped() {
        let found: Vec<_> = keyed("oom 1\noom_kill 2\nnonsense\nbad x\n").collect();
        assert_eq!(found, [("oom", 1), ("oom_kill", 2)]);
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        assert_eq!(number("max\n"), u64::MAX);
        assert_eq!(number("42\n"), 42);
    }

    #[test]
    fn devices_are_summed_by_key() {
        let text = "8:0 rbytes=10 wbytes=20 rios=1\n254:0 rbytes=5 dios=x\n";
        let read: u64 = nested(text).filter(|(key, _)| *key == "rbytes").map(|(_, value)| value).sum();
        assert_eq!(read, 15);
    }

    #[test]
    fn pressure_is_the_total_of_each_line() {
        let text = "some avg10=0.00 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n";
        let found = pressure(text);
        assert_eq!((found.some_us, found.full_us), (12, 3));
        assert_eq!(pressure("nonsense").some_us, 0);
    }
}
