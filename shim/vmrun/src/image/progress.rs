//! Progress bars on standard error, when that is a terminal.

use std::fmt::Display;
use std::io::IsTerminal as _;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// All bars of one command.
pub(crate) struct Progress(Option<MultiProgress>);

impl Progress {
    /// No bars when `quiet`, or when nobody looks.
    pub(crate) fn new(quiet: bool) -> Self {
        Self((!quiet && std::io::stderr().is_terminal()).then(MultiProgress::new))
    }

    /// A bar for `len` bytes of something, which vanishes when it is dropped.
    pub(super) fn bar(&self, what: &str, name: impl Display, len: u64) -> Bar {
        let Some(bars) = &self.0 else { return Bar(None) };
        let short: String = name.to_string().chars().skip("sha256:".len()).take(12).collect();
        let bar = bars.add(ProgressBar::new(len));
        if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:40} {bytes}/{total_bytes} {bytes_per_sec}") {
            bar.set_style(style);
        }
        bar.set_prefix(format!("{short}: {what:<11}"));
        Bar(Some(bar))
    }
}

/// One bar.
pub(super) struct Bar(Option<ProgressBar>);

impl Bar {
    pub(super) fn advance(&self, count: u64) {
        if let Some(bar) = &self.0 {
            bar.inc(count);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
