//! Connections of the host to a port of a container: a step that enters its network, and a stream that carries the bytes.

use agent_api::message::ForwardRequest;

use crate::container::{ContainerError, Containers};
use crate::{step, streams};

impl Containers {
    pub(crate) async fn forward(&self, request: &ForwardRequest) -> Result<(), ContainerError> {
        let pid = match request.container_id.as_str() {
            // The step is in the network of the VM from its start.
            "" => "self".to_owned(),
            id => self.init_to_enter(id, "forward a port of")?,
        };
        let stream = streams::dial_for_step(request.stream).await.map_err(ContainerError::io("dial a stream"))?;
        step::run(self.reaper(), &["forward", &pid, &request.port.to_string()], vec![stream]).await.map(drop)
    }
}
