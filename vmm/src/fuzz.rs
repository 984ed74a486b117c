//! What the fuzzers in `tests/fuzz` call: each takes bytes, makes of them what a guest or its driver does, and panics when the
//! device does what it must not. Compiled for fuzzing and for the unit tests only.

use crate::virtio::{balloon, fs, net, pci, rng, vsock};

/// Rings of the entropy device, a walk of descriptor chains and little else, and of the balloon.
pub fn rings(data: &[u8]) {
    rng::fuzz(data);
    balloon::fuzz(data);
}

/// Packets, rings, and sockets of the host.
pub fn vsock_packets(data: &[u8]) {
    vsock::fuzz(data);
}

/// FUSE requests. The process should have a limit of file sizes.
pub fn fuse_requests(data: &[u8]) {
    fs::fuzz(data);
}

/// Frames of the guest.
pub fn net_tx(data: &[u8]) {
    net::fuzz::tx(data);
}

/// Frames of the host, and the guest's buffers for them.
pub fn net_rx(data: &[u8]) {
    net::fuzz::rx(data);
}

/// Bytes from the other side of a stream socket.
pub fn net_stream(data: &[u8]) {
    net::fuzz::stream(data);
}

/// Commands of a network driver.
pub fn net_control(data: &[u8]) {
    net::fuzz::control(data);
}

/// Configuration space and registers of a device.
pub fn pci_transport(data: &[u8]) {
    pci::fuzz::transport(data);
}

/// The vector table.
pub fn msix_table(data: &[u8]) {
    pci::fuzz::msix(data);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_takes_its_bytes() {
        let targets: [fn(&[u8]); 9] =
            [rings, vsock_packets, fuse_requests, net_tx, net_rx, net_stream, net_control, pci_transport, msix_table];
        let counting: Vec<u8> = (0..=255).collect();
        for target in targets {
            [&[], &[0; 64][..], &counting].into_iter().for_each(target);
        }
    }
}
