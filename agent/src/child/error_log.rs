//! What `libcontainer` logs as errors. Its processes send only the outermost text of an error to their parent, and the cause
//! to the log; this puts the two together again.

use std::fmt::{Debug, Write as _};
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{MemfdFlags, memfd_create};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Longest log, in bytes.
const MAX_LOG: u64 = 2048;

/// Begins the last line of a process that fails, which repeats what it sends to its parent.
const REPETITION: &str = "failed to initialize container process";

/// Errors logged by this process and by those that it clones, which share the file.
pub(super) struct ErrorLog(Option<OwnedFd>);

impl ErrorLog {
    /// Collects from now on; without a file there is only the outermost text.
    pub(super) fn install() -> Self {
        let file = memfd_create("errors", MemfdFlags::CLOEXEC).ok();
        if let Some(ours) = file.as_ref().and_then(|file| file.try_clone().ok()) {
            // It is the first of this process.
            let _ = tracing::subscriber::set_global_default(Collector(ours));
        }
        Self(file)
    }

    /// `text`, with the first logged error that adds something to it.
    pub(super) fn explain(self, text: &str) -> String {
        let logged = self.0.map(File::from).and_then(|mut file| {
            let mut logged = String::new();
            file.rewind().ok()?;
            file.take(MAX_LOG).read_to_string(&mut logged).ok()?;
            Some(logged)
        });
        let mut lines = logged.as_deref().unwrap_or_default().lines();
        match lines.find(|line| !line.starts_with(REPETITION)) {
            Some(cause) if !text.contains(cause) => format!("{text}: {cause}"),
            _ => text.to_owned(),
        }
    }
}

struct Collector(OwnedFd);

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR && !metadata.is_span()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let text = format!("{}{}\n", line.message, line.fields).replace("\n\n", "\n");
        if let Ok(file) = self.0.as_fd().try_clone_to_owned() {
            // A lost line costs an explanation, not a container.
            let _ = File::from(file).write_all(text.as_bytes());
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// One event: its message, then its fields in brackets.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " [{name}: {value:?}]"),
        };
    }
}
