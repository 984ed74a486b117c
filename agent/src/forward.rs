//! Connections of the host to a port of a container: a step that enters its network, and a stream that carries the bytes.

use agent_api::message::ForwardRequest;

use crate::container::{ContainerError, Containers};
use crate::{step, streams};

impl Containers {
    pub(crate) async fn forward(&self, request: &ForwardRequest) -> Result<(), ContainerError> {
        let pid = self.init_to_enter(&request.container_id, "forward a port of")?;
        let stream = streams::dial_for_step(request.stream).await.map_err(ContainerError::io("dial a stream"))?;
        step::run(self.reaper(), &["forward", &pid, &request.port.to_string()], vec![stream]).await.map(drop)
    }
}
