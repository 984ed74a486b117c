//! The two devices of a PC that a guest without firmware still uses.

pub mod i8042;
pub mod serial;
