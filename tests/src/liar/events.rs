//! Events, by which containerd's shim learns how a command ended, and the lies about them.

use agent_api::message::{ContainerRequest, Event, EventsReply, event::What};
use protobuf::Message as _;

use super::wire::{Connection, Request};
use super::{ESCAPES, Lie, MANY, Scene, Streams};

/// Lies about events.
#[derive(Clone, Copy, Debug)]
pub enum Wrong {
    /// Ends of containers that do not exist.
    OfStrangers,
    /// The same end again, and another one.
    Twice,
    /// Others that were lost, more than can be.
    Lost,
    /// The end before the start.
    Early,
}

const WRONG: [(&str, Wrong); 4] = [
    ("events-of-strangers", Wrong::OfStrangers),
    ("events-twice", Wrong::Twice),
    ("events-lost", Wrong::Lost),
    ("events-early", Wrong::Early),
];

/// The lies about events.
pub(super) fn all() -> impl Iterator<Item = (String, Scene, Lie)> {
    WRONG.into_iter().map(|(name, wrong)| (name.to_owned(), Scene::Run, Lie::Events(wrong)))
}

/// What the shim has asked and what it is to be told.
#[derive(Default)]
pub(super) struct Events {
    asked: Option<u32>,
    due: Option<EventsReply>,
}

impl Events {
    /// Tells the end of a command once it has been started and the shim asks.
    pub(super) fn follow(&mut self, request: &Request, connection: &Connection, streams: &Streams, lie: Lie) {
        let ends_with = if matches!(lie, Lie::Events(Wrong::Early)) { "CreateContainer" } else { "StartContainer" };
        match request.method.as_str() {
            "NextEvents" => self.asked = Some(request.stream_id),
            method if method == ends_with => {
                lie.speak(streams);
                // Both messages begin with the container's id.
                let started = ContainerRequest::parse_from_bytes(&request.payload).unwrap_or_default();
                self.due = Some(reply(&started.container_id, lie));
            }
            _ => {}
        }
        if self.asked.is_some() && self.due.is_some() {
            let (asked, due) = (self.asked.take().unwrap_or_default(), self.due.take().unwrap_or_default());
            connection.respond(asked, &due.write_to_bytes().expect("encoded"));
        }
    }
}

fn reply(container_id: &str, lie: Lie) -> EventsReply {
    let exit = |id: String| Event { container_id: id, what: Some(What::Exit(lie.exit())), ..Default::default() };
    let mut events = vec![exit(container_id.to_owned())];
    let mut lost = 0;
    match lie {
        Lie::Events(Wrong::OfStrangers) => {
            let strangers = (0..MANY).map(|number| exit(format!("../{ESCAPES}{number}")));
            events.splice(0..0, strangers);
        }
        Lie::Events(Wrong::Twice) => {
            let mut other = lie.exit();
            other.exit_code = 9;
            let other = Event { what: Some(What::Exit(other)), ..events[0].clone() };
            events.extend([events[0].clone(), other]);
        }
        Lie::Events(Wrong::Lost) => lost = u64::MAX,
        _ => {}
    }
    EventsReply { events, lost, ..Default::default() }
}
