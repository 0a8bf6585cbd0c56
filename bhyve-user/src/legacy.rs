//! Ports a PC has that do next to nothing: POST codes and system control A.

use std::sync::Arc;

use crate::bus::{BusError, Buses, PortDevice};
use crate::machine::{Machine, Suspend};

/// POST codes; Linux also writes here to wait a microsecond.
const POST: [u16; 2] = [0x80, 0x84];
/// System control port A: fast A20 and fast reset.
const CONTROL_A: u16 = 0x92;
const A20: u32 = 2;

/// The ports.
pub struct Legacy {
    machine: Arc<dyn Machine>,
}

impl Legacy {
    /// Claims them.
    pub fn attach(machine: Arc<dyn Machine>, buses: &Buses) -> Result<(), BusError> {
        let slot = buses
            .ports
            .claim(CONTROL_A, 1, Arc::new(Legacy { machine }))?;
        POST.iter()
            .try_for_each(|&port| buses.ports.map(slot, port, 1))
    }
}

impl PortDevice for Legacy {
    fn port_read(&self, port: u16, _size: u8) -> Option<u32> {
        Some(if port == CONTROL_A { A20 } else { 0xff })
    }
    fn port_write(&self, port: u16, _size: u8, value: u32) -> bool {
        if port == CONTROL_A && value & 1 != 0 {
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
    fn only_bit_0_of_port_0x92_resets() {
        let (buses, fake) = (Buses::default(), Fake::new());
        Legacy::attach(fake.clone(), &buses).unwrap();
        let d = buses.ports.get(0x92).unwrap();
        assert_eq!(d.port_read(0x92, 1), Some(2), "A20 is on");
        d.port_write(0x92, 1, 2);
        d.port_write(0x80, 1, 1);
        assert_eq!(fake.take(), []);
        d.port_write(0x92, 1, 3);
        assert_eq!(fake.take(), [Event::Suspend(Suspend::Reset)]);
    }
}
