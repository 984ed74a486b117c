//! A VMM and an agent that a guest has taken over: they speak the protocols of `vmm-api` and `agent-api`, and tell one lie. Without a guest:
//! what the host's programs make of the bytes is the subject. Started as the binary `liar`, by a link whose name is the lie; one that begins
//! with `shim-` says that containerd's shim is lied to.

mod archive;
mod events;
mod lies;
mod wire;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use agent_api::message;
use nix::sched::{CloneFlags, unshare};
use protobuf::Message as _;
use vmm::inherited::InheritedFds;
use vmm_api::control::{Exit, ExitReason, Message, Reply, State};
use vmm_api::{Fd, VmConfig};

use events::Events;
use lies::{ESCAPES, MANY};
pub use lies::{Lie, Scene, all};
use wire::Connection;

/// What an honest command prints.
pub const OUTPUT: &str = "an honest line\n";

/// Streams that the host expects, by id.
type Streams = Mutex<HashMap<u64, UnixStream>>;

/// The two sockets by which connections are passed to the host, as the VMM's vsock device does.
struct Ports {
    agent: OwnedFd,
    streams: OwnedFd,
}

impl Ports {
    fn dial(port: &OwnedFd) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        // Nobody there means that the host has seen enough.
        if vmm_api::fds::send(port.as_fd(), &1024_u32.to_le_bytes(), &[theirs.as_fd()]).is_err() {
            std::process::exit(0);
        }
        ours
    }

    fn stream(&self, id: u64) -> UnixStream {
        let mut stream = Self::dial(&self.streams);
        let _ = stream.write_all(&id.to_le_bytes());
        stream
    }
}

/// Plays the VMM whose configuration descriptor is the last argument.
///
/// # Panics
/// When it was not started as a VMM is.
pub fn serve() {
    let arguments: Vec<String> = std::env::args().collect();
    let name = Path::new(&arguments[0]).file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    let told = name.strip_prefix("shim-");
    let known = all().into_iter().chain(events::all()).find(|(known, ..)| known == told.unwrap_or(&name));
    let (_, scene, lie) = known.unwrap_or_else(|| panic!("no lie {name:?}"));
    if told.is_some() {
        // As the VMM does: what interfaces the container has is looked up there.
        unshare(CloneFlags::CLONE_NEWNET).expect("stories run as root");
    }
    let mut inherited = InheritedFds::default();
    let mut take = |fd| inherited.take(fd).expect("an inherited descriptor");
    let config_fd: i32 = arguments.last().and_then(|number| number.parse().ok()).expect("--config-fd NUMBER");
    let config: VmConfig = serde_json::from_reader(File::from(take(Fd(config_fd)))).expect("a configuration");
    let [agent, streams, ..] = &config.vsock.expect("a vsock device").host_ports[..] else { panic!("two ports") };
    let ports = Ports { agent: take(agent.socket), streams: take(streams.socket) };
    let control = UnixStream::from(take(config.control));
    if let Some(cgroup) = config.cgroup {
        let _ = File::from(take(cgroup)).write_all(b"0");
    }
    lie.at_boot(&control, &ports);
    let obedient = control.try_clone().expect("a socket");
    thread::spawn(move || obey(&obedient, lie));
    answer(&ports, scene, lie, told.map(|_| Events::default()));
    // The agent is gone; the VMM stays until it is told to end.
    loop {
        thread::park();
    }
}

/// Answers requests of the control socket.
fn obey(control: &UnixStream, lie: Lie) {
    let mut replies = control;
    for line in BufReader::new(control).lines().map_while(Result::ok) {
        lie.on_request(control);
        let reply = if line.contains("state") {
            Reply::State(State::Running)
        } else if line.contains("net-stats") {
            Reply::NetStats(lie.network_stats())
        } else {
            Reply::Done
        };
        say(&mut replies, &Message::Reply(reply));
        if line.contains("shutdown") {
            end(control, ExitReason::Requested);
        }
    }
    // Its owner is gone.
    std::process::exit(0);
}

fn say(mut to: impl std::io::Write, message: &Message) {
    let line = serde_json::to_string(message).expect("JSON");
    let _ = writeln!(to, "{line}");
}

/// Says why the VM ends, and ends.
fn end(control: &UnixStream, reason: ExitReason) -> ! {
    say(control, &Message::Exited(Exit { reason, console_tail: String::new() }));
    std::process::exit(0);
}

/// Answers the agent's requests, honestly but for the lie; the shim is told ends by events.
fn answer(ports: &Ports, scene: Scene, lie: Lie, mut events: Option<Events>) {
    let connection = Connection(Ports::dial(&ports.agent));
    let streams = Streams::default();
    while let Some(request) = connection.request() {
        let (connection, streams) = (&connection, &streams);
        if lie.instead(&request, connection) {
            continue;
        }
        let payload = honest(&request, ports, streams, (scene, lie));
        if let Some(payload) = payload {
            connection.respond(request.stream_id, &payload);
        }
        if let Some(events) = &mut events {
            events.follow(&request, connection, streams, lie);
        }
    }
}

/// The answer of an agent whose containers print a line and exit with 0; nothing when there is none yet.
fn honest(request: &wire::Request, ports: &Ports, streams: &Streams, (scene, lie): (Scene, Lie)) -> Option<Vec<u8>> {
    let bytes = match request.method.as_str() {
        "CreateContainer" => {
            let create = message::CreateContainerRequest::parse_from_bytes(&request.payload).unwrap_or_default();
            connect(ports, streams, &create.stdio, lie);
            message::ProcessReply { pid: 2, ..Default::default() }.write_to_bytes()
        }
        "Exec" => {
            let exec = message::ExecRequest::parse_from_bytes(&request.payload).unwrap_or_default();
            connect(ports, streams, &exec.stdio, lie);
            message::ProcessReply { pid: 3, ..Default::default() }.write_to_bytes()
        }
        "RunExec" => {
            let exec = message::ExecRequest::parse_from_bytes(&request.payload).unwrap_or_default();
            connect(ports, streams, &exec.stdio, lie);
            lie.speak(streams);
            lie.exit().write_to_bytes()
        }
        // A container that is looked at by other commands runs on.
        "Wait" if scene != Scene::Run && !request.is_exec() => return None,
        "Wait" => {
            lie.speak(streams);
            lie.exit().write_to_bytes()
        }
        "NextEvents" => return None,
        "State" => {
            let status = message::Status::STATUS_RUNNING.into();
            message::StateReply { status, pid: 2, ..Default::default() }.write_to_bytes()
        }
        "StatPath" => lie.path_kind().write_to_bytes(),
        "CopyOut" => {
            let copy = message::CopyRequest::parse_from_bytes(&request.payload).unwrap_or_default();
            lie.archive(ports.stream(copy.stream));
            message::Empty::new().write_to_bytes()
        }
        "Stats" => lie.stats().write_to_bytes(),
        _ => message::Empty::new().write_to_bytes(),
    };
    Some(bytes.expect("encoded"))
}

/// Dials the streams of a process.
fn connect(ports: &Ports, streams: &Streams, stdio: &message::Stdio, lie: Lie) {
    let mut open = streams.lock().expect("no panic");
    // Of the process before.
    open.clear();
    for id in [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().filter(|id| *id != 0) {
        lie.before_stream(ports, id);
        if let Some(dialled) = lie.stream_id(id) {
            open.insert(id, ports.stream(dialled));
        }
    }
}
