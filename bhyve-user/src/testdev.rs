//! `-l pc-testdev`: the device that kvm-unit-tests talk to. Its ports and
//! addresses are those of QEMU's device of the same name.

use std::sync::{Arc, Mutex};

use vmmapi::abi::limits::{PROT_ALL, VM_MAX_MEMSEGS};
use vmmapi::{Mapping, Segment};

use crate::bus::{BusError, Buses, MmioDevice, PortDevice, ones};
use crate::lock;
use crate::machine::Machine;
use crate::vm::Error;

/// Writing `v` ends the process with status `v << 1 | 1`.
const EXIT: u16 = 0xf4;
/// Four bytes that remember.
const DATA: u16 = 0xe0;
/// Asks the host to unmap and map a page; ours never has to.
const FLUSH: u16 = 0xe4;
/// One port an interrupt line.
const LINES: u16 = 0x2000;
const LINE_COUNT: u16 = 24;
/// Ports behind the lines, where other devices may start.
pub const END: u16 = LINES + 0x40;
/// Guest-physical address of memory that no RAM table tells of, so that tests
/// find it empty and vector instructions reach it too.
const BUFFER: u64 = 0xff00_0000;
const BUFFER_SIZE: u64 = 0x1_0000;
/// The memory segment behind it: the last that a VM has, which no other device
/// of ours takes.
const SEGMENT: i32 = VM_MAX_MEMSEGS as i32 - 1;

struct State {
    data: u32,
    lines: [bool; LINE_COUNT as usize],
}

/// The device; `exit` ends the process.
pub struct TestDev<F> {
    state: Mutex<State>,
    machine: Arc<dyn Machine>,
    exit: F,
}

impl<F: Fn(u8) + Send + Sync + 'static> TestDev<F> {
    /// Claims the ports.
    pub fn attach(machine: Arc<dyn Machine>, buses: &Buses, exit: F) -> Result<(), BusError> {
        let state = State {
            data: 0,
            lines: [false; LINE_COUNT as usize],
        };
        let device = Arc::new(TestDev {
            state: Mutex::new(state),
            machine,
            exit,
        });
        let slot = buses.ports.claim(DATA, 4, device)?;
        buses.ports.map(slot, FLUSH, 4)?;
        buses.ports.map(slot, EXIT, 1)?;
        buses.ports.map(slot, LINES, LINE_COUNT)
    }

    fn set_line(&self, line: u16, level: bool) {
        let mut state = lock(&self.state);
        let Some(was) = state.lines.get_mut(usize::from(line)) else {
            return;
        };
        if std::mem::replace(was, level) == level {
            return;
        }
        let pin = line as u8;
        match (line < 16, level) {
            (true, true) => self.machine.isa_assert(pin, Some(pin)),
            (true, false) => self.machine.isa_deassert(pin, Some(pin)),
            (false, true) => self.machine.ioapic_assert(pin),
            (false, false) => self.machine.ioapic_deassert(pin),
        }
    }
}

impl<F: Fn(u8) + Send + Sync + 'static> PortDevice for TestDev<F> {
    fn port_read(&self, port: u16, size: u8) -> Option<u32> {
        let shift = u32::from(port.checked_sub(DATA).filter(|o| *o < 4)?) * 8;
        Some((lock(&self.state).data >> shift) & ones(size) as u32)
    }

    fn port_write(&self, port: u16, size: u8, value: u32) -> bool {
        match port {
            EXIT => (self.exit)((value as u8) << 1 | 1),
            DATA..0xe4 => {
                let shift = u32::from(port - DATA) * 8;
                let mask = (ones(size) as u32) << shift;
                let mut state = lock(&self.state);
                state.data = (state.data & !mask) | (value << shift & mask);
            }
            LINES.. => self.set_line(port - LINES, value != 0),
            _ => {}
        }
        true
    }
}

/// The device's memory, for emulated instructions; others reach it by
/// themselves.
struct Buffer(Segment);

impl MmioDevice for Buffer {
    fn mmio_read(&self, gpa: u64, size: u8) -> u64 {
        let mut bytes = [0; 8];
        if let Some(part) = bytes.get_mut(..usize::from(size)) {
            // The bus lets nothing through that is outside.
            let _ = self.0.read_bytes(gpa.wrapping_sub(BUFFER), part);
        }
        u64::from_le_bytes(bytes)
    }

    fn mmio_write(&self, gpa: u64, size: u8, value: u64) {
        if let Some(part) = value.to_le_bytes().get(..usize::from(size)) {
            // As above.
            let _ = self.0.write_bytes(gpa.wrapping_sub(BUFFER), part);
        }
    }
}

/// Gives the VM the device's memory, unless it has it from a run before.
///
/// # Errors
/// What the kernel says, or something else is there.
pub fn attach_buffer(vm: &vmmapi::Vm, buses: &Buses) -> Result<(), Error> {
    let segment = vm.create_devmem(SEGMENT, "testdev", BUFFER_SIZE)?;
    buses
        .mmio
        .map(BUFFER, BUFFER_SIZE, Arc::new(Buffer(segment)))?;
    if vm.mmap_getnext(BUFFER)?.is_some_and(|m| m.gpa == BUFFER) {
        return Ok(());
    }
    Ok(vm.mmap_memseg(&Mapping {
        gpa: BUFFER,
        segid: SEGMENT,
        segoff: 0,
        len: BUFFER_SIZE,
        prot: PROT_ALL,
        flags: 0,
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::{Event, Fake};
    use std::sync::mpsc;

    #[test]
    fn as_kvm_unit_tests_use_it() {
        let (buses, fake) = (Buses::default(), Fake::new());
        let (tx, rx) = mpsc::channel();
        TestDev::attach(fake.clone(), &buses, move |status| tx.send(status).unwrap()).unwrap();
        let d = buses.ports.get(0xe0).unwrap();
        d.port_write(0xe0, 4, 0x1234_5678);
        d.port_write(0xe1, 1, 0xab);
        assert_eq!(
            (d.port_read(0xe0, 2), d.port_read(0xe3, 1)),
            (Some(0xab78), Some(0x12))
        );
        d.port_write(0x200e, 4, 1);
        d.port_write(0x200e, 4, 1);
        d.port_write(0x2014, 4, 1);
        d.port_write(0x200e, 4, 0);
        assert_eq!(
            fake.take(),
            [
                Event::IsaAssert(14, Some(14)),
                Event::Assert(20),
                Event::IsaDeassert(14, Some(14))
            ]
        );
        buses.ports.get(0xf4).unwrap().port_write(0xf4, 4, 0);
        assert_eq!(rx.recv(), Ok(1));
    }
}
