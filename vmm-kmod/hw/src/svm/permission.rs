//! Permission maps (APM Vol. 2 §15.10, §15.11): a set bit exits.

use crate::error::Error;
use crate::page::Pages;
use vmm_core::host::{Host, Hpa};

/// Which RDMSR and WRMSR exit: two bits an MSR, read and write.
pub struct MsrPermissions<H: Host> {
    pages: Pages<H>,
}

impl<H: Host> MsrPermissions<H> {
    /// Everything exits.
    pub fn new() -> Result<Self, Error> {
        let mut pages = Pages::new(1)?;
        pages.bytes_mut().fill(0xff);
        Ok(MsrPermissions { pages })
    }

    /// Physical address, for the VMCB.
    pub fn pa(&self) -> Hpa {
        self.pages.pa()
    }

    /// Byte and lower bit of an MSR; `None` outside the three ranges that the
    /// map covers, where everything exits.
    fn place(msr: u32) -> Option<(usize, u32)> {
        let base = match msr {
            0..=0x1fff => 0,
            0xc000_0000..=0xc000_1fff => 0x800,
            0xc001_0000..=0xc001_1fff => 0x1000,
            _ => return None,
        };
        let n = msr & 0x1fff;
        Some((base + n as usize / 4, n % 4 * 2))
    }

    /// Whether RDMSR and WRMSR of `msr` reach the CPU without an exit.
    pub fn pass(&mut self, msr: u32, read: bool, write: bool) {
        let Some((at, shift)) = Self::place(msr) else {
            return;
        };
        if let Some(byte) = self.pages.bytes_mut().get_mut(at) {
            let exits = u8::from(!read) | u8::from(!write) << 1;
            *byte = *byte & !(3 << shift) | exits << shift;
        }
    }
}

/// The I/O permission map in which every port exits; one serves all.
pub fn all_ports<H: Host>() -> Result<Pages<H>, Error> {
    // Three pages; the ports' own are 64 Ki bits and three (a 4-byte access at
    // the last port).
    let mut pages = Pages::new(2)?;
    pages.bytes_mut().fill(0xff);
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testhost::TestHost;

    #[test]
    fn bits_are_where_the_manual_puts_them() {
        let mut p = MsrPermissions::<TestHost>::new().unwrap();
        p.pass(0x174, true, true);
        p.pass(0xc000_0082, true, false);
        p.pass(0xc001_0015, false, true);
        p.pass(0x4000_0000, true, true);
        let bytes = p.pages.bytes_mut();
        assert_eq!(bytes[0x174 / 4], 0b1111_1100);
        assert_eq!(bytes[0x800 + 0x82 / 4], 0b1110_1111);
        assert_eq!(bytes[0x1000 + 0x15 / 4], 0b1111_0111);
        assert_eq!(bytes.iter().filter(|b| **b != 0xff).count(), 3);
        assert_eq!(bytes.len(), 8192);
    }

    #[test]
    fn every_port_exits() {
        let mut io = all_ports::<TestHost>().unwrap();
        assert!(io.bytes_mut()[..12288].iter().all(|b| *b == 0xff));
    }
}
