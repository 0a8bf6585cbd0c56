//! ACPI fixed hardware: the PM1 event and control blocks, the SMI command port
//! and the reset register (ACPI 6.5 §4.8.3). The PM timer is the kernel's.

use std::sync::{Arc, Mutex};

use crate::bus::{BusError, Buses, PortDevice};
use crate::lock;
use crate::machine::{Machine, Suspend};

/// The ISA interrupt of the SCI.
pub const SCI: u8 = 9;
/// PM1a event block: status, then enable.
pub const PM1_EVENT: u16 = 0x400;
/// PM1a control block.
pub const PM1_CONTROL: u16 = 0x404;
/// PM timer.
pub const PM_TIMER: u16 = 0x408;
/// SMI command port, with its two commands.
pub const SMI_COMMAND: u16 = 0xb2;
/// Turns ACPI on.
pub const ACPI_ENABLE: u8 = 0xa0;
/// Turns ACPI off.
pub const ACPI_DISABLE: u8 = 0xa1;
/// Reset control register; writing 6 resets.
pub const RESET: u16 = 0xcf9;
/// SLP_TYP of S5, as the DSDT's `_S5` says.
pub const SLP_TYP_S5: u16 = 5;

const POWER_BUTTON: u16 = 0x0100;
/// Status bits that software clears by writing ones.
const STATUS_CLEARABLE: u16 = 0x8000 | 0x0400 | 0x0200 | POWER_BUTTON | 0x0010;
/// Enable bits that stick: power button, and global lock and RTC alarm, which
/// never happen. ACPICA complains where one that it set reads as zero, and
/// Linux has it set the RTC's though the FADT says that it is not there.
const ENABLE_KEPT: u16 = POWER_BUTTON | 0x0020 | 0x0400;
const SCI_EN: u16 = 1;
const SLP_EN: u16 = 0x2000;
const CONTROL_KEPT: u16 = !(SLP_EN | 0xc003);

#[derive(Default)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
    reset: u8,
    sci: bool,
}

/// The power-management block.
pub struct Pm {
    state: Mutex<State>,
    machine: Arc<dyn Machine>,
}

impl Pm {
    /// Makes the SCI level triggered and claims the ports.
    pub fn new(machine: Arc<dyn Machine>, buses: &Buses) -> Result<Arc<Pm>, BusError> {
        machine.isa_level_triggered(SCI);
        let pm = Arc::new(Pm {
            state: Mutex::default(),
            machine,
        });
        let slot = buses.ports.claim(PM1_EVENT, 6, pm.clone())?;
        buses.ports.map(slot, SMI_COMMAND, 1)?;
        buses.ports.map(slot, RESET, 1)?;
        Ok(pm)
    }

    /// Presses the power button; false if the guest has not asked to hear it.
    pub fn press_power_button(&self) -> bool {
        let mut state = lock(&self.state);
        if state.control & SCI_EN == 0 || state.enable & POWER_BUTTON == 0 {
            return false;
        }
        state.status |= POWER_BUTTON;
        self.update_sci(&mut state);
        true
    }

    fn update_sci(&self, state: &mut State) {
        let level = state.status & state.enable != 0;
        if level != state.sci {
            state.sci = level;
            if level {
                self.machine.isa_assert(SCI, Some(SCI));
            } else {
                self.machine.isa_deassert(SCI, Some(SCI));
            }
        }
    }

    /// One byte of the six from 0x400 on.
    fn read_byte(state: &State, offset: u16) -> u8 {
        let word = match offset / 2 {
            0 => state.status,
            1 => state.enable,
            _ => state.control,
        };
        (word >> (8 * (offset & 1))) as u8
    }

    fn write_byte(&self, state: &mut State, offset: u16, value: u8) {
        let shift = 8 * (offset & 1);
        let (bits, mask) = (u16::from(value) << shift, 0xff << shift);
        match offset / 2 {
            0 => state.status &= !(bits & STATUS_CLEARABLE),
            1 => state.enable = (state.enable & !mask) | (bits & ENABLE_KEPT),
            _ => {
                let kept = mask & CONTROL_KEPT;
                state.control = (state.control & !kept) | (bits & kept);
                if bits & SLP_EN != 0 && (state.control >> 10) & 7 == SLP_TYP_S5 {
                    self.machine.suspend(Suspend::PowerOff);
                }
            }
        }
    }
}

impl PortDevice for Pm {
    fn port_read(&self, port: u16, size: u8) -> Option<u32> {
        let state = lock(&self.state);
        match port {
            RESET => Some(state.reset.into()),
            SMI_COMMAND => None,
            _ => {
                let first = port - PM1_EVENT;
                let bytes = (first..6)
                    .take(usize::from(size))
                    .map(|o| Pm::read_byte(&state, o));
                Some(
                    bytes
                        .enumerate()
                        .fold(0, |v, (i, b)| v | u32::from(b) << (8 * i)),
                )
            }
        }
    }

    fn port_write(&self, port: u16, size: u8, value: u32) -> bool {
        let mut state = lock(&self.state);
        match port {
            RESET => {
                state.reset = value as u8 & !4;
                if value & 4 != 0 {
                    self.machine.suspend(Suspend::Reset);
                }
            }
            SMI_COMMAND => match value as u8 {
                ACPI_ENABLE => state.control |= SCI_EN,
                ACPI_DISABLE => state.control &= !SCI_EN,
                _ => {}
            },
            _ => {
                for (offset, byte) in (port - PM1_EVENT..6)
                    .zip(value.to_le_bytes())
                    .take(usize::from(size))
                {
                    self.write_byte(&mut state, offset, byte);
                }
                self.update_sci(&mut state);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::{Event, Fake};

    fn pm() -> (Arc<Pm>, Arc<Fake>, Buses) {
        let fake = Fake::new();
        let buses = Buses::default();
        let pm = Pm::new(fake.clone(), &buses).unwrap();
        assert_eq!(fake.take(), [Event::Level(9)]);
        (pm, fake, buses)
    }

    #[test]
    fn the_power_button_is_an_sci_until_acknowledged() {
        let (pm, fake, _) = pm();
        assert!(!pm.press_power_button(), "ACPI is off");
        pm.port_write(SMI_COMMAND, 1, 0xa0);
        assert_eq!(pm.port_read(PM1_CONTROL, 2), Some(1));
        assert!(!pm.press_power_button(), "nobody listens");
        pm.port_write(PM1_EVENT + 2, 2, 0xffff);
        assert_eq!(pm.port_read(PM1_EVENT + 2, 2), Some(0x520));
        assert!(pm.press_power_button());
        assert_eq!(fake.take(), [Event::IsaAssert(9, Some(9))]);
        assert_eq!(pm.port_read(PM1_EVENT, 2), Some(0x100));
        pm.port_write(PM1_EVENT, 2, 0x100);
        assert_eq!(fake.take(), [Event::IsaDeassert(9, Some(9))]);
        assert_eq!(pm.port_read(PM1_EVENT, 4), Some(0x0520_0000));
    }

    #[test]
    fn s5_powers_off_and_other_sleeps_do_not() {
        let (pm, fake, _) = pm();
        pm.port_write(PM1_CONTROL, 2, 0x2000 | 3 << 10);
        assert_eq!(fake.take(), []);
        pm.port_write(PM1_CONTROL, 2, 5 << 10);
        assert_eq!(fake.take(), [], "SLP_EN is clear");
        pm.port_write(PM1_CONTROL, 2, 0x2000 | 5 << 10);
        assert_eq!(fake.take(), [Event::Suspend(Suspend::PowerOff)]);
        assert_eq!(
            pm.port_read(PM1_CONTROL, 2),
            Some(5 << 10),
            "SLP_EN reads as zero"
        );
    }

    #[test]
    fn the_reset_register_resets_on_bit_2() {
        let (_, fake, buses) = pm();
        let reset = buses.ports.get(RESET).unwrap();
        reset.port_write(RESET, 1, 2);
        assert_eq!(fake.take(), []);
        reset.port_write(RESET, 1, 6);
        assert_eq!(fake.take(), [Event::Suspend(Suspend::Reset)]);
        assert_eq!(reset.port_read(RESET, 1), Some(2));
    }

    #[test]
    fn accesses_that_run_out_of_the_block_stay_inside() {
        let (pm, ..) = pm();
        assert_eq!(pm.port_read(PM1_CONTROL + 1, 4), Some(0));
        assert!(pm.port_write(PM1_CONTROL + 1, 4, u32::MAX));
    }
}
