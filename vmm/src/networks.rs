//! The network interfaces of a VM: plugged in at its start or later, controlled and counted by name.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use thiserror::Error;
use vmm_api::net::{NetDevice, NetStats};

use crate::event_loop::Registry;
use crate::virtio::net::{Net, NetError, NetHandle};
use crate::virtio::pci::{PciBus, PciError};

/// Why an interface is not there.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The device cannot work.
    #[error("cannot make the network interface {name:?}")]
    Device {
        /// Its name.
        name: String,
        /// Why.
        source: NetError,
    },
    /// The bus does not take it, or has none of the name.
    #[error(transparent)]
    Pci(#[from] PciError),
}

/// All interfaces.
pub struct Networks {
    pci: Arc<PciBus>,
    registry: Registry,
    handles: Vec<NetHandle>,
}

impl Networks {
    /// None yet.
    #[must_use]
    pub fn new(pci: Arc<PciBus>, registry: Registry) -> Self {
        Self { pci, registry, handles: Vec::new() }
    }

    /// Plugs an interface in.
    ///
    /// # Errors
    /// Each variant of [`NetworkError`].
    pub fn add(&mut self, device: NetDevice, fds: Vec<OwnedFd>) -> Result<(), NetworkError> {
        let name = device.name.clone();
        let registry = self.registry.clone();
        let opened = self.pci.device_thread().call(move || Net::open(device, fds, registry));
        let net = opened.map_err(|source| NetworkError::Device { name: name.clone(), source })?;
        let handle = net.handle();
        self.pci.add(&bus_name(&name), Box::new(net))?;
        self.handles.push(handle);
        Ok(())
    }

    /// Pulls an interface out.
    ///
    /// # Errors
    /// [`NetworkError::Pci`].
    pub fn remove(&mut self, name: &str) -> Result<(), NetworkError> {
        self.pci.remove(&bus_name(name))?;
        self.handles.retain(|handle| handle.name() != name);
        Ok(())
    }

    /// Gives the guest a carrier or takes it away.
    ///
    /// # Errors
    /// [`NetworkError::Pci`].
    pub fn set_link(&self, name: &str, up: bool) -> Result<(), NetworkError> {
        let found = self.handles.iter().find(|handle| handle.name() == name);
        found.ok_or_else(|| PciError::NotFound { name: bus_name(name) })?.set_link(up);
        Ok(())
    }

    /// What each has carried.
    #[must_use]
    pub fn stats(&self) -> Vec<NetStats> {
        self.handles.iter().map(NetHandle::stats).collect()
    }
}

/// What the bus calls the interface `name`.
fn bus_name(name: &str) -> String {
    format!("network {name}")
}
