//! The attacks, by what they are aimed at.

mod balloon;
mod cpu;
mod exchange;
mod fs;
mod net;
mod pci;
mod rings;
mod transport;
mod vsock;

use crate::Report;
use crate::virtio::{Device, Kind};

/// Everything that can be done to one device.
pub fn on_device(report: &mut Report, device: &Device) {
    report.tell(format_args!("{}/works", device.kind.name()), exchange::works(device));
    transport::attack(report, device);
    pci::attack(report, device);
    rings::attack(report, device);
    match device.kind {
        Kind::Vsock => vsock::attack(report, device),
        Kind::Fs => fs::attack(report, device),
        Kind::Net => net::attack(report, device),
        Kind::Balloon => balloon::attack(report, device),
        Kind::Rng => {}
    }
}

/// What belongs to no device.
pub fn on_machine(report: &mut Report) {
    pci::attack_bus(report);
    cpu::attack(report);
}
