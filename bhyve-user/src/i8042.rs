//! A keyboard controller without a keyboard: it passes its self-test, says
//! that nothing is plugged in, and pulses the reset line, which is what guests
//! without ACPI reboot by (Intel 8042; IBM PC AT Technical Reference).

use std::sync::{Arc, Mutex};

use crate::bus::{BusError, Buses, PortDevice};
use crate::lock;
use crate::machine::{Machine, Suspend};

const DATA: u16 = 0x60;
const COMMAND: u16 = 0x64;
const OUTPUT_FULL: u8 = 1;
const SELF_TEST_PASSED: u8 = 4;

struct State {
    output: Option<u8>,
    /// The command byte, and whether the next data byte goes there.
    mode: u8,
    mode_next: bool,
    output_port_next: bool,
}

/// The controller at ports 0x60 and 0x64.
pub struct I8042 {
    state: Mutex<State>,
    machine: Arc<dyn Machine>,
}

impl I8042 {
    /// Claims the ports.
    pub fn attach(machine: Arc<dyn Machine>, buses: &Buses) -> Result<(), BusError> {
        let state = State {
            output: None,
            mode: SELF_TEST_PASSED,
            mode_next: false,
            output_port_next: false,
        };
        let device = Arc::new(I8042 {
            state: Mutex::new(state),
            machine,
        });
        let slot = buses.ports.claim(DATA, 1, device)?;
        buses.ports.map(slot, COMMAND, 1)
    }

    fn command(&self, state: &mut State, command: u8) {
        (state.mode_next, state.output_port_next) = (false, false);
        match command {
            0x20 => state.output = Some(state.mode),
            0x60 => state.mode_next = true,
            // Tests: the second port's and the keyboard's clock lines are
            // stuck low, as without a plug.
            0xa9 | 0xab => state.output = Some(1),
            0xaa => state.output = Some(0x55),
            // Input port, and output port with A20 on.
            0xc0 => state.output = Some(0),
            0xd0 => state.output = Some(3),
            0xd1 => state.output_port_next = true,
            // Pulses output lines; line 0 is the CPU's reset, active low.
            0xf0..=0xff if command & 1 == 0 => self.machine.suspend(Suspend::Reset),
            _ => {}
        }
    }
}

impl PortDevice for I8042 {
    fn port_read(&self, port: u16, _size: u8) -> Option<u32> {
        let mut state = lock(&self.state);
        let full = if state.output.is_some() {
            OUTPUT_FULL
        } else {
            0
        };
        Some(match port {
            DATA => state.output.take().unwrap_or(0).into(),
            _ => (SELF_TEST_PASSED | full).into(),
        })
    }

    fn port_write(&self, port: u16, _size: u8, value: u32) -> bool {
        let mut state = lock(&self.state);
        let value = value as u8;
        if port == COMMAND {
            self.command(&mut state, value);
        } else if std::mem::take(&mut state.mode_next) {
            state.mode = value;
        } else if std::mem::take(&mut state.output_port_next) && value & 1 == 0 {
            self.machine.suspend(Suspend::Reset);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::{Event, Fake};

    #[test]
    fn a_driver_finds_the_controller_and_no_keyboard() {
        let buses = Buses::default();
        I8042::attach(Fake::new(), &buses).unwrap();
        let d = buses.ports.get(0x64).unwrap();
        assert_eq!(d.port_read(0x64, 1), Some(4), "ready for a command");
        d.port_write(0x64, 1, 0xaa);
        assert_eq!(d.port_read(0x64, 1), Some(5));
        assert_eq!(d.port_read(0x60, 1), Some(0x55));
        d.port_write(0x64, 1, 0x60);
        d.port_write(0x60, 1, 0x65);
        d.port_write(0x64, 1, 0x20);
        assert_eq!(d.port_read(0x60, 1), Some(0x65));
        d.port_write(0x64, 1, 0xab);
        assert_ne!(d.port_read(0x60, 1), Some(0));
        assert_eq!(d.port_read(0x64, 1), Some(4));
    }

    #[test]
    fn the_reset_line_resets() {
        let (buses, fake) = (Buses::default(), Fake::new());
        I8042::attach(fake.clone(), &buses).unwrap();
        buses.ports.get(0x64).unwrap().port_write(0x64, 1, 0xfe);
        assert_eq!(fake.take(), [Event::Suspend(Suspend::Reset)]);
    }
}
