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

/// What `libcontainer` puts before the text of its innermost process.
const WRAPPING: &str = "exec process failed with error error in executing process : ";

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

    /// `text`, with what the log knows beyond it.
    pub(super) fn explain(self, text: &str) -> String {
        let logged = self.0.map(File::from).and_then(|mut file| {
            let mut logged = String::new();
            file.rewind().ok()?;
            file.take(MAX_LOG).read_to_string(&mut logged).ok()?;
            Some(logged)
        });
        explain(text, logged.as_deref().unwrap_or_default())
    }
}

/// The first line says what failed; the first field of any line says with which error of the kernel.
fn explain(text: &str, logged: &str) -> String {
    let text = text.replace(WRAPPING, "");
    let mut lines = logged.lines().filter(|line| !line.starts_with(REPETITION));
    let first = lines.clone().next().unwrap_or_default();
    let field = lines.find_map(|line| line.find(" [").map(|at| &line[at..])).unwrap_or_default();
    let message = first.split(" [").next().unwrap_or_default();
    let message = if text.contains(message) { String::new() } else { format!(": {message}") };
    format!("{text}{message}{field}")
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

#[cfg(test)]
mod tests {
    use super::explain;

    #[test]
    fn cause_is_what_failed_and_the_error_of_the_kernel() {
        let text = "failed to create container: exec process failed with error error in executing process : failed to prepare rootfs";
        let logged = "failed to mount /m: syscall\nfailed to prepare rootfs [err: Nix(ENODEV)]\nfailed to initialize container process: x\n";
        assert_eq!(
            explain(text, logged),
            "failed to create container: failed to prepare rootfs: failed to mount /m: syscall [err: Nix(ENODEV)]"
        );
        assert_eq!(explain("cause", "failed to initialize container process: x [y: z]"), "cause");
        assert_eq!(explain("cause", ""), "cause");
    }
}
