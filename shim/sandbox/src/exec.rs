//! A process in a running container from its start to its exit, by one call to the agent.

use agent_api::message::{ExecRequest, WaitReply};
use oci_spec::runtime::Process;
use tokio::task::{JoinError, JoinHandle};

use crate::agent_client::CALL_DEADLINE;
use crate::streams::Expected;
use crate::{CallError, ProcessId, ProcessStreams, Sandbox, WantedStreams};

/// An exec whose streams are here. The agent forgets it when it exits.
pub struct RunningExec {
    /// Its streams.
    pub streams: ProcessStreams,
    exit: JoinHandle<Result<WaitReply, CallError>>,
}

impl RunningExec {
    /// Its streams, and a wait for its exit.
    pub fn into_parts(self) -> (ProcessStreams, impl Future<Output = Result<WaitReply, CallError>>) {
        (self.streams, async { joined(self.exit.await) })
    }
}

impl Sandbox {
    /// Runs another process in a running container, which has at least one stream. The agent dials its streams before it starts it, so
    /// [`CallError::Refused`] may also come in place of its exit.
    ///
    /// # Errors
    /// What the agent says, or that it no longer answers.
    pub async fn run_exec(
        &self,
        id: &ProcessId,
        process: &Process,
        wanted: WantedStreams,
    ) -> Result<RunningExec, CallError> {
        let expected = self.streams.expect(wanted);
        let request = request(id, process, &expected)?;
        let agent = self.agent.clone();
        let mut exit = tokio::spawn(async move { agent.run_exec(&request).await });
        let streams = expected.streams(CALL_DEADLINE);
        tokio::pin!(streams);
        let streams = tokio::select! {
            biased;
            streams = &mut streams => streams,
            exited = &mut exit => {
                let exited = joined(exited)?;
                // It was quicker than the last of its streams.
                exit = tokio::spawn(async { Ok(exited) });
                streams.await
            }
        };
        let streams = streams.inspect_err(|_| exit.abort())?;
        Ok(RunningExec { streams, exit })
    }
}

/// What the agent is asked to start.
pub(crate) fn request(id: &ProcessId, process: &Process, expected: &Expected) -> Result<ExecRequest, CallError> {
    Ok(ExecRequest {
        container_id: id.container_id.clone(),
        exec_id: id.exec_id.clone(),
        process: serde_json::to_vec(process).map_err(CallError::Encode)?,
        stdio: Some(expected.stdio.clone()).into(),
        ..Default::default()
    })
}

fn joined(answer: Result<Result<WaitReply, CallError>, JoinError>) -> Result<WaitReply, CallError> {
    let lost = |error: JoinError| CallError::Broken { call: "RunExec", detail: error.to_string() };
    answer.unwrap_or_else(|error| Err(lost(error)))
}
