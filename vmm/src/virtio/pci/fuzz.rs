//! Register accesses of a driver without rules.

use std::sync::mpsc;

use arbitrary::Arbitrary;

use super::*;
use crate::virtio::fuzz::{memory, steps};

/// 1, 2, 4 or 8 bytes, or what no processor does.
#[derive(Arbitrary, Debug)]
struct Access {
    at: u16,
    value: u64,
    len: u8,
}

impl Access {
    fn bytes(&self) -> Vec<u8> {
        self.value.to_le_bytes()[..usize::from(self.len % 9)].to_vec()
    }
}

#[derive(Arbitrary, Debug)]
enum Step {
    ReadConfig(Access),
    WriteConfig(Access),
    Read(Access),
    Write(Access),
    /// A register of the common configuration, which is where most of the state is.
    Common(u8, u32, bool),
    Unplug,
}

/// Accesses to a function's configuration space and to its window.
pub(crate) fn transport(data: &[u8]) {
    let (mut transport, _heard) = owed::transport(memory());
    for step in steps(data) {
        match step {
            Step::ReadConfig(access) => transport.read_config_space(usize::from(access.at % 512), &mut access.bytes()),
            Step::WriteConfig(access) => {
                let moved = transport.write_config_space(usize::from(access.at % 512), &access.bytes());
                assert!(moved.is_none_or(|window| window % WINDOW_LEN == 0 && window != 0));
            }
            Step::Read(access) => transport.read(u64::from(access.at) % WINDOW_LEN, &mut access.bytes()),
            Step::Write(access) => transport.write(u64::from(access.at) % WINDOW_LEN, &access.bytes()),
            Step::Common(register, value, wide) => {
                let bytes = value.to_le_bytes();
                transport.write((register % 0x38).into(), if wide { &bytes } else { &bytes[..2] });
            }
            Step::Unplug => transport.unplug(),
        }
    }
}

#[derive(Arbitrary, Debug)]
enum MsixStep {
    ReadTable(Access),
    WriteTable(Access),
    ReadPending(Access),
    Control { enabled: bool, masked: bool },
    Trigger(u16),
}

/// Accesses to a vector table, and interrupts.
pub(crate) fn msix(data: &[u8]) {
    let (messages, heard) = mpsc::channel();
    let table = msix::MsixTable::new(3, MessageTarget::Test(messages));
    let mut open = false;
    for step in steps(data) {
        match step {
            MsixStep::ReadTable(access) => table.read_table(access.at.into(), &mut access.bytes()),
            MsixStep::WriteTable(access) => table.write_table(access.at.into(), &access.bytes()),
            MsixStep::ReadPending(access) => table.read_pending(access.at.into(), &mut access.bytes()),
            MsixStep::Control { enabled, masked } => {
                open = enabled && !masked;
                table.set_control(enabled, masked);
            }
            MsixStep::Trigger(vector) => drop(table.interrupt(vector % 5).trigger()),
        }
        let sent = heard.try_iter().count();
        assert!(sent <= table.len() && (open || sent == 0), "{sent} messages, open: {open}");
    }
}
