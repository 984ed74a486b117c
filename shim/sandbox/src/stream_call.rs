//! A call to the agent with a byte stream beside it.

use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use crate::agent_client::AgentClient;
use crate::{CallError, Sandbox};

/// A call that runs; the agent answers it when it is through with the stream.
pub struct StreamCall {
    /// Read and write here; shutting down the writing side is its end.
    pub stream: UnixStream,
    call: &'static str,
    done: JoinHandle<Result<(), CallError>>,
}

impl StreamCall {
    /// Carries bytes both ways until both sides have ended theirs, or the agent says that it cannot.
    ///
    /// # Errors
    /// What the agent says, or that it no longer answers.
    pub async fn carry(mut self, peer: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Result<(), CallError> {
        {
            let copied = copy_bidirectional(&mut self.stream, peer);
            tokio::pin!(copied);
            tokio::select! {
                // A side that breaks is an end like others: the other one sees it.
                _ = &mut copied => {}
                answer = &mut self.done => {
                    joined(self.call, answer)?;
                    // The last bytes of the guest.
                    let _ = copied.await;
                    return Ok(());
                }
            }
        }
        self.done().await
    }

    /// Waits for the agent's answer.
    ///
    /// # Errors
    /// What the agent says, or that it no longer answers.
    pub async fn done(self) -> Result<(), CallError> {
        drop(self.stream);
        joined(self.call, self.done.await)
    }
}

impl Sandbox {
    /// Makes a call with a stream of this id, which the agent dials first.
    pub(crate) async fn stream_call<F>(
        &self,
        call: &'static str,
        answer: impl FnOnce(AgentClient, u64) -> F,
    ) -> Result<StreamCall, CallError>
    where
        F: Future<Output = Result<(), CallError>> + Send + 'static,
    {
        let mut expected = self.streams.expect_one();
        let mut done = tokio::spawn(answer(self.agent.clone(), expected.id()));
        tokio::select! {
            biased;
            Some(stream) = expected.connected() => Ok(StreamCall { stream, call, done }),
            answer = &mut done => {
                joined(call, answer)?;
                Err(CallError::StreamMissing { stream: "a stream", deadline_ms: 0 })
            }
        }
    }
}

fn joined(call: &'static str, answer: Result<Result<(), CallError>, tokio::task::JoinError>) -> Result<(), CallError> {
    answer.unwrap_or_else(|error| Err(CallError::Broken { call, detail: error.to_string() }))
}
