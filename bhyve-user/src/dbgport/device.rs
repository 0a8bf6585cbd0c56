//! The port. It answers as bhyve's always has (usr.sbin/bhyve/dbgport.c): 16 bits
//! read are its signature, 32 bits a byte in each direction.

use std::sync::Mutex;
use std::time::Duration;

use super::backend::{Calls, Line, Port};
use crate::bus::PortDevice;
use crate::lock;

/// Where it is.
pub const PORT: u16 = 0x224;
/// What a 16-bit IN gives: "BV".
const SIGNATURE: u32 = (b'B' as u32) << 8 | b'V' as u32;
/// What a 32-bit IN gives when no byte has come.
const NOTHING: u32 = u32::MAX;
/// How long an IN waits for a byte: a stub asks again and again, with every other CPU
/// of the guest's stopped, and need not burn the host's.
const PATIENCE: Duration = Duration::from_millis(10);

/// The debug port, 0x224.
pub struct DebugPort<C: Calls = Port> {
    line: Mutex<Line<C>>,
    patience: Duration,
}

impl DebugPort {
    /// With a line to debuggers.
    pub fn new(line: Line) -> DebugPort {
        DebugPort::patient(line, PATIENCE)
    }
}

impl<C: Calls> DebugPort<C> {
    /// The same, where an IN waits for a byte for so long at most.
    pub fn patient(line: Line<C>, patience: Duration) -> DebugPort<C> {
        DebugPort {
            line: Mutex::new(line),
            patience,
        }
    }
}

impl<C: Calls + Send> PortDevice for DebugPort<C>
where
    C::Debugger: Send,
{
    fn port_read(&self, _port: u16, size: u8) -> Option<u32> {
        match size {
            2 => Some(SIGNATURE),
            4 => Some(
                lock(&self.line)
                    .receive(self.patience)
                    .map_or(NOTHING, u32::from),
            ),
            _ => None,
        }
    }

    fn port_write(&self, _port: u16, size: u8, value: u32) -> bool {
        if size != 4 {
            return false;
        }
        lock(&self.line).send(value as u8);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dbgport::backend::Address;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    #[test]
    fn a_kernel_finds_it_by_its_signature() {
        let line = Line::open(Address(([127, 0, 0, 1], 0).into())).unwrap();
        let port = DebugPort::new(line);
        assert_eq!(port.port_read(PORT, 2), Some(0x4256));
        assert_eq!(port.port_read(PORT, 4), Some(NOTHING));
        assert_eq!(port.port_read(PORT, 1), None);
        assert!(!port.port_write(PORT, 2, 0x41));
    }

    /// The guest's side of the remote protocol: a packet in, its acknowledgement and
    /// the answer out, and the debugger's acknowledgement.
    #[test]
    fn a_stub_answers_a_debugger() {
        let line = Line::open(Address(([127, 0, 0, 1], 0).into())).unwrap();
        let address = line.address();
        let port = DebugPort::new(line);
        let debugger = std::thread::spawn(move || {
            let mut to = TcpStream::connect(address).unwrap();
            to.write_all(b"$?#3f").unwrap();
            let mut answer = [0; 8];
            to.read_exact(&mut answer).unwrap();
            // No byte of a packet that is escaped is taken for nothing.
            to.write_all(b"+\xff").unwrap();
            (answer, to)
        });
        let get = || loop {
            match port.port_read(PORT, 4) {
                Some(NOTHING) => {}
                byte => return byte,
            }
        };
        for byte in b"$?#3f" {
            assert_eq!(get(), Some(u32::from(*byte)));
        }
        for byte in *b"+$T05#b9" {
            assert!(port.port_write(PORT, 4, u32::from(byte)));
        }
        assert_eq!(get(), Some(u32::from(b'+')));
        assert_eq!(get(), Some(0xff));
        assert_eq!(&debugger.join().unwrap().0, b"+$T05#b9");
    }
}
