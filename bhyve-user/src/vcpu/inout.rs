//! IN and OUT.

use vmmapi::Inout;

use super::Next;
use crate::bus::{PortBus, ones};

/// What became of an IN or OUT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// An OUT is done.
    Out,
    /// An IN gives this RAX.
    In(u64),
    /// Nobody has the port, and the guest is to stop there.
    Unclaimed,
}

/// Does an IN or OUT. A port that nobody has reads as ones and swallows
/// writes, unless `strict`.
#[inline]
pub fn emulate(ports: &PortBus, strict: bool, io: &Inout) -> Done {
    let mask = ones(io.bytes) as u32;
    let device = ports.get(io.port);
    if io.input {
        let value = match device.and_then(|d| d.port_read(io.port, io.bytes)) {
            Some(v) => v,
            None if strict => return Done::Unclaimed,
            None => mask,
        };
        // The exit carries the low half of RAX. As in FreeBSD's bhyve, IN to
        // AL or AX leaves zeroes above it: no compiler counts on those bits,
        // and reading them would cost a system call an IN.
        let rax = (io.eax & !mask) | (value & mask);
        return Done::In(rax.into());
    }
    let done = device.is_some_and(|d| d.port_write(io.port, io.bytes, io.eax & mask));
    if !done && strict {
        return Done::Unclaimed;
    }
    Done::Out
}

#[cold]
pub(super) fn unclaimed(io: &Inout) -> Next {
    let (dir, size) = (if io.input { "IN from" } else { "OUT to" }, io.bytes);
    Next::Fail(format!(
        "{dir} port {:#x} ({size} bytes), which nobody emulates; without -e it would be ignored",
        io.port
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::PortDevice;
    use std::sync::{Arc, Mutex};

    #[derive(Default)]
    struct Dev(Mutex<Vec<(u16, u8, u32)>>);
    impl PortDevice for Dev {
        fn port_read(&self, _: u16, size: u8) -> Option<u32> {
            (size < 4).then_some(0x1234_5678)
        }
        fn port_write(&self, port: u16, size: u8, value: u32) -> bool {
            crate::lock(&self.0).push((port, size, value));
            true
        }
    }

    fn io(port: u16, bytes: u8, input: bool) -> Inout {
        Inout {
            port,
            bytes,
            input,
            eax: 0xaabb_ccdd,
            ..Inout::default()
        }
    }

    #[test]
    fn in_changes_only_the_bytes_it_names() {
        let ports = PortBus::default();
        ports.claim(0x60, 1, Arc::new(Dev::default())).unwrap();
        for (port, bytes, rax) in [
            (0x60, 1, 0xaabb_cc78),
            (0x60, 2, 0xaabb_5678),
            (0x60, 4, 0xffff_ffff),
            (0x61, 1, 0xaabb_ccff),
            (0x61, 4, 0xffff_ffff),
        ] {
            assert_eq!(
                emulate(&ports, false, &io(port, bytes, true)),
                Done::In(rax),
                "port {port:#x}, {bytes} bytes"
            );
        }
    }

    #[test]
    fn out_hands_over_its_operand() {
        let (ports, dev) = (PortBus::default(), Arc::new(Dev::default()));
        ports.claim(0x60, 1, dev.clone()).unwrap();
        assert_eq!(emulate(&ports, false, &io(0x60, 1, false)), Done::Out);
        assert_eq!(emulate(&ports, false, &io(0x99, 1, false)), Done::Out);
        assert_eq!(*crate::lock(&dev.0), [(0x60, 1, 0xdd)]);
    }

    #[test]
    fn strict_mode_stops_and_names_the_port() {
        let ports = PortBus::default();
        for (input, words) in [
            (true, "IN from port 0x99 (1 bytes)"),
            (false, "OUT to port 0x99"),
        ] {
            let io = io(0x99, 1, input);
            assert_eq!(emulate(&ports, true, &io), Done::Unclaimed);
            let Next::Fail(why) = unclaimed(&io) else {
                panic!("went on")
            };
            assert!(why.contains(words), "{why}");
        }
    }
}
