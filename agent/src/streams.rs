//! The byte streams of a process: one vsock connection each, dialled by us, its id first.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use agent_api::{HOST_CID, STREAM_PORT};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio_vsock::{VsockAddr, VsockStream};

/// Size of one read, in bytes.
const CHUNK: usize = 64 << 10;

/// Dials a stream of the host; nothing for id 0.
pub(crate) async fn dial(id: u64) -> io::Result<Option<VsockStream>> {
    if id == 0 {
        return Ok(None);
    }
    let mut stream = VsockStream::connect(VsockAddr::new(HOST_CID, STREAM_PORT)).await?;
    stream.write_u64_le(id).await?;
    Ok(Some(stream))
}

/// The end that a process reads its standard input from; the task carries the host's bytes to it.
pub(crate) fn feed(stream: Option<VsockStream>) -> io::Result<(OwnedFd, Option<JoinHandle<()>>)> {
    let Some(mut stream) = stream else { return Ok((dev_null()?, None)) };
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&write_end, true)?;
    let mut to = pipe::Sender::from_owned_fd(write_end)?;
    let task = tokio::spawn(async move {
        let mut chunk = vec![0; CHUNK];
        while let Ok(len @ 1..) = stream.read(&mut chunk).await {
            if to.write_all(&chunk[..len]).await.is_err() {
                return;
            }
        }
    });
    Ok((read_end, Some(task)))
}

/// The end that a process writes its output to; a task carries everything to the host, then ends the stream.
pub(crate) fn drain(stream: Option<VsockStream>) -> io::Result<OwnedFd> {
    let Some(mut stream) = stream else { return dev_null() };
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&read_end, true)?;
    let mut from = pipe::Receiver::from_owned_fd(read_end)?;
    tokio::spawn(async move {
        let mut chunk = vec![0; CHUNK];
        while let Ok(len @ 1..) = from.read(&mut chunk).await {
            if stream.write_all(&chunk[..len]).await.is_err() {
                // Nobody reads: the process learns it as a broken pipe.
                return;
            }
        }
        let _ = stream.shutdown(std::net::Shutdown::Write);
    });
    Ok(write_end)
}

/// Carries bytes between a terminal's master and the host.
pub(crate) fn connect_terminal(
    master: OwnedFd,
    input: Option<VsockStream>,
    output: Option<VsockStream>,
) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&master, true)?;
    let master = Arc::new(crate::sys::watch(master)?);
    if let Some(mut input) = input {
        let master = master.clone();
        tokio::spawn(async move {
            let mut chunk = vec![0; CHUNK];
            while let Ok(len @ 1..) = input.read(&mut chunk).await {
                if write_all(&master, &chunk[..len]).await.is_err() {
                    return;
                }
            }
        });
    }
    if let Some(mut output) = output {
        tokio::spawn(async move {
            let mut chunk = vec![0; CHUNK];
            // EIO: the last holder of the other side is gone.
            while let Ok(len @ 1..) = read(&master, &mut chunk).await {
                if output.write_all(&chunk[..len]).await.is_err() {
                    return;
                }
            }
            let _ = output.shutdown(std::net::Shutdown::Write);
        });
    }
    Ok(())
}

async fn read(fd: &AsyncFd<OwnedFd>, into: &mut [u8]) -> io::Result<usize> {
    fd.async_io(tokio::io::Interest::READABLE, |fd| Ok(rustix::io::read(fd.as_fd(), &mut *into)?)).await
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written =
            fd.async_io(tokio::io::Interest::WRITABLE, |fd| Ok(rustix::io::write(fd.as_fd(), bytes)?)).await?;
        bytes = &bytes[written..];
    }
    Ok(())
}

fn dev_null() -> io::Result<OwnedFd> {
    Ok(std::fs::File::options().read(true).write(true).open("/dev/null")?.into())
}
