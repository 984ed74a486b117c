//! `vmrun ps`: the containers that the state folder knows.

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use sandbox::state::{self, State, Status};
use serde::Serialize;

use crate::cli::PsArgs;
use crate::record::now_ms;

/// Longest command in the table, in characters.
const MAX_COMMAND_LEN: usize = 30;

/// One container of the list.
#[derive(Debug, Serialize)]
struct Listed {
    #[serde(flatten)]
    state: State,
    /// Its owner was killed; `gc` removes it.
    orphaned: bool,
}

pub(crate) fn ps(root: &Path, args: &PsArgs) -> Result<u8> {
    let mut listed: Vec<Listed> = state::list(root)?
        .into_iter()
        .map(|state| Listed { orphaned: !state.status.is_exited() && !state::is_owned(root, &state.name), state })
        .filter(|container| args.all || !(container.state.status.is_exited() || container.orphaned))
        .collect();
    listed.sort_by_key(|container| std::cmp::Reverse(container.state.created_at_ms));
    let mut stdout = io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string_pretty(&listed)?)?;
        return Ok(0);
    }
    if args.quiet {
        let names: String = listed.iter().map(|container| format!("{}\n", container.state.name)).collect();
        write!(stdout, "{names}")?;
        return Ok(0);
    }
    let now_ms = now_ms();
    let rows: Vec<[String; 5]> = listed.iter().map(|container| row(container, now_ms)).collect();
    write!(stdout, "{}", table(["NAME", "IMAGE", "COMMAND", "CREATED", "STATUS"], &rows))?;
    Ok(0)
}

fn row(container: &Listed, now_ms: u64) -> [String; 5] {
    let state = &container.state;
    let command = state.command.join(" ");
    let mut shown: String =
        command.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_COMMAND_LEN).collect();
    if shown.len() < command.len() {
        shown.push('…');
    }
    let created = format!("{} ago", age(now_ms, Some(state.created_at_ms)));
    [state.name.clone(), state.image.clone(), format!("\"{shown}\""), created, status(container, now_ms)]
}

fn status(container: &Listed, now_ms: u64) -> String {
    let state = &container.state;
    let up = age(now_ms, state.started_at_ms);
    match state.status {
        _ if container.orphaned => "Dead (vmrun gc removes it)".to_owned(),
        Status::Creating => "Creating".to_owned(),
        Status::Running => format!("Up {up}"),
        Status::Paused => format!("Up {up} (Paused)"),
        Status::Exited { exit_code, .. } => format!("Exited ({exit_code}) {} ago", age(now_ms, state.finished_at_ms)),
    }
}

/// The largest unit only, as Docker has it.
fn age(now_ms: u64, then_ms: Option<u64>) -> String {
    let seconds = Duration::from_millis(now_ms.saturating_sub(then_ms.unwrap_or(now_ms))).as_secs();
    let units = [(86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")];
    let (size, unit) = units.into_iter().find(|(size, _)| seconds >= *size).unwrap_or((1, "second"));
    let count = seconds / size;
    if count == 1 { format!("{count} {unit}") } else { format!("{count} {unit}s") }
}

/// Columns as wide as their widest cell.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let header = header.map(str::to_owned);
    let width =
        |column: usize| rows.iter().chain([&header]).map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("   ").trim_end())
    };
    [&header].into_iter().chain(rows).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::{age, table};

    #[test]
    fn ages_have_one_unit() {
        assert_eq!(age(61_000, Some(0)), "1 minute");
        assert_eq!(age(7_200_000, Some(0)), "2 hours");
        assert_eq!(age(0, Some(5)), "0 seconds");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["long name".to_owned(), "x".to_owned()]];
        assert_eq!(table(["NAME", "B"], &rows), "NAME        B\nlong name   x\n");
    }
}
