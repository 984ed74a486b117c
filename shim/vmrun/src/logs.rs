//! `vmrun logs`: prints the log of a container, and goes on with what comes.
//!
//! The files are read as they are; to follow them, inotify tells when there is more, and the owner's control socket tells
//! when the container has ended. The owner never waits for a reader.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use sandbox::state;

use crate::cli::{LogsArgs, Tail, parse_duration};
use crate::client::Client;
use crate::control::Request;
use crate::log::{Entry, Stream, file_path, timestamp};

pub(crate) fn logs(root: &Path, args: &LogsArgs) -> Result<u8> {
    let state = state::read(root, &args.name)?;
    let since = args.since.as_deref().map(parse_since).transpose()?;
    // Watched before the first look, so that nothing falls between the two.
    let following = if args.follow { follow(root, &args.name, &state.data_dir)? } else { None };
    let Some(mut cursor) = Cursor::open(&state.data_dir)? else {
        bail!("container {} keeps no log: it was run with --log-driver none, or has not started", args.name);
    };
    let mut printer = Printer { timestamps: args.timestamps, since, line_begins: true };
    match args.tail {
        Tail::All => cursor.read(|entry| printer.print(&entry))?,
        Tail::Last(count) => {
            let mut last = LastLines::new(count);
            cursor.read(|entry| {
                last.push(entry);
                Ok(())
            })?;
            last.entries.iter().try_for_each(|entry| printer.print(entry))?;
        }
    }
    if let Some((changes, owner)) = following {
        while wait_for_change(&changes, &owner)? {
            cursor.read(|entry| printer.print(&entry))?;
        }
        // What came before the end and after the last look.
        cursor.read(|entry| printer.print(&entry))?;
    }
    Ok(0)
}

/// What tells that there is more, and what tells that there will be no more; nothing for a container that has ended.
fn follow(root: &Path, name: &str, data_dir: &Path) -> Result<Option<(OwnedFd, Client)>> {
    let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    let wanted = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE;
    inotify::add_watch(&changes, data_dir, wanted).with_context(|| format!("cannot watch {}", data_dir.display()))?;
    let Ok(mut owner) = Client::connect(root, name) else { return Ok(None) };
    owner.send(&Request::Wait)?;
    Ok(Some((changes, owner)))
}

/// Waits until there is more (true), or the container has ended (false).
fn wait_for_change(changes: &OwnedFd, owner: &Client) -> Result<bool> {
    let mut polled = [PollFd::new(changes, PollFlags::IN), PollFd::from_borrowed_fd(owner.as_fd(), PollFlags::IN)];
    match poll(&mut polled, None) {
        Err(rustix::io::Errno::INTR) => return Ok(true),
        other => other?,
    };
    let ended = !polled[1].revents().is_empty();
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(changes, &mut buffer);
    // Which file has changed does not matter: the cursor finds out.
    while reader.next().is_ok() {}
    Ok(!ended)
}

/// A place in a log that is written and rotated meanwhile.
struct Cursor {
    dir: PathBuf,
    file: BufReader<File>,
    inode: u64,
    /// The beginning of an entry whose end is not written yet.
    partial: Vec<u8>,
}

impl Cursor {
    /// Begins at the oldest entry.
    fn open(dir: &Path) -> io::Result<Option<Self>> {
        let files = files(dir);
        let Some((_, path)) = files.last() else { return Ok(None) };
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        Ok(Some(Self { dir: dir.to_owned(), file: BufReader::new(file), inode, partial: Vec::new() }))
    }

    /// Reads every entry that is there.
    fn read(&mut self, mut take: impl FnMut(Entry) -> Result<()>) -> Result<()> {
        loop {
            // Looked for first: once there is a newer file, nothing is added to ours.
            let newer = self.newer();
            while self.file.read_until(b'\n', &mut self.partial)? > 0 && self.partial.ends_with(b"\n") {
                let entry = serde_json::from_slice(&self.partial).context("the log is damaged")?;
                self.partial.clear();
                take(entry)?;
            }
            let Some(file) = newer else { return Ok(()) };
            self.inode = file.metadata()?.ino();
            self.file = BufReader::new(file);
            self.partial.clear();
        }
    }

    /// The file after ours; the oldest when ours has been dropped.
    fn newer(&self) -> Option<File> {
        let files = files(&self.dir);
        let ours = files.iter().position(|(inode, _)| *inode == self.inode).unwrap_or(files.len());
        let file = File::open(&files.get(ours.checked_sub(1)?)?.1).ok()?;
        // A rotation may have come between the two looks.
        file.metadata().is_ok_and(|metadata| metadata.ino() != self.inode).then_some(file)
    }
}

/// Inodes and paths of a log's files, the current one first.
fn files(dir: &Path) -> Vec<(u64, PathBuf)> {
    let paths = (0..).map(|index| file_path(dir, index));
    let found = paths.map_while(|path| Some((path.symlink_metadata().ok()?.ino(), path)));
    found.collect()
}

/// The last lines, however many entries they are.
struct LastLines {
    entries: VecDeque<Entry>,
    line_count: usize,
    wanted: usize,
}

impl LastLines {
    fn new(wanted: usize) -> Self {
        Self { entries: VecDeque::new(), line_count: 0, wanted }
    }

    fn push(&mut self, entry: Entry) {
        let begins = self.entries.back().is_none_or(|last| last.log.ends_with('\n'));
        self.line_count += usize::from(begins);
        self.entries.push_back(entry);
        while self.line_count > self.wanted {
            while self.entries.pop_front().is_some_and(|dropped| !dropped.log.ends_with('\n')) {}
            self.line_count -= 1;
        }
    }
}

struct Printer {
    timestamps: bool,
    since: Option<String>,
    line_begins: bool,
}

impl Printer {
    fn print(&mut self, entry: &Entry) -> Result<()> {
        if self.since.as_ref().is_some_and(|since| entry.time < *since) {
            return Ok(());
        }
        let time = if self.timestamps && self.line_begins { format!("{} ", entry.time) } else { String::new() };
        self.line_begins = entry.log.ends_with('\n');
        match entry.stream {
            Stream::Stdout => write_all(io::stdout().lock(), &time, &entry.log),
            Stream::Stderr => write_all(io::stderr().lock(), &time, &entry.log),
        }
    }
}

fn write_all(mut output: impl Write, time: &str, text: &str) -> Result<()> {
    output.write_all(time.as_bytes())?;
    output.write_all(text.as_bytes())?;
    Ok(output.flush()?)
}

/// A time, or how long ago it was, in the form of [`Entry::time`].
fn parse_since(text: &str) -> Result<String> {
    if let Ok(time) = humantime::parse_rfc3339_weak(text) {
        return Ok(timestamp(time));
    }
    let ago = parse_duration(text);
    let since = ago.ok().and_then(|ago| SystemTime::now().checked_sub(ago));
    since.map(timestamp).with_context(|| {
        format!("--since {text:?} is neither a time nor a duration; write for example 2026-01-31T12:00:00Z or 10m")
    })
}

#[cfg(test)]
mod tests {
    use super::{Cursor, LastLines, parse_since};
    use crate::log::{Entry, Limits, Log, LogStream, Stream};

    fn read(cursor: &mut Cursor) -> Vec<String> {
        let mut found = Vec::new();
        let taken = cursor.read(|entry| {
            found.push(entry.log);
            Ok(())
        });
        taken.expect("entries");
        found
    }

    #[test]
    fn a_cursor_follows_a_log_through_its_rotation() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = Log::create(dir.path(), Limits { max_size: 150, max_file: 3 }).expect("log");
        let mut out = LogStream::new(log, Stream::Stdout);
        out.write(b"1\n2\n");
        let mut cursor = Cursor::open(dir.path()).expect("open").expect("a log");
        assert_eq!(read(&mut cursor), ["1\n", "2\n"]);
        out.write(b"3\n");
        out.write(b"4\n");
        out.write(b"5\n");
        assert_eq!(read(&mut cursor), ["3\n", "4\n", "5\n"]);
        assert!(read(&mut cursor).is_empty());
    }

    #[test]
    fn a_reader_that_was_left_behind_goes_on_with_the_oldest() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = Log::create(dir.path(), Limits { max_size: 10, max_file: 2 }).expect("log");
        let mut out = LogStream::new(log, Stream::Stdout);
        out.write(b"1\n");
        let mut cursor = Cursor::open(dir.path()).expect("open").expect("a log");
        for line in ["2\n", "3\n", "4\n"] {
            out.write(line.as_bytes());
        }
        assert_eq!(read(&mut cursor), ["1\n", "3\n", "4\n"]);
    }

    #[test]
    fn the_last_lines_are_whole() {
        let mut last = LastLines::new(2);
        for text in ["a\n", "b", "b\n", "c\n"] {
            last.push(Entry { log: text.to_owned(), stream: Stream::Stdout, time: String::new() });
        }
        let kept: Vec<_> = last.entries.iter().map(|entry| entry.log.as_str()).collect();
        assert_eq!(kept, ["b", "b\n", "c\n"]);
    }

    #[test]
    fn since_is_a_time_or_a_duration() {
        assert_eq!(parse_since("2026-01-31T12:00:00Z").expect("time"), "2026-01-31T12:00:00.000000000Z");
        assert!(parse_since("10m").is_ok());
        assert!(parse_since("yesterday").is_err());
    }
}
