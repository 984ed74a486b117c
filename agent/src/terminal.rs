//! The terminal of a process: `libcontainer` makes it in the container and sends its master over a socket.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::net::UnixListener;

/// Time for the master to come once the step has ended, which sent it.
const MASTER_DEADLINE: Duration = Duration::from_secs(5);

/// Where `libcontainer` sends the master to; its file is removed when dropped.
pub(crate) struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// Listens at a path of its own. It is numbered: two ids do not fit into the 107 bytes of a socket's path (unix(7)).
    pub(crate) fn bind() -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = PathBuf::from(format!("/run/agent/console-{}.sock", NEXT.fetch_add(1, Ordering::Relaxed)));
        let listener = UnixListener::bind(&path)?;
        Ok(Self { path, listener })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the master that a step has sent before it ended.
    pub(crate) async fn receive(self) -> io::Result<OwnedFd> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "the terminal did not come in 5000 ms");
        tokio::time::timeout(MASTER_DEADLINE, self.accept()).await.unwrap_or_else(|_| Err(late()))
    }

    async fn accept(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept().await?;
        stream
            .async_io(tokio::io::Interest::READABLE, || {
                let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let mut name = [0; 256];
                recvmsg(stream.as_fd(), &mut [io::IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
                let mut fds = control.drain().filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                });
                fds.next().and_then(|mut fds| fds.next()).ok_or_else(|| io::ErrorKind::InvalidData.into())
            })
            .await
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        // One that stays costs a name.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Sets the size of a terminal; a side of 0 is not known yet, and leaves it as it is.
pub(crate) fn set_size(master: &OwnedFd, rows: u32, columns: u32) -> io::Result<()> {
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let short = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    let size = Winsize { ws_row: short(rows), ws_col: short(columns), ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(master, size)?)
}
