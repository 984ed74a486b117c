//! Connections to ports that the guest's processes listen at, without a network of the VM.

use std::time::Duration;

use agent_api::message::ForwardRequest;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_blocking;

use crate::follow::done;
use crate::network::{NetworkError, loopback};
use crate::stream_call::StreamCall;
use crate::{CallError, Sandbox};

/// Connections at once to ports of a pod's loopback interface; more wait.
const MAX_CONNECTIONS: usize = 256;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Stands for the VM itself, whose network its containers share.
const VM: &str = "";

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

    /// Connects whoever connects to a TCP port of loopback in the network's namespace to that port of the guest's, until the VM
    /// ends; at once when there is no namespace.
    pub async fn serve_loopback(&self) {
        let Some(namespace) = self.network.lock().await.pod.as_ref().map(|pod| pod.namespace.clone()) else { return };
        let served = async {
            let taken = done(spawn_blocking(move || loopback::listen(&namespace)).await)?;
            let listener = TcpListener::from_std(taken.listener).map_err(NetworkError::host("listen"))?;
            self.accept(&listener).await;
            Ok::<(), NetworkError>(())
        };
        if let Err(error) = served.await {
            tracing::warn!(error = &error as &dyn std::error::Error, "ports of the pod are not forwarded");
        }
    }

    async fn accept(&self, listener: &TcpListener) {
        let mut connections = FuturesUnordered::new();
        let ended = self.ended();
        tokio::pin!(ended);
        loop {
            tokio::select! {
                _ = &mut ended => return,
                accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok((client, _)) => connections.push(self.carry(client)),
                    // It is tried again when descriptors or memory are free.
                    Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                },
                Some(()) = connections.next() => {}
            }
        }
    }

    async fn carry(&self, mut client: TcpStream) {
        let carried = async {
            let port = client.local_addr().map_or(0, |address| address.port());
            self.forward(VM, port).await?.carry(&mut client).await
        };
        if let Err(error) = carried.await {
            tracing::debug!(%error, "a connection of the loopback interface is closed");
            // As near to a refusal as it can be now.
            let _ = client.set_zero_linger();
        }
    }
}
