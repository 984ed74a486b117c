//! The lies, by what is lied about.

use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;

use agent_api::message;
use protobuf::EnumOrUnknown;
use ttrpc::proto::{Code, MESSAGE_TYPE_RESPONSE};
use vmm_api::control::{Exit, ExitReason, Message, Reply};
use vmm_api::net::NetStats;

use super::archive::{ARCHIVES, Archive, entry};
use super::wire::{self, Connection, Request};
use super::{OUTPUT, Ports, Streams, end, say};

/// What the host does while it is lied to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Scene {
    /// `vmrun run --rm`.
    Run,
    /// `vmrun run -d`, then this command with the container's name for `NAME`.
    Detached(&'static [&'static str]),
}

/// One lie.
#[derive(Clone, Copy, Debug)]
pub enum Lie {
    /// About the answer to this method.
    Answer(&'static str, Wrong),
    /// Of the VMM.
    Vmm(Vmm),
    /// About how a command ended.
    Exit(u32, i64),
    /// About the streams of a process.
    Stream(Stream),
    /// About events, to the shim alone.
    Events(super::events::Wrong),
    /// About what a container uses.
    Stats(Stats),
    /// About what is at a path.
    Path(i32),
    /// About a container's files.
    Archive(Archive),
}

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug)]
pub enum Wrong {
    /// Bytes that are no message.
    Garbage,
    /// A message that ends too soon.
    Cut,
    /// A status that does not exist.
    UnknownStatus,
    /// A text that drives terminals.
    Escapes,
    /// A text of 3 MiB.
    LongText,
    /// A frame that says 4 GiB.
    EndlessFrame,
    /// A frame of 5 MiB, above the limit of the protocol.
    LargeFrame,
    /// An answer to a question that nobody asked.
    OtherStream,
    /// A stream id that a host never uses.
    StreamZero,
    /// A frame that is a request.
    RequestFrame,
    /// A frame of a type that does not exist.
    UnknownFrame,
    /// The answer twice.
    Twice,
    /// Ten thousand answers to other questions first.
    Flood,
    /// Half a header, then the end.
    HalfHeader,
    /// Bytes that are no frame.
    NoFrame,
    /// The end.
    Close,
    /// None at all.
    Silence,
}

const WRONG: [(&str, Wrong); 17] = [
    ("garbage", Wrong::Garbage),
    ("cut", Wrong::Cut),
    ("unknown-status", Wrong::UnknownStatus),
    ("escapes", Wrong::Escapes),
    ("long-text", Wrong::LongText),
    ("endless-frame", Wrong::EndlessFrame),
    ("large-frame", Wrong::LargeFrame),
    ("other-stream", Wrong::OtherStream),
    ("stream-zero", Wrong::StreamZero),
    ("request-frame", Wrong::RequestFrame),
    ("unknown-frame", Wrong::UnknownFrame),
    ("twice", Wrong::Twice),
    ("flood", Wrong::Flood),
    ("half-header", Wrong::HalfHeader),
    ("no-frame", Wrong::NoFrame),
    ("close", Wrong::Close),
    ("silence", Wrong::Silence),
];

/// Methods that `vmrun run` calls.
const OF_RUN: [&str; 4] = ["Configure", "CreateContainer", "StartContainer", "Wait"];
/// Methods that other commands call.
const OF_DETACHED: [(&str, &[&str]); 6] = [
    ("RunExec", &["exec", "NAME", "true"]),
    ("Exec", &["exec", "--detach", "NAME", "true"]),
    ("Stats", &["stats", "--no-stream", "NAME"]),
    ("StatPath", &["cp", "NAME:/file", "copied"]),
    ("Pause", &["pause", "NAME"]),
    ("Signal", &["kill", "--signal", "USR1", "NAME"]),
];
const COPY: Scene = Scene::Detached(&["cp", "NAME:/file", "copied"]);
const STATS: Scene = Scene::Detached(&["stats", "--no-stream", "--json", "NAME"]);

/// Lies of a VMM.
#[derive(Clone, Copy, Debug)]
pub enum Vmm {
    /// A line without an end.
    EndlessLine,
    /// Lines that are no message.
    Garbage,
    /// Thousands of answers that nobody asked for.
    ManyReplies,
    /// A reason that drives terminals.
    EscapedReason,
    /// A console that drives terminals.
    EscapedConsole,
    /// A reason of 8 MiB.
    LongReason,
    /// A signal that is none.
    WildSignal,
    /// Two ends.
    EndsTwice,
    /// The end without a word.
    Silent,
    /// No agent ever, and a refusal of everything.
    Refuses,
    /// Hundreds of agents.
    ManyAgents,
    /// A connection without a descriptor.
    NoDescriptor,
    /// Sixteen descriptors at once.
    ManyDescriptors,
    /// Words on standard error that drive terminals.
    EscapedWords,
    /// Words on standard error, without an end.
    EndlessWords,
}

const VMM: [(&str, Vmm); 15] = [
    ("vmm-endless-line", Vmm::EndlessLine),
    ("vmm-garbage", Vmm::Garbage),
    ("vmm-many-replies", Vmm::ManyReplies),
    ("vmm-escaped-reason", Vmm::EscapedReason),
    ("vmm-escaped-console", Vmm::EscapedConsole),
    ("vmm-long-reason", Vmm::LongReason),
    ("vmm-wild-signal", Vmm::WildSignal),
    ("vmm-ends-twice", Vmm::EndsTwice),
    ("vmm-silent-end", Vmm::Silent),
    ("vmm-refuses", Vmm::Refuses),
    ("vmm-many-agents", Vmm::ManyAgents),
    ("vmm-no-descriptor", Vmm::NoDescriptor),
    ("vmm-many-descriptors", Vmm::ManyDescriptors),
    ("vmm-escaped-words", Vmm::EscapedWords),
    ("vmm-endless-words", Vmm::EndlessWords),
];

/// Lies about streams.
#[derive(Clone, Copy, Debug)]
pub enum Stream {
    /// Never dialled.
    Missing,
    /// Dialled by an id that nobody expects.
    WrongId,
    /// Dialled by an id of another one.
    OthersId,
    /// Dialled three times.
    Again,
    /// Thousands that nobody expects.
    Flood,
    /// Hundreds that never say their id.
    Mute,
    /// Output that drives terminals: the user's own business.
    Escapes,
    /// 32 MiB of output.
    Long,
    /// No end of the output after the exit.
    NoEnd,
}

const STREAMS: [(&str, Stream); 9] = [
    ("stream-missing", Stream::Missing),
    ("stream-wrong-id", Stream::WrongId),
    ("stream-others-id", Stream::OthersId),
    ("stream-again", Stream::Again),
    ("stream-flood", Stream::Flood),
    ("stream-mute", Stream::Mute),
    ("stream-escapes", Stream::Escapes),
    ("stream-long", Stream::Long),
    ("stream-no-end", Stream::NoEnd),
];

/// Lies about usage.
#[derive(Clone, Copy, Debug)]
pub enum Stats {
    /// The largest numbers.
    Largest,
    /// Ten thousand names that drive terminals.
    ManyNames,
}

/// A text that clears a screen, sets a title and begins a line of its own.
pub(super) const ESCAPES: &str = "\x1b[2J\x1b]0;title\x07\r\nvmrun: a line of its own\n";
/// More than any table should hold.
pub(super) const MANY: u32 = 3000;

/// All lies with their names and scenes.
#[must_use]
pub fn all() -> Vec<(String, Scene, Lie)> {
    let mut lies = Vec::new();
    for (name, wrong) in WRONG {
        for method in OF_RUN {
            lies.push((format!("{method}-{name}"), Scene::Run, Lie::Answer(method, wrong)));
        }
        for (method, command) in OF_DETACHED {
            lies.push((format!("{method}-{name}"), Scene::Detached(command), Lie::Answer(method, wrong)));
        }
    }
    for (name, code, at) in [
        ("exit-largest", u32::MAX, i64::MAX),
        ("exit-256", 256, 0),
        ("exit-before-time", 0, i64::MIN),
        ("exit-255", 255, -1),
    ] {
        lies.push((name.to_owned(), Scene::Run, Lie::Exit(code, at)));
    }
    lies.extend(VMM.map(|(name, vmm)| (name.to_owned(), Scene::Run, Lie::Vmm(vmm))));
    lies.extend(STREAMS.map(|(name, stream)| (name.to_owned(), Scene::Run, Lie::Stream(stream))));
    lies.push(("stats-largest".to_owned(), STATS, Lie::Stats(Stats::Largest)));
    lies.push(("stats-many-names".to_owned(), STATS, Lie::Stats(Stats::ManyNames)));
    for (name, kind) in [("path-unknown-kind", 77), ("path-negative-kind", -1), ("path-nothing", 0)] {
        lies.push((name.to_owned(), COPY, Lie::Path(kind)));
    }
    lies.extend(ARCHIVES.map(|(name, archive)| (name.to_owned(), COPY, Lie::Archive(archive))));
    lies
}

impl Lie {
    /// Answers a request by a lie; false to have it answered honestly.
    pub(super) fn instead(self, request: &Request, connection: &Connection) -> bool {
        match self {
            Self::Answer(method, wrong) if method == request.method => wrong.answer(request.stream_id, connection),
            _ => false,
        }
    }

    /// What a VMM does before its agent dials.
    pub(super) fn at_boot(self, control: &UnixStream, ports: &Ports) {
        if let Self::Vmm(vmm) = self {
            vmm.boot(control, ports);
        }
    }

    /// What a VMM does when it is asked for something.
    pub(super) fn on_request(self, control: &UnixStream) {
        if let Self::Vmm(Vmm::Refuses) = self {
            say(control, &Message::Reply(Reply::Refused(ESCAPES.repeat(1000))));
        }
    }

    /// How a command ends.
    pub(super) fn exit(self) -> message::WaitReply {
        let (exit_code, exited_at_ns) = if let Self::Exit(code, at) = self { (code, at) } else { (0, 0) };
        message::WaitReply { exit_code, exited_at_ns, ..Default::default() }
    }

    /// What a command prints before it ends.
    pub(super) fn speak(self, streams: &Streams) {
        let mut open = streams.lock().expect("no panic");
        // The second of three is standard output.
        let mut ids: Vec<u64> = open.keys().copied().collect();
        ids.sort_unstable();
        if let Some(stdout) = ids.iter().rev().nth(1).and_then(|id| open.get_mut(id)) {
            let _ = match self {
                Self::Stream(Stream::Long) => (0..32).try_for_each(|_| stdout.write_all(&vec![b'x'; 1 << 20])),
                Self::Stream(Stream::Escapes) => stdout.write_all(ESCAPES.as_bytes()),
                _ => stdout.write_all(OUTPUT.as_bytes()),
            };
        }
        if !matches!(self, Self::Stream(Stream::NoEnd)) {
            open.clear();
        }
    }

    /// What comes before a stream.
    pub(super) fn before_stream(self, ports: &Ports, id: u64) {
        let Self::Stream(stream) = self else { return };
        match stream {
            Stream::Again => drop([ports.stream(id), ports.stream(id)]),
            Stream::Flood => (0..u64::from(MANY)).for_each(|number| drop(ports.stream(1_000_000 + number))),
            Stream::Mute => {
                let mute: Vec<_> = (0..500).map(|_| Ports::dial(&ports.streams)).collect();
                // They stay open until the process ends.
                std::mem::forget(mute);
            }
            _ => {}
        }
    }

    /// By which id a stream is dialled.
    pub(super) fn stream_id(self, id: u64) -> Option<u64> {
        match self {
            Self::Stream(Stream::Missing) => None,
            Self::Stream(Stream::WrongId) => Some(u64::MAX - id),
            Self::Stream(Stream::OthersId) => Some(1),
            _ => Some(id),
        }
    }

    /// What is at a path.
    pub(super) fn path_kind(self) -> message::PathStat {
        let kind = if let Self::Path(kind) = self { kind } else { 2 };
        message::PathStat { kind: EnumOrUnknown::from_i32(kind), ..Default::default() }
    }

    /// What a container uses.
    pub(super) fn stats(self) -> message::StatsReply {
        let mut stats = message::StatsReply { memory_current: 1 << 20, memory_max: 1 << 30, ..Default::default() };
        match self {
            Self::Stats(Stats::Largest) => {
                let most = u64::MAX;
                stats.cpu_usage_us = most;
                (stats.memory_current, stats.memory_max, stats.memory_peak) = (most, 0, most);
                (stats.pids_current, stats.pids_max) = (most, most);
                (stats.io_read_bytes, stats.io_write_bytes) = (most, most);
                stats.memory_stat.insert("inactive_file".to_owned(), most);
            }
            Self::Stats(Stats::ManyNames) => {
                stats.memory_stat = (0..10_000).map(|number| (format!("{ESCAPES}{number}"), number)).collect();
            }
            _ => {}
        }
        stats
    }

    /// What the VMM counts of its interfaces.
    pub(super) fn network_stats(self) -> Vec<NetStats> {
        let Self::Stats(Stats::Largest) = self else { return vec![NetStats::default()] };
        let most = NetStats { name: ESCAPES.to_owned(), rx_bytes: u64::MAX, tx_bytes: u64::MAX, ..Default::default() };
        vec![most; 2]
    }

    /// A container's file as an archive.
    pub(super) fn archive(self, mut stream: UnixStream) {
        let bytes =
            if let Self::Archive(archive) = self { archive.bytes() } else { entry("file", b'0', "", 6, b"honest") };
        let _ = stream.write_all(&bytes);
    }
}

impl Wrong {
    fn answer(self, id: u32, connection: &Connection) -> bool {
        let honest = wire::response(Code::OK.into(), "", &[]);
        match self {
            Self::Garbage => connection.frame(id, MESSAGE_TYPE_RESPONSE, &[0xff; 64]),
            Self::Cut => connection.respond(id, &[0x0a, 0x7f, 1]),
            Self::UnknownStatus => connection.refuse(id, EnumOrUnknown::from_i32(999), "no such status"),
            Self::Escapes => connection.refuse(id, Code::INTERNAL.into(), ESCAPES),
            Self::LongText => connection.refuse(id, Code::INTERNAL.into(), &"x".repeat(3 << 20)),
            Self::EndlessFrame => connection.raw(&wire::header(u32::MAX, id, MESSAGE_TYPE_RESPONSE)),
            Self::LargeFrame => connection.frame(id, MESSAGE_TYPE_RESPONSE, &vec![0; 5 << 20]),
            Self::OtherStream => connection.frame(id.wrapping_add(2), MESSAGE_TYPE_RESPONSE, &honest),
            Self::StreamZero => connection.frame(0, MESSAGE_TYPE_RESPONSE, &honest),
            Self::RequestFrame => connection.frame(id, 1, &honest),
            Self::UnknownFrame => connection.frame(id, 0xee, &honest),
            Self::Twice => {
                connection.frame(id, MESSAGE_TYPE_RESPONSE, &honest);
                connection.frame(id, MESSAGE_TYPE_RESPONSE, &honest);
            }
            Self::Flood => {
                for number in 0..10_000 {
                    connection.frame(id.wrapping_add(2 + 2 * number), MESSAGE_TYPE_RESPONSE, &honest);
                }
                return false;
            }
            Self::HalfHeader => {
                connection.raw(&[0; 5]);
                connection.close();
            }
            Self::NoFrame => connection.raw(&[0xff; 4096]),
            Self::Close => connection.close(),
            Self::Silence => {}
        }
        true
    }
}

impl Vmm {
    fn boot(self, control: &UnixStream, ports: &Ports) {
        let mut out = control;
        match self {
            Self::EndlessLine => while out.write_all(&[b'x'; 1 << 16]).is_ok() {},
            Self::Garbage => drop(out.write_all(b"{}\n[[[[\n\xff\xfe\n{\"reply\":\"none\"}\n\n")),
            Self::ManyReplies => (0..MANY).for_each(|_| say(control, &Message::Reply(Reply::Done))),
            Self::EscapedReason => end(control, ExitReason::VmmError { detail: ESCAPES.to_owned() }),
            Self::EscapedConsole => {
                say(
                    control,
                    &Message::Exited(Exit { reason: ExitReason::GuestReset, console_tail: ESCAPES.repeat(100) }),
                );
                std::process::exit(0);
            }
            Self::LongReason => end(control, ExitReason::KvmError { detail: "x".repeat(8 << 20) }),
            Self::WildSignal => end(control, ExitReason::Signal { signal: i32::MAX }),
            Self::EndsTwice => {
                say(control, &Message::Exited(Exit { reason: ExitReason::Requested, console_tail: String::new() }));
                end(control, ExitReason::OwnerGone);
            }
            Self::Silent => std::process::exit(0),
            Self::Refuses => {}
            Self::ManyAgents => std::mem::forget((0..300).map(|_| Ports::dial(&ports.agent)).collect::<Vec<_>>()),
            Self::NoDescriptor => drop(vmm_api::fds::send(std::os::fd::AsFd::as_fd(&ports.agent), &[1, 0, 0, 0], &[])),
            Self::ManyDescriptors => {
                let control = std::os::fd::AsFd::as_fd(control);
                drop(vmm_api::fds::send(std::os::fd::AsFd::as_fd(&ports.agent), &[1, 0, 0, 0], &[control; 16]));
            }
            Self::EscapedWords => eprintln!("{ESCAPES}"),
            Self::EndlessWords => drop(thread::spawn(|| while io::stderr().write_all(ESCAPES.as_bytes()).is_ok() {})),
        }
    }
}
