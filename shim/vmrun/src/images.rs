//! `vmrun pull`, `images`, `rmi` and `load`: the images of the store, in Docker's words.

use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use chrono::DateTime;
use serde::Serialize;

use crate::image::{self, OpenOptions, StoredImage};

/// Fetches images from their registries.
pub(crate) fn pull(data_root: &Path, name: &str, options: OpenOptions) -> Result<u8> {
    let pulled = image::pull(name, data_root, options)?;
    if !options.quiet {
        println!("Digest: {}", pulled.digest);
    }
    println!("{}", pulled.reference.map_or_else(|| pulled.id.to_string(), |reference| reference.to_string()));
    Ok(0)
}

/// Keeps the images of an archive.
pub(crate) fn load(data_root: &Path, input: Option<PathBuf>, quiet: bool) -> Result<u8> {
    if input.is_none() && io::stdin().is_terminal() {
        bail!("nothing to load: name an archive with --input, or send it to standard input");
    }
    for loaded in image::load(input.as_deref(), data_root, OpenOptions { quiet, ..OpenOptions::default() })? {
        match &loaded.reference {
            Some(reference) => println!("Loaded image: {}", image::familiar(reference)),
            None => println!("Loaded image ID: {}", loaded.id),
        }
    }
    Ok(0)
}

/// Removes images.
pub(crate) fn rmi(root: &Path, data_root: &Path, names: &[String], force: bool) -> Result<u8> {
    let users: Vec<_> = sandbox::state::list(root)?.into_iter().map(|state| (state.name, state.image)).collect();
    for name in names {
        for line in image::remove(name, data_root, force, &users)? {
            println!("{line}");
        }
    }
    Ok(0)
}

/// A line of `vmrun images`.
#[derive(Serialize)]
struct Listed {
    repository: Option<String>,
    tag: Option<String>,
    digest: String,
    id: String,
    created: Option<String>,
    size: u64,
}

/// Lists images.
pub(crate) fn images(data_root: &Path, json: bool, quiet: bool) -> Result<u8> {
    let mut images = image::list(data_root)?;
    images.sort_by_key(|image| std::cmp::Reverse(created_at(image)));
    if json {
        let listed: Vec<_> = images.iter().map(listed).collect();
        println!("{}", serde_json::to_string_pretty(&listed)?);
        return Ok(0);
    }
    if quiet {
        images.iter().for_each(|image| println!("{}", image.id.short()));
        return Ok(0);
    }
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())?;
    let mut rows = vec![["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"].map(str::to_owned)];
    for image in &images {
        let shown = listed(image);
        let none = || "<none>".to_owned();
        let created = created_at(image).map_or_else(|| "N/A".to_owned(), |at| format!("{} ago", age(now - at)));
        let id = image.id.short().to_owned();
        rows.push([
            shown.repository.unwrap_or_else(none),
            shown.tag.unwrap_or_else(none),
            id,
            created,
            size(image.size),
        ]);
    }
    print_table(&rows);
    Ok(0)
}

fn listed(image: &StoredImage) -> Listed {
    Listed {
        repository: image.reference.as_ref().map(image::familiar_repository),
        tag: image.reference.as_ref().and_then(|reference| reference.tag()).map(str::to_owned),
        digest: image.digest.to_string(),
        id: image.id.to_string(),
        created: image.created.clone(),
        size: image.size,
    }
}

fn print_table(rows: &[[String; 5]]) {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default() + 3;
    let widths: Vec<_> = (0..5).map(width).collect();
    for row in rows {
        let line: String = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("{}", line.trim_end());
    }
}

/// Seconds since the epoch.
fn created_at(image: &StoredImage) -> Option<i64> {
    Some(DateTime::parse_from_rfc3339(image.created.as_deref()?).ok()?.timestamp())
}

/// A duration in seconds, as roughly as Docker says it.
fn age(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    match () {
        () if seconds < 1 => "Less than a second".to_owned(),
        () if seconds == 1 => "1 second".to_owned(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".to_owned(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".to_owned(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        () if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", hours / 24 / 365),
    }
}

/// A size in bytes with three digits and a decimal unit, as Docker prints it.
fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut units = ["B", "kB", "MB", "GB", "TB", "PB"].iter();
    let mut unit = units.next().unwrap_or(&"B");
    while value >= 1000.0
        && let Some(next) = units.next()
    {
        value /= 1000.0;
        unit = next;
    }
    let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    let text = format!("{value:.decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

#[cfg(test)]
mod tests {
    use super::{age, size};

    #[test]
    fn sizes_are_dockers() {
        let sizes: Vec<_> = [0, 999, 7_800_000, 117_300_000, 1_240_000_000].into_iter().map(size).collect();
        assert_eq!(sizes, ["0B", "999B", "7.8MB", "117MB", "1.24GB"]);
    }

    #[test]
    fn ages_are_dockers() {
        let ages: Vec<_> =
            [0, 59, 61, 7200, 86_400 * 3, 86_400 * 21, 86_400 * 100, 86_400 * 800].into_iter().map(age).collect();
        let expected = [
            "Less than a second",
            "59 seconds",
            "About a minute",
            "2 hours",
            "3 days",
            "3 weeks",
            "3 months",
            "2 years",
        ];
        assert_eq!(ages, expected);
    }
}
