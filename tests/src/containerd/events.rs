//! The events of containerd while a story goes on, as its clients receive them.

use std::collections::HashMap;
use std::time::Duration;

use containerd_client::events::{TaskExit, TaskOom};
use containerd_client::services::v1::{Namespace, SubscribeRequest, UpdateNamespaceRequest};
use containerd_client::tonic::{Request, Status, Streaming};
use containerd_client::types::Envelope;
use prost::Message;
use tokio::time::{sleep, timeout};

use super::client::Client;

/// Longest wait for an event.
const DEADLINE: Duration = Duration::from_secs(60);

/// One event of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its topic, as `/tasks/exit`.
    pub topic: String,
    body: Vec<u8>,
}

impl Event {
    /// The container that it is about: in every event of a task the first field, in this one the only.
    fn container_id(&self) -> String {
        self.decode::<TaskOom>().container_id
    }

    /// The exit status that an event of `/tasks/exit` tells.
    ///
    /// # Panics
    /// When it is another event.
    #[must_use]
    pub fn exit_status(&self) -> u32 {
        assert_eq!(self.topic, "/tasks/exit");
        self.decode::<TaskExit>().exit_status
    }

    fn decode<T: Message + Default>(&self) -> T {
        T::decode(self.body.as_slice()).expect("an event of a task")
    }
}

/// A subscription.
pub struct Events {
    stream: Streaming<Envelope>,
    seen: Vec<Event>,
}

impl Events {
    /// Subscribes, and waits until events are heard.
    ///
    /// # Errors
    /// What containerd says.
    pub async fn subscribe(client: &Client) -> Result<Self, Status> {
        let filters = vec![format!("namespace=={}", client.namespace)];
        let mut events = client.events();
        // containerd answers with the first event that the subscription hears.
        let mut subscribed = std::pin::pin!(events.subscribe(SubscribeRequest { filters }));
        let mut number = 0;
        loop {
            tokio::select! {
                answer = &mut subscribed => return Ok(Self { stream: answer?.into_inner(), seen: Vec::new() }),
                () = sleep(Duration::from_millis(200)) => number += 1,
            }
            client.label(number).await?;
        }
    }

    /// Waits until a container's task had an event; returns the topics of all of its events so far.
    ///
    /// # Panics
    /// When it does not come.
    pub async fn until(&mut self, id: &str, topic: &str) -> Vec<Event> {
        while !self.of(id).iter().any(|event| event.topic == topic) {
            let next = timeout(DEADLINE, self.stream.message()).await;
            let next = next.unwrap_or_else(|_| panic!("no {topic} of {id}, but {:?}", self.topics(id)));
            let envelope = next.expect("the subscription goes on").expect("containerd runs");
            self.seen.extend(task_event(envelope));
        }
        self.of(id)
    }

    /// The topics of a container's events so far.
    #[must_use]
    pub fn topics(&self, id: &str) -> Vec<String> {
        self.of(id).into_iter().map(|event| event.topic).collect()
    }

    fn of(&self, id: &str) -> Vec<Event> {
        self.seen.iter().filter(|event| event.container_id() == id).cloned().collect()
    }
}

impl Client {
    async fn label(&self, number: u32) -> Result<(), Status> {
        let labels = HashMap::from([("heard".to_owned(), number.to_string())]);
        let namespace = Namespace { name: self.namespace.clone(), labels };
        let mut request = Request::new(UpdateNamespaceRequest { namespace: Some(namespace), update_mask: None });
        request.metadata_mut().insert("containerd-namespace", self.namespace.parse().expect("ASCII"));
        self.namespaces().update(request).await.map(drop)
    }
}

fn task_event(envelope: Envelope) -> Option<Event> {
    let topic = envelope.topic;
    topic.starts_with("/tasks/").then(|| Event { topic, body: envelope.event.unwrap_or_default().value })
}
