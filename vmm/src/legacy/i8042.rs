//! The keyboard controller, of which only the reset line exists.

use vmm_api::control::ExitReason;

use crate::bus::BusDevice;
use crate::exit::ExitSignal;

/// First port; the command port is 4 further.
pub const PORT: u64 = 0x60;
/// Number of ports.
pub const PORT_COUNT: u64 = 5;
const COMMAND_OFFSET: u64 = 4;
const COMMAND_PULSE_RESET: u8 = 0xfe;

/// The controller.
pub struct I8042 {
    exit: ExitSignal,
}

impl I8042 {
    /// A reset ends the VM through `exit`.
    #[must_use]
    pub fn new(exit: ExitSignal) -> Self {
        Self { exit }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Status: nothing to read, ready to be written.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == COMMAND_OFFSET && data == [COMMAND_PULSE_RESET] {
            self.exit.end(ExitReason::GuestReset);
        }
    }
}
