//! The MSR bitmap (SDM Vol. 3C §24.6.9): which RDMSR and WRMSR do not exit.

use super::fields::msr;
use crate::error::Error;
use crate::page::Pages;
use vmm_core::host::{Host, Hpa};

/// One vCPU's bitmap. A set bit exits.
pub struct MsrBitmap<H: Host> {
    page: Pages<H>,
}

const WRITES: usize = 2048;

/// x2APIC registers that a read may take from the virtual-APIC page
/// (offset / 16): all but the timer's current count, which is computed.
const X2APIC_READABLE: [core::ops::RangeInclusive<u32>; 8] = [
    0x02..=0x03,
    0x08..=0x08,
    0x0a..=0x0a,
    0x0d..=0x0d,
    0x0f..=0x28,
    0x2f..=0x30,
    0x32..=0x38,
    0x3e..=0x3e,
];

impl<H: Host> MsrBitmap<H> {
    /// Everything exits.
    pub fn new() -> Result<Self, Error> {
        let mut page = Pages::new(0)?;
        page.bytes_mut().fill(0xff);
        Ok(MsrBitmap { page })
    }

    /// Physical address, for the VMCS.
    pub fn pa(&self) -> Hpa {
        self.page.pa()
    }

    /// Byte offset (of the read half) and bit of an MSR; `None` outside the
    /// two ranges that the bitmap covers, where everything exits.
    fn place(msr: u32) -> Option<(usize, u8)> {
        let (base, n) = match msr {
            0..=0x1fff => (0, msr),
            0xc000_0000..=0xc000_1fff => (1024, msr & 0x1fff),
            _ => return None,
        };
        Some((base + n as usize / 8, 1 << (n % 8)))
    }

    fn set_bit(&mut self, offset: usize, bit: u8, on: bool) {
        if let Some(byte) = self.page.bytes_mut().get_mut(offset) {
            if on {
                *byte |= bit;
            } else {
                *byte &= !bit;
            }
        }
    }

    /// Whether RDMSR and WRMSR of `msr` reach the CPU without an exit.
    pub fn pass(&mut self, msr: u32, read: bool, write: bool) {
        if let Some((offset, bit)) = Self::place(msr) {
            self.set_bit(offset, bit, !read);
            self.set_bit(offset + WRITES, bit, !write);
        }
    }

    /// Whether RDMSR and WRMSR of `msr` pass.
    pub fn passes(&mut self, msr: u32) -> (bool, bool) {
        let Some((offset, bit)) = Self::place(msr) else {
            return (false, false);
        };
        let bytes = self.page.bytes_mut();
        let clear = |o: usize| bytes.get(o).is_some_and(|b| b & bit == 0);
        (clear(offset), clear(offset + WRITES))
    }

    /// Sets the x2APIC range for the given parts of APIC virtualization
    /// (SDM Vol. 3C §29.5).
    pub fn set_x2apic(&mut self, x2apic: bool, registers: bool, interrupts: bool) {
        for n in 0..0x40 {
            let tpr = n == 0x08;
            let read =
                (registers && X2APIC_READABLE.iter().any(|r| r.contains(&n))) || (x2apic && tpr);
            // EOI and self-IPI are virtualized with virtual-interrupt delivery.
            let write = (x2apic && tpr) || (interrupts && matches!(n, 0x0b | 0x3f));
            self.pass(msr::X2APIC_FIRST + n, read, write);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testhost::TestHost;

    #[test]
    fn bits_are_where_the_manual_puts_them() {
        let mut b = MsrBitmap::<TestHost>::new().unwrap();
        assert!(b.page.bytes_mut().iter().all(|x| *x == 0xff));
        b.pass(msr::LSTAR, true, false);
        b.pass(msr::SYSENTER_EIP, true, true);
        let bytes = b.page.bytes_mut();
        assert_eq!(bytes[1024 + 0x82 / 8], 0b1111_1011);
        assert_eq!(bytes[3072 + 0x82 / 8], 0xff);
        assert_eq!(bytes[0x176 / 8], 0b1011_1111);
        assert_eq!(bytes[2048 + 0x176 / 8], 0b1011_1111);
        b.pass(0x4000_0000, true, true);
        assert_eq!(b.passes(0x4000_0000), (false, false));
        assert_eq!(b.passes(msr::LSTAR), (true, false));
    }

    #[test]
    fn x2apic_current_count_and_icr_writes_always_exit() {
        let mut b = MsrBitmap::<TestHost>::new().unwrap();
        b.set_x2apic(true, true, true);
        assert_eq!(b.passes(0x839), (false, false));
        assert_eq!(b.passes(0x830), (true, false));
        assert_eq!(b.passes(0x808), (true, true));
        assert_eq!(b.passes(0x80b), (false, true));
        assert_eq!(b.passes(0x804), (false, false));
        b.set_x2apic(true, false, false);
        assert_eq!(b.passes(0x808), (true, true));
        assert_eq!(b.passes(0x80b), (false, false));
        b.set_x2apic(false, false, false);
        assert_eq!(b.passes(0x808), (false, false));
    }
}
