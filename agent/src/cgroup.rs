//! The cgroup of a container (Documentation/admin-guide/cgroup-v2.rst): what it uses, its limits, freezing, its processes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_api::message::StatsReply;
use oci_spec::runtime::LinuxResources;

/// The cgroup of one container.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    pub(crate) fn of(container_id: &str) -> Self {
        Self(Path::new("/sys/fs/cgroup/containers").join(container_id))
    }

    pub(crate) fn freeze(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.0.join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// Kills every process at once.
    pub(crate) fn kill(&self) -> io::Result<()> {
        fs::write(self.0.join("cgroup.kill"), "1")
    }

    pub(crate) fn processes(&self) -> io::Result<Vec<i32>> {
        Ok(self.read("cgroup.procs")?.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Whether the OOM killer has killed in it.
    pub(crate) fn oom_killed(&self) -> bool {
        let events = self.read("memory.events").unwrap_or_default();
        keyed(&events).any(|(key, value)| key == "oom_kill" && value > 0)
    }

    pub(crate) fn remove(&self) {
        // Not there: libcontainer has removed it.
        let _ = fs::remove_dir(&self.0);
    }

    pub(crate) fn update(&self, resources: &LinuxResources) -> io::Result<()> {
        if let Some(limit) = resources.memory().as_ref().and_then(oci_spec::runtime::LinuxMemory::limit) {
            self.write_limit("memory.max", limit)?;
        }
        if let Some(cpu) = resources.cpu() {
            if let Some(quota) = cpu.quota() {
                let period = cpu.period().unwrap_or(100_000);
                let quota = if quota <= 0 { "max".to_owned() } else { quota.to_string() };
                fs::write(self.0.join("cpu.max"), format!("{quota} {period}"))?;
            }
            if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
                let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
                fs::write(self.0.join("cpu.weight"), weight.to_string())?;
            }
        }
        if let Some(pids) = resources.pids() {
            self.write_limit("pids.max", pids.limit())?;
        }
        Ok(())
    }

    fn write_limit(&self, file: &str, limit: i64) -> io::Result<()> {
        let value = if limit <= 0 { "max".to_owned() } else { limit.to_string() };
        fs::write(self.0.join(file), value)
    }

    pub(crate) fn stats(&self) -> io::Result<StatsReply> {
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
        stats.memory_current = number(&self.read("memory.current")?);
        stats.memory_max = number(&self.read("memory.max")?);
        stats.memory_peak = number(&self.read("memory.peak")?);
        stats.pids_current = number(&self.read("pids.current")?);
        stats.pids_max = number(&self.read("pids.max")?);
        let owned = |(key, value): (&str, u64)| (key.to_owned(), value);
        stats.memory_stat = keyed(&self.read("memory.stat")?).map(owned).collect();
        stats.memory_events = keyed(&self.read("memory.events")?).map(owned).collect();
        Ok(stats)
    }

    fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.0.join(file))
    }
}

/// Lines of `key value`.
fn keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// A number, or `max`.
fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{keyed, number};

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
}
