//! Frames of ttrpc (PROTOCOL.md): length, stream id, type and flags, then a message; whole or broken.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use protobuf::Message as _;
use ttrpc::proto::{Code, MESSAGE_TYPE_RESPONSE, Request as Wire, Response, Status};

/// A request of the host.
pub(super) struct Request {
    pub(super) stream_id: u32,
    pub(super) method: String,
    pub(super) payload: Vec<u8>,
}

impl Request {
    /// Whether a request about a process is about an exec.
    pub(super) fn is_exec(&self) -> bool {
        agent_api::message::ProcessRequest::parse_from_bytes(&self.payload)
            .is_ok_and(|process| !process.exec_id.is_empty())
    }
}

/// The agent's connection.
pub(super) struct Connection(pub(super) UnixStream);

impl Connection {
    /// The next request; nothing at the end.
    pub(super) fn request(&self) -> Option<Request> {
        let mut header = [0; 10];
        (&self.0).read_exact(&mut header).ok()?;
        let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut body = vec![0; usize::try_from(word(0)).ok()?];
        (&self.0).read_exact(&mut body).ok()?;
        let Wire { method, payload, .. } = Wire::parse_from_bytes(&body).ok()?;
        Some(Request { stream_id: word(4), method, payload })
    }

    /// Answers with a payload.
    pub(super) fn respond(&self, stream_id: u32, payload: &[u8]) {
        self.frame(stream_id, MESSAGE_TYPE_RESPONSE, &response(Code::OK.into(), "", payload));
    }

    /// Answers with an error.
    pub(super) fn refuse(&self, stream_id: u32, code: protobuf::EnumOrUnknown<Code>, message: &str) {
        self.frame(stream_id, MESSAGE_TYPE_RESPONSE, &response(code, message, &[]));
    }

    /// Writes a frame of any type.
    pub(super) fn frame(&self, stream_id: u32, kind: u8, body: &[u8]) {
        let len = u32::try_from(body.len()).expect("short");
        self.raw(&header(len, stream_id, kind));
        self.raw(body);
    }

    /// Writes bytes.
    pub(super) fn raw(&self, bytes: &[u8]) {
        // A host that hung up reads no more.
        let _ = (&self.0).write_all(bytes);
    }

    /// Ends the connection.
    pub(super) fn close(&self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// A header, true or not.
pub(super) fn header(len: u32, stream_id: u32, kind: u8) -> Vec<u8> {
    [&len.to_be_bytes()[..], &stream_id.to_be_bytes(), &[kind, 0]].concat()
}

/// A response as it is in a frame.
pub(super) fn response(code: protobuf::EnumOrUnknown<Code>, message: &str, payload: &[u8]) -> Vec<u8> {
    let status = Status { code, message: message.to_owned(), ..Default::default() };
    let response = Response { status: Some(status).into(), payload: payload.to_vec(), ..Default::default() };
    response.write_to_bytes().expect("encoded")
}
