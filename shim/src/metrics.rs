//! What a container uses, as containerd's `io.containerd.cgroups.v2.Metrics`.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PSIData, PSIStats, PidsStat,
};
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use sandbox::message::{Pressure, StatsReply};
use sandbox::network::NetStats;

use crate::error::TaskError;

/// Name of the message, as containerd's clients know it.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// The answer to Stats.
pub(crate) fn any(metrics: &Metrics) -> Result<Any, TaskError> {
    let value = metrics.write_to_bytes().map_err(|error| TaskError::Invalid(error.to_string()))?;
    Ok(Any { type_url: TYPE_URL.to_owned(), value, ..Default::default() })
}

/// From the guest's cgroup.
pub(crate) fn metrics(stats: &StatsReply) -> Metrics {
    Metrics {
        pids: Some(PidsStat { current: stats.pids_current, limit: limit(stats.pids_max), ..Default::default() }).into(),
        cpu: Some(CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_periods,
            nr_throttled: stats.cpu_throttled_periods,
            throttled_usec: stats.cpu_throttled_us,
            psi: pressure(stats.cpu_pressure.as_ref()).into(),
            ..Default::default()
        })
        .into(),
        memory: Some(memory(stats)).into(),
        memory_events: Some(memory_events(stats)).into(),
        io: Some(io(stats)).into(),
        hugetlb: stats.hugetlb_current.iter().map(|(size, current)| huge_pages(size, *current)).collect(),
        ..Default::default()
    }
}

/// Of an interface of a VM. Older containerds leave it out.
pub(crate) fn interface(stats: NetStats) -> NetworkStat {
    NetworkStat {
        name: stats.name,
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_frames,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_frames,
        tx_errors: stats.tx_malformed,
        tx_dropped: stats.tx_dropped.saturating_add(stats.tx_spoofed),
        ..Default::default()
    }
}

/// "max" of the kernel; containerd has 0 for the number of processes.
fn limit(max: u64) -> u64 {
    if max == u64::MAX { 0 } else { max }
}

fn memory(stats: &StatsReply) -> MemoryStat {
    let field = |name: &str| stats.memory_stat.get(name).copied().unwrap_or_default();
    MemoryStat {
        anon: field("anon"),
        file: field("file"),
        kernel_stack: field("kernel_stack"),
        slab: field("slab"),
        sock: field("sock"),
        shmem: field("shmem"),
        file_mapped: field("file_mapped"),
        file_dirty: field("file_dirty"),
        file_writeback: field("file_writeback"),
        anon_thp: field("anon_thp"),
        inactive_anon: field("inactive_anon"),
        active_anon: field("active_anon"),
        inactive_file: field("inactive_file"),
        active_file: field("active_file"),
        unevictable: field("unevictable"),
        slab_reclaimable: field("slab_reclaimable"),
        slab_unreclaimable: field("slab_unreclaimable"),
        pgfault: field("pgfault"),
        pgmajfault: field("pgmajfault"),
        // The kernel has one each for anonymous and file pages since 5.9.
        workingset_refault: field("workingset_refault_anon") + field("workingset_refault_file"),
        workingset_activate: field("workingset_activate_anon") + field("workingset_activate_file"),
        workingset_nodereclaim: field("workingset_nodereclaim"),
        pgrefill: field("pgrefill"),
        pgscan: field("pgscan"),
        pgsteal: field("pgsteal"),
        pgactivate: field("pgactivate"),
        pgdeactivate: field("pgdeactivate"),
        pglazyfree: field("pglazyfree"),
        pglazyfreed: field("pglazyfreed"),
        thp_fault_alloc: field("thp_fault_alloc"),
        thp_collapse_alloc: field("thp_collapse_alloc"),
        usage: stats.memory_current,
        usage_limit: stats.memory_max,
        max_usage: stats.memory_peak,
        swap_usage: stats.swap_current,
        swap_limit: stats.swap_max,
        psi: pressure(stats.memory_pressure.as_ref()).into(),
        ..Default::default()
    }
}

fn memory_events(stats: &StatsReply) -> MemoryEvents {
    let field = |name: &str| stats.memory_events.get(name).copied().unwrap_or_default();
    MemoryEvents {
        low: field("low"),
        high: field("high"),
        max: field("max"),
        oom: field("oom"),
        oom_kill: field("oom_kill"),
        oom_group_kill: field("oom_group_kill"),
        ..Default::default()
    }
}

fn io(stats: &StatsReply) -> IOStat {
    let total = IOEntry {
        rbytes: stats.io_read_bytes,
        wbytes: stats.io_write_bytes,
        rios: stats.io_reads,
        wios: stats.io_writes,
        ..Default::default()
    };
    IOStat { usage: vec![total], psi: pressure(stats.io_pressure.as_ref()).into(), ..Default::default() }
}

fn huge_pages(size: &str, current: u64) -> HugeTlbStat {
    HugeTlbStat { pagesize: size.to_owned(), current, ..Default::default() }
}

/// The guest tells totals; the averages of some seconds are not known.
fn pressure(pressure: Option<&Pressure>) -> Option<PSIStats> {
    let total = |total| Some(PSIData { total, ..Default::default() }).into();
    pressure.map(|p| PSIStats { some: total(p.some_us), full: total(p.full_us), ..Default::default() })
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::cgroups_v2::metrics::Metrics;
    use protobuf::Message as _;
    use sandbox::message::StatsReply;

    use super::{any, metrics};

    #[test]
    fn what_the_guest_counts_reaches_containerd() {
        let mut stats = StatsReply { memory_current: 4096, pids_current: 3, pids_max: u64::MAX, ..Default::default() };
        stats.cpu_usage_us = 70;
        stats.memory_stat.insert("inactive_file".to_owned(), 1000);
        stats.memory_stat.insert("workingset_refault_file".to_owned(), 2);
        stats.memory_events.insert("oom_kill".to_owned(), 1);
        let any = any(&metrics(&stats)).expect("encoded");
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let read = Metrics::parse_from_bytes(&any.value).expect("decoded");
        assert_eq!((read.pids.current, read.pids.limit, read.cpu.usage_usec), (3, 0, 70));
        assert_eq!((read.memory.usage, read.memory.inactive_file, read.memory.workingset_refault), (4096, 1000, 2));
        assert_eq!(read.memory_events.oom_kill, 1);
    }
}
