//! What a VMM writes to its standard error. Who has taken a VMM over chooses the words: they reach a terminal and a log without control
//! characters, and only so many of them.

use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader, copy, sink};

use crate::text;

/// Lines that are passed on. A VMM that works says nothing, and few things that a guest can bring about are worth a line.
const MAX_LINES: usize = 100;
/// Bytes in all of them.
const MAX_BYTES: u64 = 16 << 10;

/// Passes line by line on to `say` until the VMM has ended. What is too much is read and dropped, for a VMM that waits for its reader
/// would serve nobody.
pub(crate) async fn relay(words: impl AsyncRead + Unpin, mut say: impl FnMut(String)) {
    let mut words = BufReader::new(words.take(MAX_BYTES));
    let mut line = Vec::new();
    for _ in 0..MAX_LINES {
        line.clear();
        match words.read_until(b'\n', &mut line).await {
            Ok(1..) => say(text::escape(String::from_utf8_lossy(&line).trim_end())),
            Ok(0) | Err(_) => break,
        }
    }
    let waiting = words.buffer().len() as u64;
    let dropped = waiting + copy(words.get_mut().get_mut(), &mut sink()).await.unwrap_or_default();
    if dropped > 0 {
        say(format!("{dropped} bytes more were dropped"));
    }
}

#[cfg(test)]
mod tests {
    use super::relay;

    async fn relayed(words: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        relay(words, |line| lines.push(line)).await;
        lines
    }

    #[tokio::test]
    async fn lines_come_one_by_one_and_drive_no_terminal() {
        assert_eq!(relayed(b"").await, [""; 0]);
        assert_eq!(relayed(b"one\n\x1b[2Jtwo\r\n\xff").await, ["one", ".[2Jtwo", "\u{fffd}"]);
    }

    #[tokio::test]
    async fn more_than_a_log_takes_is_counted_and_dropped() {
        let lines = relayed(&b"x\n".repeat(10_000)).await;
        assert_eq!((lines.len(), lines[100].as_str()), (101, "19800 bytes more were dropped"));
        let lines = relayed(&[b'x'; 1 << 20]).await;
        assert_eq!((lines[0].len(), lines[1].as_str()), (4096, "1032192 bytes more were dropped"));
    }
}
