//! `vmrun stats`: what containers use, once or again and again.

use std::io::{self, Write as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use sandbox::state::{self, Status};
use serde::Serialize;

use crate::cli::StatsArgs;
use crate::client::Client;
use crate::control::{Answer, Request, Usage};
use crate::ps::table;

/// Time between two looks.
const PERIOD: Duration = Duration::from_secs(1);

/// One container of the list.
#[derive(Debug, Serialize)]
struct Measured {
    name: String,
    /// Share of one CPU, in percent, since the look before.
    cpu_percent: f64,
    #[serde(flatten)]
    usage: Usage,
}

/// A look at one container.
struct Look {
    name: String,
    at: Instant,
    usage: Usage,
}

pub(crate) fn stats(root: &Path, args: &StatsArgs) -> Result<u8> {
    let mut before = look(root, &args.names)?;
    loop {
        thread::sleep(PERIOD);
        let now = look(root, &args.names)?;
        let measured: Vec<Measured> = now.iter().map(|look| measure(look, &before)).collect();
        print(&measured, args)?;
        // Containers that were named and are gone will not come back; of "all", others may come.
        if args.no_stream || (now.is_empty() && !args.names.is_empty()) {
            return Ok(0);
        }
        before = now;
    }
}

fn look(root: &Path, names: &[String]) -> Result<Vec<Look>> {
    if names.is_empty() {
        let running = state::list(root)?.into_iter().filter(|state| state.status == Status::Running);
        // One may have ended since it was listed.
        return Ok(running.filter_map(|state| look_at(root, &state.name).ok()).collect());
    }
    names.iter().map(|name| look_at(root, name)).collect()
}

fn look_at(root: &Path, name: &str) -> Result<Look> {
    let mut client = Client::connect(root, name)?;
    client.send(&Request::Stats)?;
    match client.receive()?.0 {
        Answer::Stats(usage) => Ok(Look { name: name.to_owned(), at: Instant::now(), usage }),
        Answer::Failed(cause) => bail!("{name}: {cause}"),
        other => bail!("unexpected answer of the container's owner: {other:?}"),
    }
}

fn measure(look: &Look, before: &[Look]) -> Measured {
    let earlier = before.iter().find(|earlier| earlier.name == look.name);
    let cpu_percent = earlier.map_or(0.0, |earlier| {
        let used_us = look.usage.cpu_usage_us.saturating_sub(earlier.usage.cpu_usage_us);
        let used = Duration::from_micros(used_us).as_secs_f64();
        100.0 * used / look.at.duration_since(earlier.at).as_secs_f64().max(0.001)
    });
    Measured { name: look.name.clone(), cpu_percent, usage: look.usage }
}

fn print(measured: &[Measured], args: &StatsArgs) -> Result<()> {
    let mut stdout = io::stdout().lock();
    if args.json {
        return Ok(writeln!(stdout, "{}", serde_json::to_string(measured)?)?);
    }
    let rows: Vec<[String; 7]> = measured.iter().map(row).collect();
    let header = ["NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "NET I/O", "BLOCK I/O", "PIDS"];
    write!(stdout, "{}", table(header, &rows))?;
    Ok(stdout.flush()?)
}

fn row(measured: &Measured) -> [String; 7] {
    let usage = &measured.usage;
    #[expect(clippy::cast_precision_loss, reason = "a share in percent")]
    let memory_percent = 100.0 * usage.memory_bytes as f64 / usage.memory_limit_bytes.max(1) as f64;
    [
        measured.name.clone(),
        format!("{:.2}%", measured.cpu_percent),
        format!("{} / {}", size(usage.memory_bytes), size(usage.memory_limit_bytes)),
        format!("{memory_percent:.2}%"),
        format!("{} / {}", size(usage.net_rx_bytes), size(usage.net_tx_bytes)),
        format!("{} / {}", size(usage.io_read_bytes), size(usage.io_write_bytes)),
        usage.pids.to_string(),
    ]
}

/// Binary units, as `docker stats` has them.
fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes >> shift > 0) {
        #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
        Some((shift, unit)) => format!("{:.2}{unit}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes}B"),
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_the_largest_unit_that_fits() {
        assert_eq!(size(512 << 20), "512.00MiB");
        assert_eq!(size(1536), "1.50KiB");
        assert_eq!(size(7), "7B");
    }
}
