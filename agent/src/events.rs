//! What happened, in its order, until the host asks: exits, and kills by the OOM killer. The queue is bounded; what does not
//! fit is counted.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::message::{Empty, Event, EventsReply, WaitReply, event::What};
use tokio::sync::Notify;

/// Most events kept.
const MAX_EVENTS: usize = 1024;
/// Most events in one answer; each is well under 300 bytes.
const MAX_ANSWERED: usize = 128;

/// The queue of events.
#[derive(Clone, Default)]
pub(crate) struct Events(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    pushed: Notify,
}

#[derive(Default)]
struct Queue {
    // events.len() <= MAX_EVENTS
    events: VecDeque<Event>,
    lost_count: u64,
}

impl Events {
    pub(crate) fn exited(&self, container_id: &str, exec_id: &str, exit: WaitReply) {
        self.push(container_id, exec_id, What::Exit(exit));
    }

    /// The OOM killer killed a process of the container.
    pub(crate) fn oom(&self, container_id: &str) {
        self.push(container_id, "", What::Oom(Empty::new()));
    }

    fn push(&self, container_id: &str, exec_id: &str, what: What) {
        let mut queue = self.queue();
        if queue.events.len() == MAX_EVENTS {
            queue.events.pop_front();
            queue.lost_count += 1;
        }
        queue.events.push_back(Event {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            what: Some(what),
            ..Default::default()
        });
        drop(queue);
        self.0.pushed.notify_one();
    }

    /// Waits until there are events, and takes them.
    pub(crate) async fn next(&self) -> EventsReply {
        loop {
            let pushed = self.0.pushed.notified();
            if let Some(reply) = self.take() {
                return reply;
            }
            pushed.await;
        }
    }

    fn take(&self) -> Option<EventsReply> {
        let mut queue = self.queue();
        if queue.events.is_empty() {
            return None;
        }
        let count = queue.events.len().min(MAX_ANSWERED);
        let events = queue.events.drain(..count).collect();
        let lost = std::mem::take(&mut queue.lost_count);
        Some(EventsReply { events, lost, ..Default::default() })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn events_come_once_and_in_their_order() {
        let events = Events::default();
        events.oom("a");
        events.exited("a", "e", WaitReply { exit_code: 137, ..Default::default() });
        let reply = events.next().await;
        assert!(matches!(reply.events[0].what, Some(What::Oom(_))));
        assert!(matches!(&reply.events[1].what, Some(What::Exit(exit)) if exit.exit_code == 137));
        assert_eq!(events.take(), None);
    }

    #[test]
    fn oldest_events_are_dropped_and_counted() {
        let events = Events::default();
        (0..MAX_EVENTS + 3).for_each(|number| events.oom(&number.to_string()));
        let reply = events.take().expect("events");
        assert_eq!((reply.lost, reply.events.len()), (3, MAX_ANSWERED));
        assert_eq!(reply.events[0].container_id, "3");
    }
}
