//! The byte streams of a process: one vsock connection each, dialled by us, its id first.
//!
//! Output is carried until its last writer is gone, or until its process has exited and the pipe is empty: a daemon that
//! inherited the pipe keeps nobody waiting. What such a daemon writes later is read and dropped, so it lives on.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use agent_api::{HOST_CID, STREAM_PORT};
use rustix::buffer::spare_capacity;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::sync::watch;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::reaper::Exit;
use crate::sys;

/// Size of one read, in bytes.
const CHUNK: usize = 64 << 10;

/// The exit of the process that a stream belongs to.
type ProcessExit = watch::Receiver<Option<Exit>>;

/// Dials a stream of the host; nothing for id 0.
pub(crate) async fn dial(id: u64) -> io::Result<Option<VsockStream>> {
    if id == 0 {
        return Ok(None);
    }
    let mut stream = VsockStream::connect(VsockAddr::new(HOST_CID, STREAM_PORT)).await?;
    stream.write_u64_le(id).await?;
    Ok(Some(stream))
}

/// Dials a stream for a child of ours: a descriptor that blocks.
pub(crate) async fn dial_for_step(id: u64) -> io::Result<OwnedFd> {
    let Some(stream) = dial(id).await? else { return Err(io::ErrorKind::InvalidInput.into()) };
    let stream = stream.as_fd().try_clone_to_owned()?;
    rustix::io::ioctl_fionbio(&stream, false)?;
    Ok(stream)
}

/// A stream of the host and our end of what a process reads or writes.
pub(crate) struct Carrier {
    stream: VsockStream,
    ours: AsyncFd<OwnedFd>,
}

/// What a process reads: the end for it, and ours. /dev/null without a stream.
pub(crate) fn input(stream: Option<VsockStream>) -> io::Result<(OwnedFd, Option<Carrier>)> {
    let Some(stream) = stream else { return Ok((dev_null()?, None)) };
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((read_end, Some(Carrier::new(stream, write_end)?)))
}

/// What a process writes: the end for it, and ours. /dev/null without a stream.
pub(crate) fn output(stream: Option<VsockStream>) -> io::Result<(OwnedFd, Option<Carrier>)> {
    let Some(stream) = stream else { return Ok((dev_null()?, None)) };
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((write_end, Some(Carrier::new(stream, read_end)?)))
}

/// Ends an input when told how many bytes were sent into it.
#[derive(Debug)]
pub(crate) struct InputEnd(watch::Sender<Option<u64>>);

impl InputEnd {
    /// The input ends after `sent_bytes`, which may still be on their way.
    pub(crate) fn end_after(&self, sent_bytes: u64) {
        self.0.send_replace(Some(sent_bytes));
    }
}

impl Carrier {
    /// Takes one direction of a terminal, or an end of a pipe.
    pub(crate) fn new(stream: VsockStream, ours: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&ours, true)?;
        Ok(Self { stream, ours: sys::watch(ours)? })
    }

    /// Carries the host's bytes to the process until it exits, or the stream or the input ends.
    pub(crate) fn feed(self, mut exit: ProcessExit) -> InputEnd {
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(async move {
            tokio::select! {
                _ = self.carry_input(receiver) => {}
                _ = exit.wait_for(Option::is_some) => {}
            }
        });
        InputEnd(sender)
    }

    async fn carry_input(mut self, mut end: watch::Receiver<Option<u64>>) -> io::Result<()> {
        let mut chunk = Vec::with_capacity(CHUNK);
        let mut carried_len = 0;
        loop {
            let known_end = *end.borrow_and_update();
            if known_end.is_some_and(|end| carried_len >= end) {
                return Ok(());
            }
            chunk.clear();
            let read = tokio::select! {
                read = self.stream.read_buf(&mut chunk) => read?,
                Ok(()) = end.changed() => continue,
            };
            if read == 0 {
                return Ok(());
            }
            self.write_all(&chunk).await?;
            carried_len += read as u64;
        }
    }

    /// Carries what the process writes to the host, then ends the stream.
    pub(crate) fn drain(mut self, mut exit: ProcessExit) {
        tokio::spawn(async move {
            if self.carry_output(&mut exit).await.is_err() {
                // Nobody reads: the process learns it as a broken pipe, or as a hang-up of its terminal.
                return;
            }
            // The host has ended the stream already.
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
            let Self { ours, stream } = self;
            drop(stream);
            let mut chunk = Vec::with_capacity(CHUNK);
            while let Ok(1..) = read(&ours, &mut chunk).await {}
        });
    }

    async fn carry_output(&mut self, exit: &mut ProcessExit) -> io::Result<()> {
        let mut chunk = Vec::with_capacity(CHUNK);
        loop {
            let exited = exit.borrow().is_some();
            let read = tokio::select! {
                biased;
                // EIO: the last holder of the other side of a terminal is gone.
                read = read(&self.ours, &mut chunk) => read.unwrap_or(0),
                // Everything that the process wrote before it exited can be read by now: look once more.
                _ = exit.wait_for(Option::is_some), if !exited => continue,
                () = std::future::ready(()), if exited => read_now(&self.ours, &mut chunk),
            };
            if read == 0 {
                return Ok(());
            }
            self.stream.write_all(&chunk).await?;
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let write = |fd: &OwnedFd| Ok(rustix::io::write(fd.as_fd(), bytes)?);
            let written = self.ours.async_io(Interest::WRITABLE, write).await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }
}

/// Reads in place of what `chunk` holds; its memory is not touched where nothing is read.
async fn read(fd: &AsyncFd<OwnedFd>, chunk: &mut Vec<u8>) -> io::Result<usize> {
    chunk.clear();
    fd.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd.as_fd(), spare_capacity(chunk))?)).await
}

/// Reads what is there, whatever the runtime knows of the descriptor's readiness; 0 when there is nothing.
fn read_now(fd: &AsyncFd<OwnedFd>, chunk: &mut Vec<u8>) -> usize {
    chunk.clear();
    rustix::io::read(fd.get_ref(), spare_capacity(chunk)).unwrap_or(0)
}

/// An open /dev/null.
pub(crate) fn dev_null() -> io::Result<OwnedFd> {
    Ok(std::fs::File::options().read(true).write(true).open("/dev/null")?.into())
}
