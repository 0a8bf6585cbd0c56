//! ACPI power-management timer (ACPI 6.5 §4.8.3.3): 32 bits at 3.579545 MHz.

use crate::time::{Clock, PMTMR_HZ, Ratio};

/// Its I/O port.
pub const PORT: u16 = 0x408;

/// The timer: nothing but a start. Reading needs no lock, and copies agree for
/// ever: RESET leaves it alone, as ACPI 6.5 §4.8.3.3 allows.
#[derive(Clone, Copy, Debug)]
pub struct PmTimer {
    to_ticks: Ratio,
    epoch: u64,
}

impl PmTimer {
    /// A timer that is 0 at `now`, host TSC ticks.
    pub fn new(clock: &Clock, now: u64) -> Self {
        PmTimer {
            to_ticks: clock.ratios(PMTMR_HZ).0,
            epoch: now,
        }
    }

    /// TMR_VAL, all 32 bits of it.
    #[inline]
    pub fn read(&self, now: u64) -> u32 {
        self.to_ticks.apply(now.saturating_sub(self.epoch)) as u32
    }

    /// IN of 1, 2 or 4 bytes, bits above them undefined, of a port that is
    /// one of ours.
    #[inline]
    pub fn io_read(&self, port: u16, now: u64) -> u32 {
        self.read(now) >> (8 * (port & 3))
    }

    /// Whether a port is one of ours.
    #[inline]
    pub const fn claims(port: u16) -> bool {
        matches!(port, 0x408..=0x40b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_at_its_rate_and_wraps() {
        let p = PmTimer::new(&Clock::new(2_400_000_000), 1000);
        assert_eq!(p.read(1000), 0);
        assert!(p.read(1000 + 2_400_000_000).abs_diff(3_579_545) <= 1);
        // 1200 s are 4295454000 ticks: 486704 past 2^32.
        assert!(p.read(1000 + 2_400_000_000 * 1200).abs_diff(486_704) <= 1);
    }
}
