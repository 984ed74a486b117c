//! Messages that KVM sends for others: it turns a write to an eventfd (irqfd) into what a route says. The vectors (`msix.rs`) say
//! when a line works, and with which message. Used on the thread of devices only, whose filter has these ioctls.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::transport::{high, low};
use crate::event_loop::lock;

/// Lines of one device, more than it has vectors.
const LINES_PER_DEVICE: u32 = 32;

/// What a vector sends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Message {
    pub(super) address: u64,
    pub(super) data: u32,
}

/// First line of the device in a slot.
pub(super) fn first_gsi(slot_index: usize) -> u32 {
    u32::try_from(slot_index).expect("at most 31") * LINES_PER_DEVICE
}

/// The routes of a VM.
pub(super) struct Routes {
    pub(super) vm: Arc<VmFd>,
    messages: Mutex<BTreeMap<u32, Message>>,
}

impl Routes {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, messages: Mutex::default() }
    }

    /// Has a write to `eventfd` send `message` by the line `gsi`, whether it sent another before or none.
    pub(super) fn connect(&self, eventfd: &EventFd, gsi: u32, message: Message, connected: bool) -> io::Result<()> {
        self.set(gsi, message)?;
        if !connected {
            // What was written before is sent now.
            self.vm.register_irqfd(eventfd, gsi)?;
        }
        Ok(())
    }

    /// Lets writes to `eventfd` add up until it is connected again.
    pub(super) fn disconnect(&self, eventfd: &EventFd, gsi: u32) {
        // It was connected to the same line, so KVM knows it.
        let _ = self.vm.unregister_irqfd(eventfd, gsi);
    }

    /// KVM takes all routes at once. A route without an eventfd costs nothing and stays.
    fn set(&self, gsi: u32, message: Message) -> io::Result<()> {
        let mut messages = lock(&self.messages);
        let before = messages.insert(gsi, message);
        if before == Some(message) {
            return Ok(());
        }
        let table = KvmIrqRouting::from_entries(&entries(&messages)).map_err(|_| io::ErrorKind::InvalidInput)?;
        let set = self.vm.set_gsi_routing(&table);
        if set.is_err() {
            match before {
                Some(before) => messages.insert(gsi, before),
                None => messages.remove(&gsi),
            };
        }
        Ok(set?)
    }
}

fn entries(messages: &BTreeMap<u32, Message>) -> Vec<kvm_irq_routing_entry> {
    let entry = |(gsi, message): (&u32, &Message)| {
        let mut entry = kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        let (address_lo, address_hi) = (low(message.address), high(message.address));
        entry.u.msi = kvm_irq_routing_msi { address_lo, address_hi, data: message.data, ..Default::default() };
        entry
    };
    messages.iter().map(entry).collect()
}
