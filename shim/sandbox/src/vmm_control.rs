//! Requests to the VMM over its control socket: one at a time, each with a deadline.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Mutex, mpsc};
use vmm_api::control::{MAX_REQUEST_LEN, Reply, Request};
use vmm_api::fds;

use crate::ControlError;
use crate::text::escape;

/// Longest wait for an answer: a pause waits 2 s for the vCPUs.
const REPLY_DEADLINE: Duration = Duration::from_secs(5);

/// The writing half of the control socket, and the answers that its reader passes on.
pub(crate) struct VmmControl {
    socket: OwnedWriteHalf,
    answers: Mutex<Answers>,
}

struct Answers {
    replies: mpsc::Receiver<Reply>,
    /// Answers that have yet to come. All but that to the last request belong to nobody: whoever asked has given up.
    owed: usize,
}

impl VmmControl {
    pub(crate) fn new(socket: OwnedWriteHalf, replies: mpsc::Receiver<Reply>) -> Self {
        Self { socket, answers: Mutex::new(Answers { replies, owed: 0 }) }
    }

    /// Sends a request that is not waited for. A VMM that has ended already does not read it.
    pub(crate) async fn tell(&self, request: &Request) {
        let Ok(line) = line(request) else { return };
        let mut answers = self.answers.lock().await;
        if self.send(&line, &[]).await.is_ok() {
            answers.owed += 1;
        }
    }

    /// Sends a request, with the descriptors that it needs, and waits for its answer.
    pub(crate) async fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, ControlError> {
        let line = line(request)?;
        let mut answers = self.answers.lock().await;
        self.send(&line, fds).await.map_err(ControlError::Gone)?;
        // Who asks may be gone before the answer.
        answers.owed += 1;
        match tokio::time::timeout(REPLY_DEADLINE, answers.next()).await {
            Ok(Some(Reply::Refused(message))) => Err(ControlError::Refused { message: escape(&message) }),
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(ControlError::Gone(io::ErrorKind::UnexpectedEof.into())),
            Err(_) => Err(ControlError::Deadline { deadline_ms: REPLY_DEADLINE.as_millis() }),
        }
    }

    async fn send(&self, line: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let socket = self.socket.as_ref();
        // A line is far shorter than the socket's buffer, so it is sent as a whole or not at all.
        socket.async_io(Interest::WRITABLE, || fds::send(socket.as_fd(), line, fds)).await
    }
}

/// A request as the VMM reads it. One with very many addresses does not fit.
fn line(request: &Request) -> Result<Vec<u8>, ControlError> {
    let refused = |message: String| ControlError::Refused { message };
    let mut line = serde_json::to_vec(request).map_err(|error| refused(error.to_string()))?;
    line.push(b'\n');
    if line.len() > MAX_REQUEST_LEN {
        return Err(refused(format!("a request of {} bytes: {MAX_REQUEST_LEN} are the most", line.len())));
    }
    Ok(line)
}

impl Answers {
    /// The answer to the request that was sent last. Safe to drop: answers are counted as they arrive.
    async fn next(&mut self) -> Option<Reply> {
        loop {
            let reply = self.replies.recv().await?;
            self.owed -= 1;
            if self.owed == 0 {
                return Some(reply);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt as _, BufReader};
    use tokio::net::UnixStream;
    use tokio::sync::mpsc;
    use vmm_api::control::{Reply, Request, State};

    use super::VmmControl;
    use crate::ControlError;

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_is_not_taken_for_the_next_one() {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let (_messages, requests) = ours.into_split();
        let (answer, replies) = mpsc::channel(4);
        let control = VmmControl::new(requests, replies);
        let silent = control.ask(&Request::Pause, &[]).await.expect_err("no answer");
        assert!(matches!(silent, ControlError::Deadline { .. }), "{silent:?}");
        answer.send(Reply::Done).await.expect("the late answer");
        answer.send(Reply::State(State::Running)).await.expect("the answer");
        let state = control.ask(&Request::State, &[]).await.expect("answered");
        assert_eq!(state, Reply::State(State::Running));
        let mut lines = BufReader::new(theirs).lines();
        let first = lines.next_line().await.expect("readable").expect("a line");
        assert_eq!(first, r#"{"request":"pause"}"#);
    }
}
