//! The 256 bytes of a function's configuration space and its capability list
//! (PCI Local Bus Specification 3.0 §6).
// The constants bear the specification's names.
#![allow(missing_docs)]

/// Offsets in the header.
pub const VENDOR: u16 = 0x00;
pub const DEVICE: u16 = 0x02;
pub const COMMAND: u16 = 0x04;
pub const STATUS: u16 = 0x06;
pub const REVISION: u16 = 0x08;
pub const PROG_IF: u16 = 0x09;
pub const SUBCLASS: u16 = 0x0a;
pub const CLASS: u16 = 0x0b;
pub const HEADER_TYPE: u16 = 0x0e;
pub const BAR0: u16 = 0x10;
pub const BARS: usize = 6;
pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
pub const SUBSYSTEM: u16 = 0x2e;
pub const ROM: u16 = 0x30;
pub const CAP_POINTER: u16 = 0x34;
pub const INT_LINE: u16 = 0x3c;
pub const INT_PIN: u16 = 0x3d;

/// Command register: decode ports, decode memory, master the bus, answer parity
/// errors, report system errors, mask INTx.
pub const CMD_IO: u16 = 0x0001;
pub const CMD_MEMORY: u16 = 0x0002;
pub const CMD_MASTER: u16 = 0x0004;
pub const CMD_PARITY: u16 = 0x0040;
pub const CMD_SERR: u16 = 0x0100;
pub const CMD_INTX_OFF: u16 = 0x0400;

/// Status register: there is a capability list.
pub const STATUS_CAPS: u16 = 0x0010;

/// Capability identifiers.
pub const CAP_PM: u8 = 0x01;
pub const CAP_MSI: u8 = 0x05;
pub const CAP_VENDOR: u8 = 0x09;
pub const CAP_SSVID: u8 = 0x0d;
pub const CAP_PCIE: u8 = 0x10;
pub const CAP_MSIX: u8 = 0x11;

/// Where the first capability goes.
const CAP_START: usize = 0x40;

/// Configuration space of one function.
#[derive(Clone, Debug)]
pub struct Config {
    bytes: [u8; 256],
    cap_end: usize,
    last_cap: Option<usize>,
}

impl Default for Config {
    fn default() -> Self {
        let mut c = Config {
            bytes: [0; 256],
            cap_end: CAP_START,
            last_cap: None,
        };
        c.set8(INT_LINE, 0xff);
        c.set16(COMMAND, CMD_IO | CMD_MEMORY | CMD_MASTER);
        c
    }
}

impl Config {
    /// Reads 1, 2 or 4 bytes; beyond the end, zeroes.
    pub fn get(&self, offset: u16, size: u8) -> u32 {
        let at = usize::from(offset);
        let bytes = self.bytes.get(at..).unwrap_or_default();
        bytes
            .iter()
            .take(usize::from(size))
            .rev()
            .fold(0, |v, &b| v << 8 | u32::from(b))
    }

    /// Writes 1, 2 or 4 bytes; what is beyond the end is dropped.
    pub fn set(&mut self, offset: u16, size: u8, value: u32) {
        let at = usize::from(offset);
        let bytes = self.bytes.get_mut(at..).unwrap_or_default();
        for (b, v) in bytes
            .iter_mut()
            .zip(value.to_le_bytes())
            .take(usize::from(size))
        {
            *b = v;
        }
    }

    /// One byte.
    pub fn get8(&self, offset: u16) -> u8 {
        self.get(offset, 1) as u8
    }
    /// Two bytes.
    pub fn get16(&self, offset: u16) -> u16 {
        self.get(offset, 2) as u16
    }
    /// Sets one byte.
    pub fn set8(&mut self, offset: u16, value: u8) {
        self.set(offset, 1, value.into());
    }
    /// Sets two bytes.
    pub fn set16(&mut self, offset: u16, value: u16) {
        self.set(offset, 2, value.into());
    }
    /// Sets four bytes.
    pub fn set32(&mut self, offset: u16, value: u32) {
        self.set(offset, 4, value);
    }

    /// Sets vendor, device, class and subclass.
    pub fn identify(&mut self, vendor: u16, device: u16, class: u8, subclass: u8) {
        self.set16(VENDOR, vendor);
        self.set16(DEVICE, device);
        self.set8(CLASS, class);
        self.set8(SUBCLASS, subclass);
    }

    /// Appends a capability: its identifier, the next pointer (filled in
    /// here), then `body`. Returns its offset, `None` when there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> Option<u16> {
        let at = self.cap_end;
        let len = (body.len() + 2).next_multiple_of(4);
        let room = self.bytes.get_mut(at..at.checked_add(len)?)?;
        for (b, v) in room.iter_mut().zip([id, 0].iter().chain(body)) {
            *b = *v;
        }
        match self.last_cap.replace(at) {
            None => {
                self.set8(CAP_POINTER, at as u8);
                let status = self.get16(STATUS) | STATUS_CAPS;
                self.set16(STATUS, status);
            }
            Some(last) => self.set8(last as u16 + 1, at as u8),
        }
        self.cap_end = at + len;
        Some(at as u16)
    }

    /// The capability that holds `offset`: its identifier and its own offset.
    pub fn capability_at(&self, offset: u16) -> Option<(u8, u16)> {
        if usize::from(offset) >= self.cap_end {
            return None;
        }
        let mut at = self.get8(CAP_POINTER);
        let mut found = None;
        // The list was built here and is read-only, so it ends; 48 is the
        // most that fit.
        for _ in 0..48 {
            if at == 0 || u16::from(at) > offset {
                break;
            }
            found = Some((self.get8(u16::from(at)), u16::from(at)));
            at = self.get8(u16::from(at) + 1);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_little_endian_and_stay_inside() {
        let mut c = Config::default();
        c.set(0xfe, 4, 0x1122_3344);
        assert_eq!(c.get(0xfe, 4), 0x3344);
        assert_eq!(c.get(0xff, 1), 0x33);
        assert_eq!(c.get(0x1000, 4), 0);
    }

    #[test]
    fn a_guest_can_walk_the_capability_list() {
        let mut c = Config::default();
        assert_eq!(c.get16(STATUS) & STATUS_CAPS, 0);
        assert_eq!(c.add_capability(CAP_MSI, &[0; 12]), Some(0x40));
        assert_eq!(c.add_capability(CAP_MSIX, &[0; 10]), Some(0x50));
        assert_ne!(c.get16(STATUS) & STATUS_CAPS, 0);
        let mut ids = Vec::new();
        let mut at = c.get8(CAP_POINTER);
        while at != 0 {
            ids.push(c.get8(at.into()));
            at = c.get8(u16::from(at) + 1);
        }
        assert_eq!(ids, [CAP_MSI, CAP_MSIX]);
        assert_eq!(c.capability_at(0x4e), Some((CAP_MSI, 0x40)));
        assert_eq!(c.capability_at(0x5b), Some((CAP_MSIX, 0x50)));
        assert_eq!(c.capability_at(0x5c), None);
        assert_eq!(c.capability_at(0x3c), None);
    }

    #[test]
    fn a_full_capability_list_refuses_more() {
        let mut c = Config::default();
        assert!(c.add_capability(CAP_VENDOR, &[0; 190]).is_some());
        assert_eq!(c.add_capability(CAP_VENDOR, &[0; 2]), None);
    }
}
