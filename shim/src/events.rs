//! Events for containerd: kept in their order and sent one at a time, again and again while containerd is away.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::sync::{Notify, watch};
use ttrpc::context;

/// Most events that wait. A pod makes a few for each process, so that this is a containerd that is away for long.
const MAX_WAITING: usize = 8192;
/// Longest wait for one answer.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);
/// Between two attempts: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What containerd calls an event.
pub(crate) trait TaskEvent: Message {
    const TOPIC: &'static str;
    const TYPE_NAME: &'static str;
}

macro_rules! task_events {
    ($($event:ty => $topic:expr, $name:literal;)*) => {
        $(impl TaskEvent for $event {
            const TOPIC: &'static str = $topic;
            const TYPE_NAME: &'static str = concat!("containerd.events.", $name);
        })*
    };
}

task_events! {
    TaskCreate => topics::TASK_CREATE_EVENT_TOPIC, "TaskCreate";
    TaskStart => topics::TASK_START_EVENT_TOPIC, "TaskStart";
    TaskExecAdded => topics::TASK_EXEC_ADDED_EVENT_TOPIC, "TaskExecAdded";
    TaskExecStarted => topics::TASK_EXEC_STARTED_EVENT_TOPIC, "TaskExecStarted";
    TaskPaused => topics::TASK_PAUSED_EVENT_TOPIC, "TaskPaused";
    TaskResumed => topics::TASK_RESUMED_EVENT_TOPIC, "TaskResumed";
    TaskOOM => topics::TASK_OOM_EVENT_TOPIC, "TaskOOM";
    TaskExit => topics::TASK_EXIT_EVENT_TOPIC, "TaskExit";
    TaskDelete => topics::TASK_DELETE_EVENT_TOPIC, "TaskDelete";
}

/// Events that wait to be sent.
#[derive(Clone)]
pub(crate) struct EventQueue(Arc<Shared>);

struct Shared {
    namespace: String,
    // waiting.len() <= MAX_WAITING
    waiting: Mutex<VecDeque<Envelope>>,
    pushed: Notify,
    is_empty: watch::Sender<bool>,
}

impl EventQueue {
    /// A queue that nothing empties yet.
    pub(crate) fn new(namespace: &str) -> Self {
        Self(Arc::new(Shared {
            namespace: namespace.to_owned(),
            waiting: Mutex::default(),
            pushed: Notify::new(),
            is_empty: watch::Sender::new(true),
        }))
    }

    /// Puts an event behind all others. Never waits.
    pub(crate) fn push<E: TaskEvent>(&self, event: &E) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return tracing::error!(%error, topic = E::TOPIC, "an event cannot be encoded"),
        };
        let any = Any { type_url: E::TYPE_NAME.to_owned(), value, ..Default::default() };
        let envelope = Envelope {
            timestamp: Some(SystemTime::now().into()).into(),
            namespace: self.0.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: Some(any).into(),
            ..Default::default()
        };
        let mut waiting = self.waiting();
        if waiting.len() == MAX_WAITING {
            waiting.pop_front();
            tracing::error!("containerd is away for too long: the oldest event is dropped");
        }
        waiting.push_back(envelope);
        self.0.is_empty.send_replace(false);
        drop(waiting);
        self.0.pushed.notify_one();
    }

    /// Sends events to the ttrpc socket for as long as the process lives.
    pub(crate) async fn forward_to(self, address: String) {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.forward_all(&address).await {
                Ok(()) => pause = FIRST_PAUSE,
                Err(error) => {
                    tracing::debug!(%error, "containerd does not take events");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Sends on one connection until that breaks.
    async fn forward_all(&self, address: &str) -> ttrpc::Result<()> {
        let client = EventsClient::new(Client::connect(&socket_address(address)).await?);
        loop {
            let envelope = self.front().await;
            let request = ForwardRequest { envelope: Some(envelope).into(), ..Default::default() };
            let sent = client.forward(context::with_duration(FORWARD_DEADLINE), &request).await;
            match sent {
                // It was understood and refused; to repeat it would stop all that come after.
                Err(ttrpc::Error::RpcStatus(status)) if !is_absent(&status) => {
                    tracing::error!(status = status.message, "containerd refused an event");
                }
                sent => drop(sent?),
            }
            self.pop();
        }
    }

    async fn front(&self) -> Envelope {
        loop {
            let pushed = self.0.pushed.notified();
            if let Some(envelope) = self.waiting().front() {
                return envelope.clone();
            }
            pushed.await;
        }
    }

    fn pop(&self) {
        let mut waiting = self.waiting();
        waiting.pop_front();
        self.0.is_empty.send_replace(waiting.is_empty());
    }

    /// Waits until every event was sent.
    pub(crate) async fn flushed(&self) {
        // The sender is ours.
        let _ = self.0.is_empty.subscribe().wait_for(|is_empty| *is_empty).await;
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Topics in their order.
    #[cfg(test)]
    pub(crate) fn topics(&self) -> Vec<String> {
        self.waiting().iter().map(|envelope| envelope.topic.clone()).collect()
    }
}

fn is_absent(status: &ttrpc::Status) -> bool {
    let code = status.code.enum_value_or_default();
    matches!(code, ttrpc::Code::UNAVAILABLE | ttrpc::Code::DEADLINE_EXCEEDED | ttrpc::Code::CANCELLED)
}

/// containerd gives a path, or an address with its scheme.
fn socket_address(address: &str) -> String {
    if address.contains("://") { address.to_owned() } else { format!("unix://{address}") }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::events::task::{TaskExit, TaskStart};
    use containerd_shim_protos::shim::events::ForwardRequest;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::EventQueue;

    #[derive(Default)]
    struct Daemon(Mutex<Vec<String>>);

    #[async_trait]
    impl Events for Daemon {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0.lock().expect("lock").push(request.envelope.topic.clone());
            Ok(Empty::new())
        }
    }

    async fn daemon(address: &str) -> (Server, Arc<Daemon>) {
        let daemon = Arc::new(Daemon::default());
        let services: HashMap<_, _> = create_events(daemon.clone());
        let mut server = Server::new().bind(address).expect("bound").register_service(services);
        server.start().await.expect("started");
        (server, daemon)
    }

    #[tokio::test]
    async fn events_wait_for_a_daemon_and_keep_their_order() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("ttrpc.sock").display().to_string();
        let queue = EventQueue::new("default");
        let sender = tokio::spawn(queue.clone().forward_to(path.clone()));
        queue.push(&TaskStart::new());
        queue.push(&TaskExit::new());
        let (mut server, first) = daemon(&format!("unix://{path}")).await;
        queue.flushed().await;
        assert_eq!(*first.0.lock().expect("lock"), ["/tasks/start", "/tasks/exit"]);
        server.shutdown().await.expect("stopped");
        std::fs::remove_file(&path).expect("the socket");
        queue.push(&TaskExit::new());
        let (_server, second) = daemon(&format!("unix://{path}")).await;
        queue.flushed().await;
        assert_eq!(*second.0.lock().expect("lock"), ["/tasks/exit"]);
        sender.abort();
    }
}
