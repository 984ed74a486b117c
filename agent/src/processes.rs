//! The processes of a container as /proc shows them (proc(5)).

use std::collections::HashMap;
use std::fs;

use agent_api::message::GuestProcess;

/// Milliseconds of one clock tick: USER_HZ is 100 on every architecture of ours.
const TICK_MS: u64 = 10;
/// Longest chain of parents that is followed.
const MAX_DEPTH: usize = 64;

/// Describes each process; one that ends meanwhile is left out. `exec_ids` names those that were made by an exec.
pub(crate) fn list(pids: &[i32], exec_ids: &HashMap<i32, String>) -> Vec<GuestProcess> {
    let found: Vec<(i32, Stat, u32, String)> = pids.iter().filter_map(|&pid| describe(pid)).collect();
    let parents: HashMap<i32, i32> = found.iter().map(|(pid, stat, ..)| (*pid, stat.ppid)).collect();
    let process = |(pid, stat, uid, command): (i32, Stat, u32, String)| GuestProcess {
        pid: u32::try_from(pid).unwrap_or_default(),
        ppid: u32::try_from(stat.ppid).unwrap_or_default(),
        uid,
        cpu_time_ms: stat.ticks.saturating_mul(TICK_MS),
        exec_id: exec_id_of(pid, &parents, exec_ids),
        command,
        ..Default::default()
    };
    found.into_iter().map(process).collect()
}

/// The exec that a process descends from, or nothing: then it is the init's, or its parent has ended.
fn exec_id_of(pid: i32, parents: &HashMap<i32, i32>, exec_ids: &HashMap<i32, String>) -> String {
    let ancestors = std::iter::successors(Some(pid), |pid| parents.get(pid).copied()).take(MAX_DEPTH);
    ancestors.filter_map(|pid| exec_ids.get(&pid)).next().cloned().unwrap_or_default()
}

fn describe(pid: i32) -> Option<(i32, Stat, u32, String)> {
    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).ok();
    let stat = stat(&String::from_utf8_lossy(&read("stat")?))?;
    let uid = effective_uid(&String::from_utf8_lossy(&read("status")?)).unwrap_or_default();
    let words = read("cmdline")?;
    let words = String::from_utf8_lossy(words.strip_suffix(b"\0").unwrap_or(&words)).replace('\0', " ");
    // A kernel thread or a zombie has no words.
    let command = if words.is_empty() { format!("[{}]", stat.name) } else { words };
    Some((pid, stat, uid, command))
}

struct Stat {
    name: String,
    ppid: i32,
    ticks: u64,
}

/// Fields of /proc/PID/stat; the name is in brackets and may hold any character.
fn stat(text: &str) -> Option<Stat> {
    let (before, after) = text.rsplit_once(')')?;
    let name = before.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = after.split_whitespace().collect();
    // state is the first of these, so ppid (4) is [1], utime (14) is [11] and stime (15) is [12].
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat { name, ppid: fields.get(1)?.parse().ok()?, ticks: number(11)?.saturating_add(number(12)?) })
}

/// The second number of `Uid:` in /proc/PID/status.
fn effective_uid(text: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_a_process_may_hold_brackets_and_blanks() {
        let found = stat("12 (a) b (c)) S 7 12 12 0 -1 4194304 1 0 0 0 30 12 0 0 20 0 1 0 5 0 0").expect("stat");
        assert_eq!((found.name.as_str(), found.ppid, found.ticks), ("a) b (c)", 7, 42));
        assert!(stat("12 (short) S").is_none());
        assert!(stat("nonsense").is_none());
    }

    #[test]
    fn descendants_belong_to_their_exec() {
        let parents = HashMap::from([(10, 1), (11, 10), (12, 11), (20, 1)]);
        let execs = HashMap::from([(10, "one".to_owned()), (20, String::new())]);
        assert_eq!(exec_id_of(12, &parents, &execs), "one");
        assert_eq!(exec_id_of(20, &parents, &execs), "");
    }

    #[test]
    fn parents_in_a_circle_are_not_followed_for_ever() {
        let parents = HashMap::from([(10, 11), (11, 10)]);
        assert_eq!(exec_id_of(10, &parents, &HashMap::new()), "");
    }

    #[test]
    fn effective_uid_is_the_second() {
        assert_eq!(effective_uid("Name:\tx\nUid:\t1\t2\t3\t4\n"), Some(2));
        assert_eq!(effective_uid("Name:\tx\n"), None);
    }
}
