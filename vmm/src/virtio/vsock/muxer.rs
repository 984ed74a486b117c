//! Between the two queues and the connections: takes the guest's packets apart, fills its receive buffers in turn.
//!
//! Lives on the event loop: one wake of a queue or a socket is one call of [`EventSource::on_event`]. A socket is watched by edges, and for
//! room only while bytes wait for it, so a stream that flows takes no `epoll_ctl(2)`. What may not be empty is remembered (`in_turn`,
//! `starved`), because nothing tells of it again.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, Weak};

use virtio_queue::{DescriptorChain, QueueOwnedT as _, QueueT as _};

use super::buffers::{Buffers, Payload};
use super::connection::{Broken, Connection};
use super::packet::{
    HEADER_LEN, Header, HeaderBytes, MAX_PAYLOAD_LEN, Ports, VIRTIO_VSOCK_OP_CREDIT_REQUEST,
    VIRTIO_VSOCK_OP_CREDIT_UPDATE, VIRTIO_VSOCK_OP_REQUEST, VIRTIO_VSOCK_OP_RESPONSE, VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_OP_RW, VIRTIO_VSOCK_OP_SHUTDOWN, VIRTIO_VSOCK_SHUTDOWN_F_SEND, VIRTIO_VSOCK_TYPE_STREAM,
};
use crate::device_thread::DeviceThread;
use crate::event_loop::{EventSet, EventSource, Registry, SharedSource};
use crate::virtio::{ActivateError, Activation, ActiveQueue, GuestMemory, RING};

const HOST_CID: u64 = 2;
/// Most connections at once.
const MAX_CONNECTIONS: usize = 1023;
/// Most packets without payload that wait for receive buffers; more are dropped, the guest's requests then time out.
const MAX_PENDING: usize = 4096;
/// Of a socket: bytes, or the end.
const BYTES: EventSet = EventSet::IN.union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);
const TOKEN_RX: u64 = 0;
const TOKEN_TX: u64 = 1;

/// The working device.
pub(super) struct Muxer {
    memory: Arc<GuestMemory>,
    rx: ActiveQueue,
    tx: ActiveQueue,
    guest_cid: u64,
    host_ports: Arc<Vec<(u32, OwnedFd)>>,
    registry: Registry,
    device_thread: DeviceThread,
    /// Ourselves, for registering sockets.
    this: Weak<Mutex<Muxer>>,
    connections: BTreeMap<Ports, Connection>,
    /// Packets without payload, in order.
    pending: VecDeque<Header>,
    /// Connections whose socket has something to read, in turn.
    readable: VecDeque<Ports>,
    /// Set by a reset: an event that was on its way is not served any more.
    stopped: bool,
}

impl Muxer {
    pub(super) fn start(
        activation: Activation,
        guest_cid: u64,
        host_ports: Arc<Vec<(u32, OwnedFd)>>,
        registry: Registry,
    ) -> Result<Arc<Mutex<Self>>, ActivateError> {
        let mut queues = activation.queues.into_iter();
        let rx = queues.next().ok_or(ActivateError::QueueMissing { index: 0 })?;
        let tx = queues.next().ok_or(ActivateError::QueueMissing { index: 1 })?;
        let (rx_fd, tx_fd) = (rx.kick.as_raw_fd(), tx.kick.as_raw_fd());
        let muxer = Arc::new_cyclic(|this| {
            Mutex::new(Self {
                memory: activation.memory,
                rx,
                tx,
                guest_cid,
                host_ports,
                registry: registry.clone(),
                device_thread: activation.device_thread,
                this: this.clone(),
                connections: BTreeMap::new(),
                pending: VecDeque::new(),
                readable: VecDeque::new(),
                stopped: false,
            })
        });
        for (fd, token) in [(rx_fd, TOKEN_RX), (tx_fd, TOKEN_TX)] {
            registry
                .add(fd, RING, token, muxer.clone())
                .map_err(|source| ActivateError::Host { action: "watch a queue", source })?;
        }
        Ok(muxer)
    }

    /// Drops every connection and touches guest memory no more.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
        self.registry.remove(self.rx.kick.as_raw_fd());
        self.registry.remove(self.tx.kick.as_raw_fd());
        for connection in self.connections.values() {
            self.registry.remove(connection.socket.as_raw_fd());
        }
        self.connections.clear();
        self.pending.clear();
        self.readable.clear();
    }

    /// Takes every packet that the guest has put out; says whether there was any.
    fn take_packets(&mut self) -> Result<bool, virtio_queue::Error> {
        let mut used_any = false;
        self.tx.queue.disable_notification(&*self.memory)?;
        // At most one ring of packets a turn: a guest that never stops must not keep the loop from others.
        for _ in 0..self.tx.queue.size() {
            let Some(chain) = self.tx.queue.pop_descriptor_chain(self.memory.clone()) else { break };
            let head = chain.head_index();
            self.take_packet(chain);
            self.tx.queue.add_used(&*self.memory, head, 0)?;
            used_any = true;
        }
        if self.tx.queue.enable_notification(&*self.memory)? {
            // The rest is taken in the next turn.
            let _ = self.tx.kick.write(1);
        }
        Ok(used_any)
    }

    fn take_packet(&mut self, chain: DescriptorChain<Arc<GuestMemory>>) {
        let mut buffers = Buffers::readable(chain);
        let mut bytes: HeaderBytes = [0; HEADER_LEN as usize];
        if buffers.gather(&self.memory, &mut bytes).is_none() {
            return;
        }
        let header = Header::decode(&bytes);
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID || header.len > MAX_PAYLOAD_LEN {
            return;
        }
        let ports = Ports::of_request(&header);
        if header.typ != VIRTIO_VSOCK_TYPE_STREAM {
            self.send_reset(ports);
            return;
        }
        if let Some(connection) = self.connections.get_mut(&ports) {
            connection.learn_credit(&header);
            if connection.starved {
                self.make_readable(ports);
            }
        }
        match header.op {
            VIRTIO_VSOCK_OP_REQUEST => self.connect(ports, &header),
            VIRTIO_VSOCK_OP_RW => self.receive(ports, header.len, &mut buffers),
            VIRTIO_VSOCK_OP_SHUTDOWN => self.end_guest(ports, header.flags),
            VIRTIO_VSOCK_OP_RST => self.drop_connection(ports),
            VIRTIO_VSOCK_OP_CREDIT_REQUEST if self.connections.contains_key(&ports) => self.send_credit_update(ports),
            VIRTIO_VSOCK_OP_CREDIT_UPDATE if self.connections.contains_key(&ports) => {}
            _ => self.send_reset(ports),
        }
    }

    fn connect(&mut self, ports: Ports, header: &Header) {
        let accepted = if self.connections.contains_key(&ports) || self.connections.len() >= MAX_CONNECTIONS {
            None
        } else {
            self.hand_over(ports).ok()
        };
        let Some(socket) = accepted else {
            self.drop_connection(ports);
            self.send_reset(ports);
            return;
        };
        let fd = socket.as_raw_fd();
        self.connections.insert(ports, Connection::new(socket, header));
        let Some(this) = self.this.upgrade() else { return };
        let source: SharedSource = this;
        if self.registry.add(fd, BYTES, ports.token(), source).is_err() {
            self.reset_connection(ports);
            return;
        }
        self.send_control(ports, VIRTIO_VSOCK_OP_RESPONSE, 0);
    }

    /// Gives one end of a new socket pair to the owner of the host port.
    fn hand_over(&self, ports: Ports) -> io::Result<UnixStream> {
        let (_, owner) =
            self.host_ports.iter().find(|(port, _)| *port == ports.host).ok_or(io::ErrorKind::ConnectionRefused)?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        vmm_api::fds::send(owner.as_fd(), &ports.guest.to_le_bytes(), &[theirs.as_fd()])?;
        Ok(ours)
    }

    fn receive(&mut self, ports: Ports, len: u32, buffers: &mut Buffers) {
        match self.pass_on(ports, len, buffers) {
            Ok(()) => self.after_output(ports),
            Err(Broken) => self.reset_connection(ports),
        }
    }

    /// Straight from the guest's buffers to the socket; what it does not take is kept.
    fn pass_on(&mut self, ports: Ports, len: u32, buffers: &mut Buffers) -> Result<(), Broken> {
        let connection = self.connections.get_mut(&ports).ok_or(Broken)?;
        let mut taken = 0;
        if !connection.has_output() {
            taken = buffers.take_payload(&self.memory, &connection.socket, len).map_err(|_| Broken)?;
            connection.count_forwarded(taken as usize);
        }
        let mut rest = vec![0; (len - taken) as usize];
        buffers.gather(&self.memory, &mut rest).ok_or(Broken)?;
        connection.keep(&rest)
    }

    /// Bytes have moved to the host.
    fn after_output(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get(&ports) else { return };
        if connection.finished() {
            self.reset_connection(ports);
            return;
        }
        if connection.credit_update_due() {
            self.send_credit_update(ports);
        }
        self.watch_room(ports);
    }

    /// Queues an update unless one waits already: its numbers are filled in when it is sent.
    fn send_credit_update(&mut self, ports: Ports) {
        if self.connections.get(&ports).is_some_and(|connection| !connection.update_queued) {
            let queued = self.send_control(ports, VIRTIO_VSOCK_OP_CREDIT_UPDATE, 0);
            if let Some(connection) = self.connections.get_mut(&ports) {
                connection.update_queued = queued;
            }
        }
    }

    fn end_guest(&mut self, ports: Ports, flags: u32) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            self.send_reset(ports);
            return;
        };
        connection.end_guest(flags);
        self.after_output(ports);
    }

    /// Queues a packet without payload; says whether there was room for it.
    fn send_control(&mut self, ports: Ports, op: u16, flags: u32) -> bool {
        let room = self.pending.len() < MAX_PENDING;
        if room {
            self.pending.push_back(Header { op, flags, ..self.header_to_guest(ports) });
        }
        room
    }

    fn header_to_guest(&self, ports: Ports) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            typ: VIRTIO_VSOCK_TYPE_STREAM,
            ..Header::default()
        }
    }

    fn send_reset(&mut self, ports: Ports) {
        // A guest that lets thousands of packets lie learns of this end by its own time-out.
        let _ = self.send_control(ports, VIRTIO_VSOCK_OP_RST, 0);
    }

    fn reset_connection(&mut self, ports: Ports) {
        self.drop_connection(ports);
        self.send_reset(ports);
    }

    fn drop_connection(&mut self, ports: Ports) {
        if let Some(mut connection) = self.connections.remove(&ports) {
            self.registry.remove(connection.socket.as_raw_fd());
            if connection.in_turn {
                self.readable.retain(|waiting| *waiting != ports);
            }
            if connection.flush().is_ok() && connection.has_output() {
                connection.finish_in_background(&self.device_thread);
            }
        }
    }

    fn make_readable(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.get_mut(&ports)
            && !std::mem::replace(&mut connection.in_turn, true)
        {
            self.readable.push_back(ports);
        }
    }

    /// Watches the socket for room while bytes wait for it.
    fn watch_room(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        let wanted = connection.has_output();
        if std::mem::replace(&mut connection.waits_for_room, wanted) == wanted {
            return;
        }
        let interest = if wanted { BYTES | EventSet::OUT } else { BYTES };
        if self.registry.modify(connection.socket.as_raw_fd(), interest).is_err() {
            self.reset_connection(ports);
        }
    }

    /// Fills the guest's receive buffers: waiting packets first, then one packet of each readable connection in turn. Says whether it
    /// used any.
    fn fill_buffers(&mut self) -> Result<bool, virtio_queue::Error> {
        let mut used_any = false;
        // At most one ring of buffers a turn, as with packets of the guest.
        let mut turns = self.rx.queue.size();
        while !(self.pending.is_empty() && self.readable.is_empty()) {
            if turns == 0 {
                let _ = self.rx.kick.write(1);
                break;
            }
            turns -= 1;
            let Some(chain) = self.rx.queue.pop_descriptor_chain(self.memory.clone()) else {
                // Asks to be told of the next buffer; when one came in the meantime, there is another turn.
                if self.rx.queue.enable_notification(&*self.memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let buffers = Buffers::writable(chain);
            // A buffer that is too small is given back empty; nothing is read for it.
            let written = if buffers.hold_a_packet() { self.fill(&buffers) } else { Some(0) };
            match written {
                Some(len) => {
                    self.rx.queue.add_used(&*self.memory, head, len)?;
                    used_any = true;
                }
                None => self.rx.queue.go_to_previous_position(),
            }
        }
        Ok(used_any)
    }

    /// Interrupts for what was sent and for what was received; once, if the driver has one vector for both.
    fn interrupt(&mut self, sent: bool, received: bool) -> Result<(), virtio_queue::Error> {
        let sent = sent && self.tx.queue.needs_notification(&*self.memory)?;
        let received = received && self.rx.queue.needs_notification(&*self.memory)?;
        // A vector that the guest set to nonsense loses its own interrupts.
        if received {
            let _ = self.rx.interrupt.trigger();
        }
        if sent && !(received && self.rx.interrupt.is_same(&self.tx.interrupt)) {
            let _ = self.tx.interrupt.trigger();
        }
        Ok(())
    }

    /// Fills one buffer; nothing when there was nothing to put into it after all.
    fn fill(&mut self, buffers: &Buffers) -> Option<u32> {
        let Some(mut header) = self.pending.pop_front() else { return self.fill_from_sockets(buffers) };
        if let Some(connection) = self.connections.get_mut(&Ports::of_answer(&header)) {
            connection.tell_credit(&mut header);
        }
        Some(buffers.put_header(&self.memory, &header))
    }

    /// Reads from the next socket that has something; nothing when none has.
    fn fill_from_sockets(&mut self, buffers: &Buffers) -> Option<u32> {
        while let Some(ports) = self.readable.pop_front() {
            match self.read_socket(ports, buffers) {
                Ok(Some(payload_len)) => {
                    let header = self.header_to_guest(ports);
                    let mut header = Header { len: payload_len, op: VIRTIO_VSOCK_OP_RW, ..header };
                    let connection = self.connections.get_mut(&ports)?;
                    connection.count_sent(payload_len);
                    connection.tell_credit(&mut header);
                    return Some(buffers.put_header(&self.memory, &header) + payload_len);
                }
                Ok(None) => {}
                Err(Broken) => self.reset_connection(ports),
            }
            if !self.pending.is_empty() {
                // An end or a reset was found; it takes this buffer's place in the next turn.
                return None;
            }
        }
        None
    }

    /// Reads behind the place of the header; nothing when there is no room or nothing to read. What may have more has another turn.
    fn read_socket(&mut self, ports: Ports, buffers: &Buffers) -> Result<Option<u32>, Broken> {
        let Some(connection) = self.connections.get_mut(&ports) else { return Ok(None) };
        connection.in_turn = false;
        let room = connection.peer_room().min(MAX_PAYLOAD_LEN);
        connection.starved = room == 0;
        if connection.host_ended || room == 0 {
            return Ok(None);
        }
        let payload = buffers.put_payload(&self.memory, &mut connection.socket, room).map_err(|_| Broken)?;
        let may_have_more = match payload {
            Payload::Bytes(_) => true,
            Payload::Last(_) => connection.hung_up,
            Payload::Nothing | Payload::End => false,
        };
        if may_have_more {
            self.make_readable(ports);
        }
        match payload {
            Payload::Bytes(count) | Payload::Last(count) => Ok(Some(count)),
            Payload::Nothing => Ok(None),
            Payload::End => {
                self.end_host(ports);
                Ok(None)
            }
        }
    }

    /// The host has ended its half.
    fn end_host(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        connection.host_ended = true;
        if connection.guest_side_finished() {
            self.reset_connection(ports);
        } else {
            self.send_control(ports, VIRTIO_VSOCK_OP_SHUTDOWN, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
        }
    }

    fn socket_ready(&mut self, ports: Ports, ready: EventSet) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        connection.hung_up |= ready.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
        let flushed = if connection.has_output() { connection.flush() } else { Ok(()) };
        self.make_readable(ports);
        match flushed {
            Ok(()) => self.after_output(ports),
            Err(Broken) => self.reset_connection(ports),
        }
    }
}

impl EventSource for Muxer {
    fn on_event(&mut self, token: u64, ready: EventSet) {
        if self.stopped {
            return;
        }
        let sent = match token {
            TOKEN_RX => Ok(false),
            TOKEN_TX => self.take_packets(),
            token => {
                self.socket_ready(Ports::from_token(token), ready);
                Ok(false)
            }
        };
        let outcome = sent.and_then(|sent| {
            let received = self.fill_buffers()?;
            self.interrupt(sent, received)
        });
        if let Err(error) = outcome {
            tracing::debug!(%error, "the driver broke the rings of the socket device");
            self.stop();
        }
    }
}

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
#[cfg(test)]
mod tests;
