//! The client's side of a control connection: asks the process that owns a container.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, pidfd_open};
use sandbox::state::{self, State};

use crate::control::{Answer, Request};

/// Size of one read, in bytes.
const CHUNK: usize = 4 << 10;

/// Why the owner of a container could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error(transparent)]
    State(#[from] state::StateError),
    /// It has ended, or does not run yet.
    #[error("container {} is not running", _0.name)]
    NotRunning(Box<State>),
    /// Its owner was killed, or does not listen any more.
    #[error("container {name} has lost its owner: remove it with `vmrun gc`")]
    Orphaned { name: String },
}

/// A connection to the owner of a container.
#[derive(Debug)]
pub(crate) struct Client {
    socket: UnixStream,
    /// Read, but not asked for yet.
    received: Vec<u8>,
    passed: VecDeque<OwnedFd>,
    /// Its process, if it could be taken hold of.
    owner: Option<OwnedFd>,
}

/// Longest wait for an owner that has answered that its container is over.
const OWNER_END_DEADLINE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

impl Client {
    /// Connects to the owner of a container that runs.
    pub(crate) fn connect(root: &Path, name: &str) -> Result<Self, ConnectError> {
        state::read(root, name)?;
        match UnixStream::connect(root.join(name).join("control.sock")) {
            Ok(socket) => {
                let listener = socket_peercred(&socket).ok();
                let owner = listener.and_then(|listener| pidfd_open(listener.pid, PidfdFlags::empty()).ok());
                Ok(Self { owner, ..Self::new(socket) })
            }
            // The first look may have been just before its end.
            Err(_) => {
                let state = state::read(root, name)?;
                if !state.status.is_exited() && !state::is_owned(root, name) {
                    return Err(ConnectError::Orphaned { name: name.to_owned() });
                }
                Err(ConnectError::NotRunning(Box::new(state)))
            }
        }
    }

    fn new(socket: UnixStream) -> Self {
        Self { socket, received: Vec::new(), passed: VecDeque::new(), owner: None }
    }

    /// Another handle of the same connection, for sending only.
    pub(crate) fn sender(&self) -> io::Result<Self> {
        Ok(Self::new(self.socket.try_clone()?))
    }

    /// Waits no longer than this for an answer.
    pub(crate) fn set_deadline(&self, deadline: Duration) -> io::Result<()> {
        self.socket.set_read_timeout(Some(deadline))
    }

    pub(crate) fn send(&mut self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        Ok(self.socket.write_all(&line)?)
    }

    /// Asks for something that is done or fails.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<()> {
        self.send(request)?;
        self.outcome()
    }

    /// Asks for something that has a stream; [`Self::outcome`] comes when it is through with it.
    pub(crate) fn open_stream(root: &Path, name: &str, request: &Request) -> Result<(Self, UnixStream)> {
        let mut client = Self::connect(root, name)?;
        client.send(request)?;
        let (answer, passed) = client.receive()?;
        match answer {
            Answer::Started => {}
            Answer::Failed(cause) => bail!("{cause}"),
            other => bail!("unexpected answer of the container's owner: {other:?}"),
        }
        let stream = UnixStream::from(passed.into_iter().next().context("no stream came")?);
        stream.set_nonblocking(false)?;
        Ok((client, stream))
    }

    /// Waits until what was asked for is done or has failed.
    pub(crate) fn outcome(&mut self) -> Result<()> {
        match self.receive()?.0 {
            Answer::Done => Ok(()),
            Answer::Failed(cause) => bail!("{cause}"),
            other => bail!("unexpected answer of the container's owner: {other:?}"),
        }
    }

    /// After an answer that says that the container is over: waits for the end of its owner, which still holds its sockets.
    pub(crate) fn see_owner_end(&self) {
        if let Some(owner) = &self.owner {
            // The answer holds, however long that takes.
            let _ = poll(&mut [PollFd::new(owner, PollFlags::IN)], Some(&OWNER_END_DEADLINE));
        }
    }

    /// Reads one answer and the descriptors that came with it.
    pub(crate) fn receive(&mut self) -> Result<(Answer, Vec<OwnedFd>)> {
        let line = loop {
            if let Some(at) = self.received.iter().position(|byte| *byte == b'\n') {
                break self.received.drain(..=at).collect::<Vec<u8>>();
            }
            let mut chunk = [0; CHUNK];
            let (len, passed) = sandbox::fds::recv(self.socket.as_fd(), &mut chunk)?;
            if len == 0 {
                bail!("the container's owner ended before it answered");
            }
            self.received.extend_from_slice(&chunk[..len]);
            self.passed.extend(passed);
        };
        let answer = serde_json::from_slice(&line).context("bad answer of the container's owner")?;
        // Descriptors come with the first byte of their message (unix(7)), and only this message has any.
        let passed = if matches!(answer, Answer::Started) { self.passed.drain(..).collect() } else { Vec::new() };
        Ok((answer, passed))
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::Client;
    use crate::control::Answer;

    #[test]
    fn answers_that_come_in_one_read_are_both_received() {
        let (mut owner, socket) = UnixStream::pair().expect("socket pair");
        owner.write_all(b"\"done\"\n{\"exited\":7}\n").expect("write");
        let mut client = Client::new(socket);
        assert!(matches!(client.receive().expect("first").0, Answer::Done));
        assert!(matches!(client.receive().expect("second").0, Answer::Exited(7)));
        drop(owner);
        assert!(client.receive().is_err());
    }

    #[test]
    fn descriptors_come_with_the_start_even_when_more_follows() {
        let (owner, socket) = UnixStream::pair().expect("socket pair");
        sandbox::fds::send(owner.as_fd(), b"\"started\"\n{\"exited\":0}\n", &[owner.as_fd()]).expect("send");
        let mut client = Client::new(socket);
        let (answer, passed) = client.receive().expect("start");
        assert!(matches!(answer, Answer::Started));
        assert_eq!(passed.len(), 1);
        assert!(matches!(client.receive().expect("exit").0, Answer::Exited(0)));
    }
}
