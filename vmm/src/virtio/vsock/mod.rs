//! Socket device (VIRTIO 1.2, 5.10): streams between the guest's ports and Unix sockets of the host, in this process.
//!
//! The guest connects to the ports that the configuration declares; every other connection is reset. A connection is one end
//! of a socket pair whose other end goes to the port's owner as a descriptor, so nothing is looked up by name.

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use thiserror::Error;
use vmm_api::VsockConfig;

use super::{ActivateError, Activation, SHARED_VECTORS, VirtioDevice};
use crate::event_loop::{Registry, lock};
use muxer::Muxer;
#[cfg(any(test, fuzzing))]
pub(crate) use muxer::fuzz::fuzz;

mod buffers;
mod connection;
mod muxer;
mod packet;

const VIRTIO_ID_VSOCK: u16 = 19;
/// Receive, transmit and event queue. The first is short: our guest kernel fills it with buffers of 32 KiB, where others' have 4 KiB.
const QUEUE_SIZES: [u16; 3] = [32, 256, 16];
/// 0 to 2 are reserved (VIRTIO 1.2, 5.10.4).
const FIRST_GUEST_CID: u32 = 3;

/// Why there is no socket device.
#[derive(Debug, Error)]
pub enum VsockError {
    /// The context id is reserved.
    #[error("guest context id {0} is reserved: use 3 or more")]
    ReservedCid(u32),
}

/// The device; works on the event loop.
pub struct Vsock {
    config: [u8; 8],
    guest_cid: u64,
    host_ports: Arc<Vec<(u32, OwnedFd)>>,
    registry: Registry,
    active: Option<Arc<Mutex<Muxer>>>,
}

impl Vsock {
    /// Makes the device; `host_ports` are the ports that the guest may connect to, with the sockets of their owners.
    ///
    /// # Errors
    /// [`VsockError::ReservedCid`].
    pub fn new(config: &VsockConfig, host_ports: Vec<(u32, OwnedFd)>, registry: Registry) -> Result<Self, VsockError> {
        if config.guest_cid < FIRST_GUEST_CID {
            return Err(VsockError::ReservedCid(config.guest_cid));
        }
        let guest_cid = u64::from(config.guest_cid);
        let host_ports = Arc::new(host_ports);
        Ok(Self { config: guest_cid.to_le_bytes(), guest_cid, host_ports, registry, active: None })
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Linux is interrupted for what it sent and for what it gets.
    fn vectors(&self) -> usize {
        SHARED_VECTORS
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.config)
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let muxer = Muxer::start(activation, self.guest_cid, self.host_ports.clone(), self.registry.clone())?;
        self.active = Some(muxer);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(muxer) = self.active.take() {
            lock(&muxer).stop();
        }
    }
}
