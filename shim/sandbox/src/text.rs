//! Text that a guest or a VMM which a guest has taken over may have chosen: made fit for a terminal and a log.

use vmm_api::control::{Exit, ExitReason};

/// Longest text that is passed on, in characters.
const MAX_TEXT: usize = 4096;
/// Longest tail of a console.
const MAX_TAIL: usize = 64 << 10;

/// One line without control characters.
pub(crate) fn escape(text: &str) -> String {
    clean_up(text, MAX_TEXT, |_| false)
}

/// The same for each text in the end of a VM; the console keeps its lines.
pub(crate) fn clean(exit: Exit) -> Exit {
    let reason = match exit.reason {
        ExitReason::TripleFault { registers } => ExitReason::TripleFault { registers: escape(&registers) },
        ExitReason::KvmError { detail } => ExitReason::KvmError { detail: escape(&detail) },
        ExitReason::VmmError { detail } => ExitReason::VmmError { detail: escape(&detail) },
        other => other,
    };
    Exit { reason, console_tail: clean_up(&exit.console_tail, MAX_TAIL, |c| c == '\n') }
}

fn clean_up(text: &str, most: usize, keeps: impl Fn(char) -> bool) -> String {
    text.chars().take(most).map(|c| if c.is_control() && !keeps(c) { '.' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use vmm_api::control::{Exit, ExitReason};

    use super::{clean, escape};

    #[test]
    fn guest_text_cannot_drive_a_terminal() {
        assert_eq!(escape("a\x1b[31mb\nc"), "a.[31mb.c");
        let reason = ExitReason::VmmError { detail: "\x07".to_owned() };
        let cleaned = clean(Exit { reason, console_tail: "one\r\ntwo".to_owned() });
        let reason = ExitReason::VmmError { detail: ".".to_owned() };
        assert_eq!(cleaned, Exit { reason, console_tail: "one.\ntwo".to_owned() });
    }

    #[test]
    fn guest_text_is_cut() {
        assert_eq!(escape(&"x".repeat(10_000)).len(), 4096);
    }
}
