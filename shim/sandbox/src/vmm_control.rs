//! Requests to the VMM over its control socket: one at a time, each with a deadline.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Mutex, mpsc};
use vmm_api::control::{Reply, Request};
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
    /// Requests whose deadline passed: their answers, which may still come, belong to nobody.
    given_up: usize,
}

impl VmmControl {
    pub(crate) fn new(socket: OwnedWriteHalf, replies: mpsc::Receiver<Reply>) -> Self {
        Self { socket, answers: Mutex::new(Answers { replies, given_up: 0 }) }
    }

    /// Sends a request that is not waited for. A VMM that has ended already does not read it.
    pub(crate) async fn tell(&self, request: &Request) {
        let mut answers = self.answers.lock().await;
        if self.send(request, None).await.is_ok() {
            answers.given_up += 1;
        }
    }

    /// Sends a request, with the descriptor that it needs, and waits for its answer.
    pub(crate) async fn ask(&self, request: &Request, fd: Option<BorrowedFd<'_>>) -> Result<Reply, ControlError> {
        let mut answers = self.answers.lock().await;
        self.send(request, fd).await.map_err(ControlError::Gone)?;
        match tokio::time::timeout(REPLY_DEADLINE, answers.next()).await {
            Ok(Some(Reply::Refused(message))) => Err(ControlError::Refused { message: escape(&message) }),
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(ControlError::Gone(io::ErrorKind::UnexpectedEof.into())),
            Err(_) => {
                answers.given_up += 1;
                Err(ControlError::Deadline { deadline_ms: REPLY_DEADLINE.as_millis() })
            }
        }
    }

    async fn send(&self, request: &Request, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        let socket = self.socket.as_ref();
        // A line is far shorter than the socket's buffer, so it is sent as a whole or not at all.
        socket.async_io(Interest::WRITABLE, || fds::send(socket.as_fd(), &line, fd.as_slice())).await
    }
}

impl Answers {
    /// The answer to the request that was sent last. Safe to drop: what was given up is counted as it arrives.
    async fn next(&mut self) -> Option<Reply> {
        while self.given_up > 0 {
            self.replies.recv().await?;
            self.given_up -= 1;
        }
        self.replies.recv().await
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
        let silent = control.ask(&Request::Pause, None).await.expect_err("no answer");
        assert!(matches!(silent, ControlError::Deadline { .. }), "{silent:?}");
        answer.send(Reply::Done).await.expect("the late answer");
        answer.send(Reply::State(State::Running)).await.expect("the answer");
        let state = control.ask(&Request::State, None).await.expect("answered");
        assert_eq!(state, Reply::State(State::Running));
        let mut lines = BufReader::new(theirs).lines();
        let first = lines.next_line().await.expect("readable").expect("a line");
        assert_eq!(first, r#"{"request":"pause"}"#);
    }
}
