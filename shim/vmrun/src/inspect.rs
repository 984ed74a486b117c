//! `vmrun inspect`: all that is known of containers, with Docker's keys where Docker has them.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Result;
use sandbox::io_limit::{IoKind, IoLimit};
use sandbox::state::{self, State, Status};
use serde_json::{Value, json};

use crate::for_each;
use crate::log::{file_path, timestamp};

pub(crate) fn inspect(root: &Path, names: &[String]) -> Result<u8> {
    let mut found = Vec::new();
    let code = for_each(names, |name| {
        found.push(describe(root, &state::read(root, name)?));
        Ok(())
    })?;
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&found)?)?;
    Ok(code)
}

fn describe(root: &Path, state: &State) -> Value {
    // Absent until the VM runs.
    let spec: Option<Value> =
        fs::read(root.join(&state.name).join("config.json")).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let orphaned = !state.status.is_exited() && !state::is_owned(root, &state.name);
    let (status, exit_code, oom_killed) = match state.status {
        _ if orphaned => ("dead", 0, false),
        Status::Creating => ("created", 0, false),
        Status::Running => ("running", 0, false),
        Status::Paused => ("paused", 0, false),
        Status::Exited { exit_code, oom_killed } => ("exited", exit_code, oom_killed),
    };
    json!({
        "Name": state.name,
        "Created": time(Some(state.created_at_ms)),
        "Path": state.command.first(),
        "Args": state.command.get(1..),
        "Image": state.image,
        "State": {
            "Status": status,
            "Running": matches!(status, "running" | "paused"),
            "Paused": status == "paused",
            "OOMKilled": oom_killed,
            "Dead": orphaned,
            "Pid": if state.status.is_exited() { None } else { state.vmm_pid },
            "OwnerPid": if state.status.is_exited() { None } else { Some(state.owner_pid) },
            "ExitCode": exit_code,
            "Error": state.error.as_deref().unwrap_or_default(),
            "StartedAt": time(state.started_at_ms),
            "FinishedAt": time(state.finished_at_ms),
        },
        "LogPath": file_path(&state.data_dir, 0),
        "HostConfig": {
            "AutoRemove": state.auto_remove,
            "Cgroup": state.cgroup,
            "Degraded": state.degraded,
            "BlkioDeviceReadBps": rates(&state.io_limits, IoKind::ReadBps),
            "BlkioDeviceWriteBps": rates(&state.io_limits, IoKind::WriteBps),
            "BlkioDeviceReadIOps": rates(&state.io_limits, IoKind::ReadIops),
            "BlkioDeviceWriteIOps": rates(&state.io_limits, IoKind::WriteIops),
        },
        "Spec": spec,
    })
}

fn rates(limits: &[IoLimit], kind: IoKind) -> Vec<Value> {
    let of_kind = limits.iter().filter(|limit| limit.kind == kind);
    of_kind.map(|limit| json!({ "Path": limit.disk.path, "Rate": limit.rate })).collect()
}

/// Docker's zero time for what has not happened.
fn time(at_ms: Option<u64>) -> String {
    match at_ms {
        Some(at_ms) => timestamp(UNIX_EPOCH + Duration::from_millis(at_ms)),
        None => "0001-01-01T00:00:00Z".to_owned(),
    }
}
