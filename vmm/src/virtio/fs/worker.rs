//! A thread that serves queues: wait for a doorbell, answer everything that is there, interrupt once.

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use virtio_queue::QueueT as _;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::server::Server;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::checked::CheckedFs;
use super::spare_room::{OUT_HEADER_LEN, SpareRoom};
use crate::device_thread::DeviceThread;
use crate::jail::ThreadKind;
use crate::memory::Views;
use crate::virtio::{ActiveQueue, GuestMemory, RING};

/// A ring that claims requests and gives none this many times in a row is broken.
const MAX_EMPTY_TURNS: u32 = 16;

/// Stops and joins its thread when dropped.
pub(super) struct Worker {
    stop: EventFd,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread `fsN` of some queues, N being `index`.
    pub(super) fn spawn(
        index: usize,
        queues: Vec<ActiveQueue>,
        memory: &Arc<Views>,
        server: &Arc<Server<CheckedFs>>,
        device_thread: &DeviceThread,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let doorbell = Doorbell::create(queues.iter().map(|queue| &queue.kick), &stop)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let mut served = Vec::new();
        for queue in queues {
            let (memory, server, stopping) = (memory.clone(), server.clone(), stopping.clone());
            served.push(Serving { queue, memory, server, spare: SpareRoom::create()?, stopping });
        }
        let builder = thread::Builder::new().name(format!("fs{index}"));
        let thread = device_thread.spawn(builder, ThreadKind::Fs, move || {
            // virtiofsd changes the umask and the credentials of the calling thread only; the umask needs its own fs_struct.
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).is_err() {
                tracing::error!("a worker cannot have a file system context of its own; the share is not served");
                return;
            }
            // A driver that broke its rings gets no answer until it resets the device.
            while doorbell.rings() && served.iter_mut().all(|queue| queue.serve_all().is_ok()) {}
        })?;
        Ok(Self { stop, stopping, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Seen by a worker that is never out of requests; the eventfd wakes one that waits. This is its only write.
        self.stopping.store(true, Ordering::Relaxed);
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Serving {
    queue: ActiveQueue,
    memory: Arc<Views>,
    server: Arc<Server<CheckedFs>>,
    spare: SpareRoom,
    stopping: Arc<AtomicBool>,
}

impl Serving {
    fn serve_all(&mut self) -> Result<(), virtio_queue::Error> {
        let mut empty_turns = 0;
        loop {
            self.queue.queue.disable_notification(&*self.memory.plain)?;
            let mut used_any = false;
            for _ in 0..self.queue.queue.size() {
                let Some(chain) = self.queue.queue.pop_descriptor_chain(self.memory.plain.clone()) else { break };
                let head = chain.head_index();
                let written = self.answer(chain);
                self.queue.queue.add_used(&*self.memory.plain, head, written)?;
                used_any = true;
            }
            if used_any && self.queue.queue.needs_notification(&*self.memory.plain)? {
                // A vector that the guest set to nonsense loses its own interrupts.
                let _ = self.queue.interrupt.trigger();
            }
            if !self.queue.queue.enable_notification(&*self.memory.plain)? {
                return Ok(());
            }
            // A request may have come just now; that nothing comes again and again means a broken ring.
            empty_turns = if used_any { 0 } else { empty_turns + 1 };
            if empty_turns > MAX_EMPTY_TURNS {
                return Err(virtio_queue::Error::InvalidAvailRingIndex);
            }
            if self.stopping.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    }

    /// Answers one request; a malformed one gets nothing. Of what has no room for an answer, the guest learns nothing.
    fn answer(&self, chain: virtio_queue::DescriptorChain<Arc<GuestMemory>>) -> u32 {
        let Ok(reader) = Reader::new(&self.memory.logged, chain.clone()) else { return 0 };
        let Ok(writer) = Writer::new(&self.memory.logged, chain) else { return 0 };
        let has_room = writer.available_bytes() >= OUT_HEADER_LEN.into();
        let Ok(writer) = (if has_room { Ok(writer) } else { self.spare.writer() }) else { return 0 };
        match self.server.handle_message(reader, writer, None::<&mut ()>) {
            Ok(_) if !has_room => 0,
            Ok(written) => u32::try_from(written).unwrap_or(u32::MAX),
            Err(error) => {
                tracing::debug!(%error, "a FUSE request was dropped");
                0
            }
        }
    }
}

/// Waits for one of the doorbells or for the order to stop.
struct Doorbell {
    epoll: Epoll,
}

const KICK: u64 = 0;
const STOP: u64 = 1;

impl Doorbell {
    fn create<'a>(kicks: impl Iterator<Item = &'a EventFd>, stop: &EventFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for kick in kicks {
            epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), EpollEvent::new(RING, KICK))?;
        }
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        Ok(Self { epoll })
    }

    /// False when the worker is to stop.
    fn rings(&self) -> bool {
        let mut events = [EpollEvent::default(); 2];
        loop {
            match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
                Ok(count) => return !events[..count].iter().any(|event| event.data() == STOP),
            }
        }
    }
}

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
#[cfg(test)]
mod tests;
