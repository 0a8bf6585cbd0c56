//! The register page of a local APIC, and where its registers are.

use core::sync::atomic::{AtomicU32, Ordering};

/// Register offsets, bytes (SDM Vol. 3A §10.4.1, table 10-1). The x2APIC MSR
/// of a register is `0x800 + (offset >> 4)`.
#[allow(missing_docs)]
pub mod reg {
    pub const ID: u16 = 0x020;
    pub const VERSION: u16 = 0x030;
    pub const TPR: u16 = 0x080;
    pub const APR: u16 = 0x090;
    pub const PPR: u16 = 0x0a0;
    pub const EOI: u16 = 0x0b0;
    pub const RRD: u16 = 0x0c0;
    pub const LDR: u16 = 0x0d0;
    pub const DFR: u16 = 0x0e0;
    pub const SVR: u16 = 0x0f0;
    pub const ISR: u16 = 0x100;
    pub const TMR: u16 = 0x180;
    pub const IRR: u16 = 0x200;
    pub const ESR: u16 = 0x280;
    pub const LVT_CMCI: u16 = 0x2f0;
    pub const ICR_LOW: u16 = 0x300;
    pub const ICR_HIGH: u16 = 0x310;
    pub const LVT_TIMER: u16 = 0x320;
    pub const LVT_THERMAL: u16 = 0x330;
    pub const LVT_PERF: u16 = 0x340;
    pub const LVT_LINT0: u16 = 0x350;
    pub const LVT_LINT1: u16 = 0x360;
    pub const LVT_ERROR: u16 = 0x370;
    pub const TIMER_ICR: u16 = 0x380;
    pub const TIMER_CCR: u16 = 0x390;
    pub const TIMER_DCR: u16 = 0x3e0;
    pub const SELF_IPI: u16 = 0x3f0;
}

/// The 4 KiB page that holds every register at its xAPIC offset. Under APIC
/// virtualization it is the virtual-APIC page (SDM Vol. 3C §29.1), which the
/// CPU reads and writes while the guest runs; hence the atomics. Outside the
/// guest only the vCPU's own thread touches it, but for IRR, in which under
/// AVIC other vCPUs' CPUs and whoever hands over a mailbox set bits at any time.
#[repr(C, align(4096))]
pub struct LapicPage([AtomicU32; 1024]);

impl LapicPage {
    /// A page of zeroes.
    pub const fn new() -> Self {
        LapicPage([const { AtomicU32::new(0) }; 1024])
    }

    #[inline]
    #[allow(clippy::indexing_slicing)] // masked to the array's length
    fn cell(&self, offset: u16) -> &AtomicU32 {
        &self.0[usize::from(offset >> 2) & 1023]
    }

    /// The register at a byte offset (aligned down to 4).
    #[inline]
    pub fn get(&self, offset: u16) -> u32 {
        self.cell(offset).load(Ordering::Relaxed)
    }

    /// Sets the register at a byte offset.
    #[inline]
    pub fn set(&self, offset: u16, value: u32) {
        self.cell(offset).store(value, Ordering::Relaxed);
    }

    /// Whether a vector's bit is set in the 256-bit register at `base` (ISR,
    /// TMR or IRR).
    #[inline]
    pub fn bit(&self, base: u16, vector: u8) -> bool {
        self.get(base + u16::from(vector >> 5) * 16) & (1 << (vector & 31)) != 0
    }

    /// Sets or clears a vector's bit in a 256-bit register.
    #[inline]
    pub fn set_bit(&self, base: u16, vector: u8, on: bool) {
        let offset = base + u16::from(vector >> 5) * 16;
        let mask = 1 << (vector & 31);
        let old = self.get(offset);
        self.set(offset, if on { old | mask } else { old & !mask });
    }

    /// Sets bits of the register at a byte offset that other CPUs may be
    /// setting bits in (IRR under AVIC).
    #[inline(always)]
    pub fn or(&self, offset: u16, bits: u32) {
        self.cell(offset).fetch_or(bits, Ordering::Relaxed);
    }

    /// Clears bits likewise.
    #[inline(always)]
    pub fn and_not(&self, offset: u16, bits: u32) {
        self.cell(offset).fetch_and(!bits, Ordering::Relaxed);
    }

    /// The highest vector whose bit is set in a 256-bit register.
    pub fn highest(&self, base: u16) -> Option<u8> {
        each_word!(word, {
            let bits = self.get(base + word * 16);
            if bits != 0 {
                return Some(((word as u8) << 5) | (31 - bits.leading_zeros()) as u8);
            }
        });
        None
    }

    /// Zeroes everything.
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub fn clear(&self) {
        for cell in &self.0 {
            cell.store(0, Ordering::Relaxed);
        }
    }
}

impl Default for LapicPage {
    fn default() -> Self {
        Self::new()
    }
}
