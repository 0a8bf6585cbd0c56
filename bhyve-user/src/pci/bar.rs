//! Base address registers: their windows, and the ranges they claim.

use super::{IO_BASE, IO_LIMIT, MEM32_LIMIT, MEM64_BASE, MEM64_LIMIT};

/// What kind of range a BAR asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mem32,
    /// Memory anywhere; takes the next BAR for its upper half.
    Mem64,
}

/// One BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its kind.
    pub kind: BarKind,
    /// Where it is now.
    pub addr: u64,
    /// Bytes, a power of two.
    pub size: u64,
    /// Flags in the low bits of the register.
    pub flags: u32,
}

impl Bar {
    /// The register's low half.
    pub fn low(&self) -> u32 {
        self.addr as u32 | self.flags
    }
    /// The address after a write of the low half.
    pub fn with_low(&self, value: u32) -> u64 {
        let low = u64::from(value) & !(self.size - 1);
        match self.kind {
            BarKind::Io => low & 0xffff & !3,
            BarKind::Mem32 => low & 0xffff_ffff & !0xf,
            BarKind::Mem64 => (self.addr & !0xffff_ffff) | (low & 0xffff_ffff & !0xf),
        }
    }
    /// The address after a write of the high half (64-bit BARs).
    pub fn with_high(&self, value: u32) -> u64 {
        ((u64::from(value) << 32) & !(self.size - 1)) | (self.addr & 0xffff_ffff)
    }
}

/// Hands out addresses for BARs, a window a kind.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Next port, next address below 4 GiB and next above.
    pub io: u64,
    /// See `io`.
    pub mem32: u64,
    /// See `io`.
    pub mem64: u64,
}

/// BARs above this size go above 4 GiB: some drivers are unhappy with small
/// ones there.
const LARGE: u64 = 32 << 20;

impl Windows {
    /// Windows whose 32-bit part starts at `low_limit`, where low memory may
    /// end.
    pub fn new(low_limit: u64) -> Windows {
        Windows {
            io: IO_BASE.into(),
            mem32: low_limit,
            mem64: MEM64_BASE,
        }
    }

    /// A BAR of at least `size` bytes; `None` when the window is full.
    pub fn allocate(&mut self, kind: BarKind, size: u64) -> Option<Bar> {
        let least = if kind == BarKind::Io { 4 } else { 16 };
        let size = size.max(least).checked_next_power_of_two()?;
        let (next, limit, flags) = match kind {
            BarKind::Io => (&mut self.io, u64::from(IO_LIMIT), 1),
            BarKind::Mem32 => (&mut self.mem32, MEM32_LIMIT, 0),
            BarKind::Mem64 if size > LARGE => (&mut self.mem64, MEM64_LIMIT, 0xc),
            BarKind::Mem64 => (&mut self.mem32, MEM32_LIMIT, 0x4),
        };
        let addr = next.checked_next_multiple_of(size)?;
        let end = addr.checked_add(size)?;
        if end > limit {
            return None;
        }
        *next = end;
        Some(Bar {
            kind,
            addr,
            size,
            flags,
        })
    }

    /// Rounds up, so that a guest has some room to move BARs.
    pub fn add_slack(&mut self) {
        self.io = (self.io + 32).next_multiple_of(32).min(u64::from(IO_LIMIT));
        self.mem32 = (self.mem32 + (1 << 20))
            .next_multiple_of(1 << 20)
            .min(MEM32_LIMIT);
        self.mem64 = (self.mem64 + (1 << 20))
            .next_multiple_of(1 << 20)
            .min(MEM64_LIMIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_naturally_aligned_and_inside_their_window() {
        let mut w = Windows::new(0xc000_0000);
        let a = w.allocate(BarKind::Mem32, 0x1001).unwrap();
        assert_eq!((a.addr, a.size), (0xc000_0000, 0x2000));
        let b = w.allocate(BarKind::Mem32, 1 << 20).unwrap();
        assert_eq!(b.addr, 0xc010_0000);
        let c = w.allocate(BarKind::Mem64, 64 << 20).unwrap();
        assert_eq!((c.addr, c.low() & 0xf), (MEM64_BASE, 0xc));
        let d = w.allocate(BarKind::Io, 1).unwrap();
        assert_eq!((d.addr, d.size, d.low()), (0x2000, 4, 0x2001));
        assert_eq!(
            w.allocate(BarKind::Mem32, 1 << 30),
            None,
            "the window ends at ECAM"
        );
        assert_eq!(w.allocate(BarKind::Mem64, u64::MAX), None);
    }

    #[test]
    fn sizing_reads_back_the_mask() {
        let mut w = Windows::new(0xc000_0000);
        let mut bar = w.allocate(BarKind::Mem64, 128 << 20).unwrap();
        let old = bar.addr;
        bar.addr = bar.with_low(u32::MAX);
        assert_eq!(bar.low(), 0xf800_000c);
        bar.addr = bar.with_high(u32::MAX);
        assert_eq!(bar.addr >> 32, 0xffff_ffff);
        bar.addr = bar.with_low(old as u32);
        bar.addr = bar.with_high((old >> 32) as u32);
        assert_eq!(bar.addr, old);
    }
}
