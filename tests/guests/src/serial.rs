//! COM1, polled.

use crate::cpu::{inb, outb};
use core::fmt;

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// The console.
#[derive(Debug, Clone, Copy)]
pub struct Console;

/// 115200 baud, 8 data bits; a 16550 comes out of reset with 5.
pub fn init() {
    const LINE_CONTROL: u16 = COM1 + 3;
    const DIVISOR_LATCH: u8 = 0x80;
    const EIGHT_BITS: u8 = 3;
    outb(LINE_CONTROL, DIVISOR_LATCH | EIGHT_BITS);
    outb(COM1, 1);
    outb(COM1 + 1, 0);
    outb(LINE_CONTROL, EIGHT_BITS);
}

fn put(byte: u8) {
    // Bounded: a guest must come to its end even where the UART is broken.
    for _ in 0..100_000 {
        if inb(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
            break;
        }
    }
    outb(COM1, byte);
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

/// Prints to COM1.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => {{
        use core::fmt::Write as _;
        // The console never fails.
        let _ = write!($crate::serial::Console, $($arg)*);
    }};
}

/// Prints a line to COM1.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($arg:tt)*) => {{
        $crate::print!($($arg)*);
        $crate::print!("\n");
    }};
}
