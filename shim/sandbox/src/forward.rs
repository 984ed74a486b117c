//! Connections to ports that a container's processes listen at, without a network of the VM.

use agent_api::message::ForwardRequest;

use crate::stream_call::StreamCall;
use crate::{CallError, Sandbox};

impl Sandbox {
    /// Begins a connection to a TCP port of a container's loopback interface.
    ///
    /// # Errors
    /// What the agent says, or that it no longer answers; that nothing listens there is told by [`StreamCall::done`].
    pub async fn forward(&self, container_id: &str, port: u16) -> Result<StreamCall, CallError> {
        let mut request =
            ForwardRequest { container_id: container_id.to_owned(), port: port.into(), ..Default::default() };
        self.stream_call("Forward", |agent, stream| async move {
            request.stream = stream;
            agent.forward(&request).await
        })
        .await
    }
}
