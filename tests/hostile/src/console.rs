//! The serial console: one line for each verdict.

use core::fmt::{self, Write};

use crate::machine::write_port_string;

const COM1: u16 = 0x3f8;

/// Writes to the console.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write_port_string(COM1, text.as_bytes());
        Ok(())
    }
}

/// Prints a line.
macro_rules! say {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        // The console takes everything.
        let _ = writeln!($crate::console::Console, $($argument)*);
    }};
}
pub(crate) use say;
