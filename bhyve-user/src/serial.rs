//! Serial ports: a 16550 ([`uart`]), what it is connected to ([`backend`]) and
//! the threads between the two ([`port`]).

pub mod backend;
pub mod bvmcons;
pub mod port;
pub mod terminal;
pub mod uart;

/// A PC's first two serial ports.
pub const LEGACY: [Legacy; 2] = [
    Legacy {
        name: "COM1",
        base: 0x3f8,
        irq: 4,
    },
    Legacy {
        name: "COM2",
        base: 0x2f8,
        irq: 3,
    },
];

/// Where a PC expects a serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Legacy {
    /// Its name in ACPI's namespace.
    pub name: &'static str,
    /// First of its eight ports.
    pub base: u16,
    /// Its ISA interrupt.
    pub irq: u8,
}
