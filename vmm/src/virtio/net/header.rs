//! The header before each frame (VIRTIO 1.2, 5.1.6), and what of a guest's is passed on to the host's kernel.

use thiserror::Error;

/// Length of `virtio_net_hdr` with `num_buffers`, as VIRTIO 1.0 and later have it.
pub(super) const HEADER_LEN: usize = 12;
/// Where `num_buffers` is.
pub(super) const NUM_BUFFERS: usize = 10;

const VIRTIO_NET_HDR_F_NEEDS_CSUM: u8 = 1;
const VIRTIO_NET_HDR_GSO_NONE: u8 = 0;
const VIRTIO_NET_HDR_GSO_TCPV4: u8 = 1;
const VIRTIO_NET_HDR_GSO_TCPV6: u8 = 4;
const VIRTIO_NET_HDR_GSO_UDP_L4: u8 = 5;
const VIRTIO_NET_HDR_GSO_ECN: u8 = 0x80;

pub(super) const VIRTIO_NET_F_CSUM: u64 = 1 << 0;
pub(super) const VIRTIO_NET_F_HOST_TSO4: u64 = 1 << 11;
pub(super) const VIRTIO_NET_F_HOST_TSO6: u64 = 1 << 12;
pub(super) const VIRTIO_NET_F_HOST_ECN: u64 = 1 << 13;
pub(super) const VIRTIO_NET_F_HOST_USO: u64 = 1 << 56;

/// Linux never makes smaller segments (48 bytes less 40 of options). One byte each would make 65,000 packets of one.
const MIN_GSO_SIZE: u16 = 8;

/// What is wrong with a header.
#[derive(Debug, Error, Eq, PartialEq)]
pub(super) enum Malformed {
    #[error("checksum or segmentation was not negotiated")]
    NotNegotiated,
    #[error("the checksum lies outside the frame")]
    Checksum,
    #[error("the segmentation makes no sense")]
    Segmentation,
}

/// Checks the header of a frame of `frame_len` bytes in place, and clears what means nothing to the host.
pub(super) fn check(header: &mut [u8; HEADER_LEN], frame_len: usize, features: u64) -> Result<Segmented, Malformed> {
    let field = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (header_len, gso_size, csum_start, csum_offset) = (field(2), field(4), field(6), field(8));
    let (needs_csum, gso_type) = (header[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0, header[1]);
    header[0] &= VIRTIO_NET_HDR_F_NEEDS_CSUM;
    header[NUM_BUFFERS..].fill(0);
    if needs_csum {
        if features & VIRTIO_NET_F_CSUM == 0 {
            return Err(Malformed::NotNegotiated);
        }
        if csum_start + csum_offset + 2 > frame_len {
            return Err(Malformed::Checksum);
        }
    }
    let negotiated = match gso_type & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE if gso_type == VIRTIO_NET_HDR_GSO_NONE => {
            header[2..6].fill(0);
            return Ok(Segmented(false));
        }
        VIRTIO_NET_HDR_GSO_TCPV4 => VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_HDR_GSO_TCPV6 => VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_HDR_GSO_UDP_L4 => VIRTIO_NET_F_HOST_USO,
        _ => return Err(Malformed::Segmentation),
    };
    let ecn = if gso_type & VIRTIO_NET_HDR_GSO_ECN == 0 { 0 } else { VIRTIO_NET_F_HOST_ECN };
    if features & (negotiated | ecn) != negotiated | ecn {
        return Err(Malformed::NotNegotiated);
    }
    // The host makes the checksums of the segments, so the guest must have asked for them (VIRTIO 1.2, 5.1.6.2.1).
    if !needs_csum || gso_size < MIN_GSO_SIZE.into() || header_len > frame_len {
        return Err(Malformed::Segmentation);
    }
    Ok(Segmented(true))
}

/// Whether the host cuts the frame into segments, so that it may be longer than the MTU.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Segmented(pub(super) bool);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = VIRTIO_NET_F_CSUM
        | VIRTIO_NET_F_HOST_TSO4
        | VIRTIO_NET_F_HOST_TSO6
        | VIRTIO_NET_F_HOST_ECN
        | VIRTIO_NET_F_HOST_USO;

    fn header(flags: u8, gso_type: u8, words: [u16; 4]) -> [u8; HEADER_LEN] {
        let mut bytes = [flags, gso_type].to_vec();
        words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes.extend([0xff, 0xff]);
        bytes.try_into().expect("a header")
    }

    #[test]
    fn a_plain_frame_passes_without_what_means_nothing() {
        let mut plain = header(0xfe, 0, [7, 7, 0, 0]);
        assert_eq!(check(&mut plain, 60, 0), Ok(Segmented(false)));
        assert_eq!(plain, [0; HEADER_LEN]);
    }

    #[test]
    fn a_large_tcp_frame_passes_when_it_was_negotiated() {
        let large = header(1, VIRTIO_NET_HDR_GSO_TCPV4, [66, 1448, 34, 16]);
        assert_eq!(check(&mut large.clone(), 60_000, ALL), Ok(Segmented(true)));
        assert_eq!(check(&mut large.clone(), 60_000, VIRTIO_NET_F_CSUM), Err(Malformed::NotNegotiated));
        assert_eq!(check(&mut large.clone(), 60_000, 0), Err(Malformed::NotNegotiated));
        let ecn = header(1, VIRTIO_NET_HDR_GSO_TCPV6 | VIRTIO_NET_HDR_GSO_ECN, [66, 1448, 34, 16]);
        assert_eq!(check(&mut ecn.clone(), 60_000, ALL), Ok(Segmented(true)));
        assert_eq!(check(&mut ecn.clone(), 60_000, ALL & !VIRTIO_NET_F_HOST_ECN), Err(Malformed::NotNegotiated));
    }

    #[test]
    fn offsets_outside_the_frame_are_refused() {
        assert_eq!(check(&mut header(1, 0, [0, 0, 34, 25]), 60, ALL), Err(Malformed::Checksum));
        assert_eq!(check(&mut header(1, 0, [0, 0, 34, 24]), 60, ALL), Ok(Segmented(false)));
        assert_eq!(check(&mut header(1, 0, [0, 0, 0xffff, 0xffff]), 60, ALL), Err(Malformed::Checksum));
        let long_header = header(1, VIRTIO_NET_HDR_GSO_TCPV4, [61, 1448, 34, 16]);
        assert_eq!(check(&mut long_header.clone(), 60, ALL), Err(Malformed::Segmentation));
    }

    #[test]
    fn segments_of_no_size_or_without_checksums_or_of_unknown_kind_are_refused() {
        let tcp = |flags, gso_type, size| check(&mut header(flags, gso_type, [0, size, 34, 16]), 6000, ALL);
        assert_eq!(tcp(1, VIRTIO_NET_HDR_GSO_TCPV4, 0), Err(Malformed::Segmentation));
        assert_eq!(tcp(1, VIRTIO_NET_HDR_GSO_TCPV4, 7), Err(Malformed::Segmentation));
        assert_eq!(tcp(0, VIRTIO_NET_HDR_GSO_TCPV4, 1448), Err(Malformed::Segmentation));
        assert_eq!(tcp(1, 3, 1448), Err(Malformed::Segmentation));
        assert_eq!(tcp(1, VIRTIO_NET_HDR_GSO_ECN, 1448), Err(Malformed::Segmentation));
    }

    /// Every kind of segmentation and every flag, with each field at each of its edges.
    #[test]
    fn exhaustive_what_passes_lies_in_the_frame() {
        const FRAME_LEN: u16 = 60;
        let edges =
            [0, 1, MIN_GSO_SIZE - 1, MIN_GSO_SIZE, FRAME_LEN - 2, FRAME_LEN - 1, FRAME_LEN, FRAME_LEN + 1, u16::MAX];
        let words: Vec<[u16; 2]> = edges.into_iter().flat_map(|one| edges.map(|other| [one, other])).collect();
        for (flags, gso_type) in (0..4).flat_map(|flags| (0..=u8::MAX).map(move |gso_type| (flags, gso_type))) {
            for ([header_len, gso_size], [start, offset]) in
                words.iter().flat_map(|a| words.iter().map(move |b| (a, b)))
            {
                let mut bytes = header(flags, gso_type, [*header_len, *gso_size, *start, *offset]);
                if let Ok(Segmented(segmented)) = check(&mut bytes, FRAME_LEN.into(), ALL) {
                    let field = |at: usize| u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
                    let checksum_end = field(6) + field(8) + 2;
                    assert!(bytes[0] == 0 || bytes[0] == 1 && checksum_end <= FRAME_LEN.into(), "{bytes:?}");
                    assert!(!segmented || bytes[0] == 1 && field(4) >= MIN_GSO_SIZE.into(), "{bytes:?}");
                    assert!(field(2) <= FRAME_LEN.into(), "{bytes:?}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn what_passes_lies_in_the_frame(mut bytes: [u8; HEADER_LEN], frame_len in 14_usize..70_000, features: u64) {
            if let Ok(Segmented(segmented)) = check(&mut bytes, frame_len, features) {
                let field = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
                prop_assert!(bytes[0] & !1 == 0 && (bytes[0] == 0 || field(6) + field(8) + 2 <= frame_len));
                prop_assert_eq!(segmented, bytes[1] != 0);
                prop_assert!(field(2) <= frame_len && (!segmented || field(4) >= 8));
            }
        }
    }
}
