//! The serial console (8250 at port 0x3f8): everything the guest writes is kept in a ring for error reports, and also goes
//! to a descriptor when the caller wants to see it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use crate::bus::BusDevice;
use crate::event_loop::lock;

/// First port.
pub const PORT: u64 = 0x3f8;
/// Number of ports.
pub const PORT_COUNT: u64 = 8;
/// Bytes kept of what the guest wrote last.
const TAIL_LEN: usize = 4096;

/// The last bytes of the console.
#[derive(Clone, Default)]
pub struct ConsoleTail(Arc<Mutex<VecDeque<u8>>>);

impl ConsoleTail {
    /// The last lines as text.
    #[must_use]
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = lock(&self.0).iter().copied().collect();
        String::from_utf8_lossy(&bytes).replace('\r', "").trim_end().to_owned()
    }

    fn push(&self, bytes: &[u8]) {
        let mut tail = lock(&self.0);
        tail.extend(bytes);
        let excess = tail.len().saturating_sub(TAIL_LEN);
        tail.drain(..excess);
    }
}

/// Where the guest's bytes go.
pub struct Output {
    tail: ConsoleTail,
    console: Option<File>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.push(bytes);
        if let Some(console) = &mut self.console {
            // A console that nobody reads any more must not stop the guest.
            let _ = console.write_all(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The console has no interrupt: the kernel polls it, and nothing is ever typed into it.
pub struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The device.
pub struct SerialConsole(Serial<NoInterrupt, NoEvents, Output>);

impl SerialConsole {
    /// Makes the console.
    #[must_use]
    pub fn new(tail: ConsoleTail, console: Option<File>) -> Self {
        Self(Serial::new(NoInterrupt, Output { tail, console }))
    }
}

impl BusDevice for SerialConsole {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // Neither our interrupt nor our output fails.
            let _ = self.0.write(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BusDevice as _, ConsoleTail, SerialConsole, TAIL_LEN};

    #[test]
    fn the_tail_keeps_the_last_bytes_only() {
        let tail = ConsoleTail::default();
        let mut console = SerialConsole::new(tail.clone(), None);
        for _ in 0..2 * TAIL_LEN {
            console.write(0, b"x");
        }
        console.write(0, b"!");
        assert_eq!(tail.text().len(), TAIL_LEN);
        assert!(tail.text().ends_with("x!"));
    }
}
