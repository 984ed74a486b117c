//! The packet header (VIRTIO 1.2, 5.10.6): 44 bytes, little-endian.

/// Length of a header, in bytes.
pub(super) const HEADER_LEN: u32 = 44;

/// A header as it is in memory.
pub(super) type HeaderBytes = [u8; HEADER_LEN as usize];
/// Longest payload of one packet, in bytes (what Linux sends at most).
pub(super) const MAX_PAYLOAD_LEN: u32 = 64 << 10;

pub(super) const VIRTIO_VSOCK_TYPE_STREAM: u16 = 1;
pub(super) const VIRTIO_VSOCK_OP_REQUEST: u16 = 1;
pub(super) const VIRTIO_VSOCK_OP_RESPONSE: u16 = 2;
pub(super) const VIRTIO_VSOCK_OP_RST: u16 = 3;
pub(super) const VIRTIO_VSOCK_OP_SHUTDOWN: u16 = 4;
pub(super) const VIRTIO_VSOCK_OP_RW: u16 = 5;
pub(super) const VIRTIO_VSOCK_OP_CREDIT_UPDATE: u16 = 6;
pub(super) const VIRTIO_VSOCK_OP_CREDIT_REQUEST: u16 = 7;
pub(super) const VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: u32 = 1;
pub(super) const VIRTIO_VSOCK_SHUTDOWN_F_SEND: u32 = 2;

/// `virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) typ: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn decode(bytes: &HeaderBytes) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            typ: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub(super) fn encode(&self) -> HeaderBytes {
        let mut bytes: HeaderBytes = [0; HEADER_LEN as usize];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.typ.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Ports of one connection.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

impl Ports {
    /// Of a packet that the guest has sent.
    pub(super) fn of_request(header: &Header) -> Self {
        Self { host: header.dst_port, guest: header.src_port }
    }

    /// Of a packet that is for the guest.
    pub(super) fn of_answer(header: &Header) -> Self {
        Self { host: header.src_port, guest: header.dst_port }
    }

    /// For the event loop.
    pub(super) fn token(self) -> u64 {
        // Host port 0 is never declared, so no token is one of the queues'.
        u64::from(self.host) << 32 | u64::from(self.guest)
    }

    pub(super) fn from_token(token: u64) -> Self {
        let [g0, g1, g2, g3, h0, h1, h2, h3] = token.to_le_bytes();
        Self { host: u32::from_le_bytes([h0, h1, h2, h3]), guest: u32::from_le_bytes([g0, g1, g2, g3]) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{HEADER_LEN, Header, HeaderBytes};

    proptest! {
        #[test]
        fn every_header_survives_a_round_trip(bytes in prop::array::uniform32(any::<u8>()), rest in any::<[u8; 12]>()) {
            let mut all: HeaderBytes = [0; HEADER_LEN as usize];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::decode(&all).encode(), all);
        }
    }
}
