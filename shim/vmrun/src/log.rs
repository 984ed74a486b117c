//! The log of a container, in the format of Docker's json-file driver: one JSON object per line of output, so that standard
//! output and standard error stay apart, each with the time at which it came.
//!
//! ```text
//!   {"log":"a line\n","stream":"stdout","time":"2026-01-31T12:00:00.123456789Z"}
//! ```
//! The owner of the container writes; readers open the files themselves, so none of them can hold the owner up. A log that is
//! full becomes `log.json.1`, and so on; the oldest is dropped.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use anyhow::{Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::cli::parse_bytes;

/// Longest piece of a line in one entry, in bytes, as with Docker. A longer line is several entries; only the last one ends
/// with a newline.
const MAX_ENTRY_LEN: usize = 16 << 10;

/// One line of output, or a piece of one.
#[derive(Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Entry {
    /// What was written; bytes that are not UTF-8 are replaced.
    pub(crate) log: String,
    /// Where it was written to.
    pub(crate) stream: Stream,
    /// When it came; RFC 3339 with nanoseconds, so that the order of texts is the order of times.
    pub(crate) time: String,
}

/// An output of the container.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// Which log a container has.
#[derive(Args, Debug)]
pub(crate) struct LogArgs {
    /// Where output is kept for `logs`: json-file or none.
    #[arg(long, value_name = "DRIVER", default_value = "json-file", value_parser = ["json-file", "none"])]
    log_driver: String,
    /// Limit of the log: max-size=SIZE or max-file=COUNT.
    #[arg(long, value_name = "NAME=VALUE")]
    log_opt: Vec<String>,
}

impl LogArgs {
    /// What the log keeps, if there is one.
    pub(crate) fn limits(&self) -> Result<Option<Limits>> {
        let mut limits = Limits::default();
        for option in &self.log_opt {
            match option.split_once('=') {
                Some(("max-size", size)) => limits.max_size = parse_bytes(size).map_err(anyhow::Error::msg)?,
                Some(("max-file", count)) if count.parse().is_ok_and(|count: u32| count > 0) => {
                    limits.max_file = count.parse()?;
                }
                _ => bail!("--log-opt {option:?} is not max-size=SIZE or max-file=COUNT"),
            }
        }
        Ok((self.log_driver == "json-file").then_some(limits))
    }
}

/// How much a log keeps.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Limits {
    /// Size at which a file is full, in bytes.
    pub(crate) max_size: u64,
    /// Most files, the current one included.
    pub(crate) max_file: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_size: 16 << 20, max_file: 2 }
    }
}

/// The current file of a log; `index` counts back from the current one.
pub(crate) fn file_path(dir: &Path, index: u32) -> PathBuf {
    if index == 0 { dir.join("log.json") } else { dir.join(format!("log.json.{index}")) }
}

/// A log that is written.
#[derive(Debug)]
pub(crate) struct Log {
    dir: PathBuf,
    file: File,
    len: u64,
    limits: Limits,
    /// The disk refused a write; the container goes on without its log.
    failed: bool,
}

impl Log {
    /// Begins the log of a new container.
    pub(crate) fn create(dir: &Path, limits: Limits) -> io::Result<Arc<Mutex<Self>>> {
        let file = create_file(dir)?;
        Ok(Arc::new(Mutex::new(Self { dir: dir.to_owned(), file, len: 0, limits, failed: false })))
    }

    /// Each entry ends with a newline; none is cut.
    fn append(&mut self, mut entries: &[u8]) {
        while !self.failed && !entries.is_empty() {
            let first = entries.iter().position(|byte| *byte == b'\n').map_or(entries.len(), |at| at + 1);
            let appended = self.make_room(first as u64).and_then(|()| {
                let room = usize::try_from(self.limits.max_size.saturating_sub(self.len)).unwrap_or(usize::MAX);
                let fitting = entries[..room.min(entries.len())].iter().rposition(|byte| *byte == b'\n');
                let (now, later) = entries.split_at(fitting.map_or(first, |at| at + 1));
                entries = later;
                self.len += now.len() as u64;
                self.file.write_all(now)
            });
            if let Err(error) = appended {
                tracing::warn!(%error, dir = %self.dir.display(), "the log is not written any more");
                self.failed = true;
            }
        }
    }

    fn make_room(&mut self, wanted: u64) -> io::Result<()> {
        if self.len == 0 || self.len + wanted <= self.limits.max_size {
            return Ok(());
        }
        for index in (1..self.limits.max_file).rev() {
            let renamed = fs::rename(file_path(&self.dir, index - 1), file_path(&self.dir, index));
            if renamed.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::NotFound) {
                return renamed;
            }
        }
        if self.limits.max_file <= 1 {
            fs::remove_file(file_path(&self.dir, 0))?;
        }
        self.file = create_file(&self.dir)?;
        self.len = 0;
        Ok(())
    }
}

fn create_file(dir: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    File::options().append(true).create_new(true).mode(0o600).open(file_path(dir, 0))
}

/// One output of the container on its way to the log.
pub(crate) struct LogStream {
    log: Arc<Mutex<Log>>,
    stream: Stream,
    pending: Vec<u8>,
}

impl LogStream {
    pub(crate) fn new(log: Arc<Mutex<Log>>, stream: Stream) -> Self {
        Self { log, stream, pending: Vec::new() }
    }

    /// Takes what was read; whole lines go to the log at once.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
        let time = timestamp(SystemTime::now());
        let (mut entries, mut rest) = (Vec::new(), self.pending.as_slice());
        while let Some(len) = entry_len(rest) {
            self.encode(&rest[..len], &time, &mut entries);
            rest = &rest[len..];
        }
        let taken = self.pending.len() - rest.len();
        self.pending.drain(..taken);
        self.append(&entries);
    }

    fn encode(&self, bytes: &[u8], time: &str, entries: &mut Vec<u8>) {
        let log = String::from_utf8_lossy(bytes).into_owned();
        let entry = Entry { log, stream: self.stream, time: time.to_owned() };
        serde_json::to_writer(&mut *entries, &entry).expect("an entry is text, and a vector takes it");
        entries.push(b'\n');
    }

    fn append(&self, entries: &[u8]) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).append(entries);
    }
}

impl Drop for LogStream {
    /// The last line need not end with a newline.
    fn drop(&mut self) {
        if !self.pending.is_empty() {
            let mut entries = Vec::new();
            self.encode(&self.pending, &timestamp(SystemTime::now()), &mut entries);
            self.append(&entries);
        }
    }
}

/// Length of the next entry, if there is a whole one: a line, or as much of a long one as fits, whole characters only.
fn entry_len(bytes: &[u8]) -> Option<usize> {
    let newline = bytes.iter().take(MAX_ENTRY_LEN).position(|byte| *byte == b'\n');
    if let Some(at) = newline {
        return Some(at + 1);
    }
    if bytes.len() < MAX_ENTRY_LEN {
        return None;
    }
    let is_start = |at: &usize| bytes[*at] & 0b1100_0000 != 0b1000_0000;
    // A character has at most four bytes; what has no start there is not text.
    (MAX_ENTRY_LEN - 4..MAX_ENTRY_LEN).rev().find(is_start).or(Some(MAX_ENTRY_LEN))
}

/// RFC 3339 in UTC with nanoseconds.
pub(crate) fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_nanos(time).to_string()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::{Entry, Limits, Log, LogStream, MAX_ENTRY_LEN, Stream, file_path};

    fn entries(dir: &std::path::Path, index: u32) -> Vec<Entry> {
        let text = fs::read_to_string(file_path(dir, index)).expect("log");
        text.lines().map(|line| serde_json::from_str(line).expect("entry")).collect()
    }

    #[test]
    fn lines_are_entries_and_the_last_needs_no_newline() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = Log::create(dir.path(), Limits::default()).expect("log");
        let mut out = LogStream::new(log.clone(), Stream::Stdout);
        let mut err = LogStream::new(log, Stream::Stderr);
        out.write(b"one\ntw");
        err.write(b"bad\n");
        out.write(b"o\nthree");
        drop((out, err));
        let found: Vec<_> = entries(dir.path(), 0).into_iter().map(|e| (e.log, e.stream)).collect();
        let expected = [
            ("one\n", Stream::Stdout),
            ("bad\n", Stream::Stderr),
            ("two\n", Stream::Stdout),
            ("three", Stream::Stdout),
        ];
        assert_eq!(found, expected.map(|(text, stream)| (text.to_owned(), stream)));
    }

    #[test]
    fn a_full_log_is_rotated_and_the_oldest_is_dropped() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = Log::create(dir.path(), Limits { max_size: 100, max_file: 2 }).expect("log");
        let mut out = LogStream::new(log, Stream::Stdout);
        out.write(b"first\n");
        out.write(b"second\n");
        out.write(b"third\n");
        assert_eq!(entries(dir.path(), 0)[0].log, "third\n");
        assert_eq!(entries(dir.path(), 1)[0].log, "second\n");
        assert!(!file_path(dir.path(), 2).exists());
    }

    #[test]
    fn what_is_written_at_once_is_rotated_too() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = Log::create(dir.path(), Limits { max_size: 1000, max_file: 3 }).expect("log");
        let mut out = LogStream::new(log, Stream::Stdout);
        let line = |number: u32| format!("line {number:03}\n");
        out.write((0..200).map(line).collect::<String>().as_bytes());
        let kept: Vec<String> =
            (0..3).rev().flat_map(|index| entries(dir.path(), index)).map(|entry| entry.log).collect();
        assert!(kept.len() > 20, "{}", kept.len());
        assert_eq!(kept, (200 - u32::try_from(kept.len()).expect("few")..200).map(line).collect::<Vec<_>>());
        for index in 0..3 {
            assert!(fs::metadata(file_path(dir.path(), index)).expect("a file").len() <= 1000, "{index}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_lost_however_it_is_cut(
            text in "[a\u{e9}\u{20ac}\u{1f600}]{0,9000}\n?", sizes in prop::collection::vec(1_usize..20_000, 1..20)
        ) {
            let dir = tempfile::tempdir().expect("temporary directory");
            let log = Log::create(dir.path(), Limits::default()).expect("log");
            let mut out = LogStream::new(log, Stream::Stdout);
            let mut rest = text.as_bytes();
            for size in sizes.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (chunk, later) = rest.split_at(rest.len().min(*size));
                out.write(chunk);
                rest = later;
            }
            drop(out);
            let found = entries(dir.path(), 0);
            prop_assert!(found.iter().all(|entry| entry.log.len() <= MAX_ENTRY_LEN));
            prop_assert_eq!(found.into_iter().map(|entry| entry.log).collect::<String>(), text);
        }
    }
}
