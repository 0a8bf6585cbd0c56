//! Time inside the kernel piece is the host's TSC; devices tick at exact
//! ratios of it, so that every clock a guest can compare agrees.

/// PC timers' crystal: the 8254's input, Hz.
pub const PIT_HZ: u64 = 1_193_182;
/// The ACPI PM timer, Hz (ACPI 6.5 §4.8.3.3).
pub const PMTMR_HZ: u64 = 3_579_545;

/// `a / b` as a 64.64 fixed-point number, to convert ticks of one clock into
/// ticks of another without a division.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ratio {
    int: u64,
    frac: u64,
}

impl Ratio {
    /// `num / den`; `den` of 0 counts as 1. Called when a VM is made, so the
    /// division may be slow.
    pub fn new(num: u64, den: u64) -> Self {
        let den = den.max(1);
        let int = num / den;
        let rem = num % den;
        let frac = ((u128::from(rem) << 64) / u128::from(den)) as u64;
        Ratio { int, frac }
    }

    /// `ticks * num / den`, rounded down, modulo 2^64.
    pub fn apply(&self, ticks: u64) -> u64 {
        let frac = ((u128::from(ticks) * u128::from(self.frac)) >> 64) as u64;
        ticks.wrapping_mul(self.int).wrapping_add(frac)
    }

    /// The same rounded up: the first tick of the target clock at or after.
    pub fn apply_up(&self, ticks: u64) -> u64 {
        self.apply(ticks).wrapping_add(1)
    }
}

/// How the host's TSC relates to the other clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// TSC frequency, Hz.
    pub tsc_hz: u64,
    /// TSC ticks to nanoseconds.
    pub to_ns: Ratio,
    /// Nanoseconds to TSC ticks.
    pub from_ns: Ratio,
}

impl Clock {
    /// A clock for a TSC of the given frequency, Hz.
    pub fn new(tsc_hz: u64) -> Self {
        Clock {
            tsc_hz,
            to_ns: Ratio::new(1_000_000_000, tsc_hz),
            from_ns: Ratio::new(tsc_hz, 1_000_000_000),
        }
    }

    /// TSC ticks to ticks of a clock of `hz`, and back.
    pub fn ratios(&self, hz: u64) -> (Ratio, Ratio) {
        (Ratio::new(hz, self.tsc_hz), Ratio::new(self.tsc_hz, hz))
    }
}

/// A guest's TSC at another rate than the host's, as CPUs make it: they multiply by a
/// fixed-point number of so many bits of fraction (48, SDM Vol. 3C §25.3; 32, APM
/// Vol. 2 §15.30.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scaling {
    /// What the CPU multiplies by.
    pub multiplier: u64,
    fraction: u32,
    back: Ratio,
}

impl Scaling {
    /// From a host's `from` Hz to a guest's `to`. `None`: the multiplier would be 0
    /// or have more than 8 bits before its fraction.
    pub fn new(from: u64, to: u64, fraction: u32) -> Option<Self> {
        let multiplier = (u128::from(to) << fraction) / u128::from(from.max(1));
        let multiplier = u64::try_from(multiplier).ok()?;
        (multiplier != 0 && multiplier >> fraction >> 8 == 0).then(|| Scaling {
            multiplier,
            fraction,
            back: Ratio::new(from, to),
        })
    }

    /// What the CPU makes of a host's TSC.
    pub fn apply(&self, host: u64) -> u64 {
        ((u128::from(host) * u128::from(self.multiplier)) >> self.fraction) as u64
    }

    /// The host's ticks until at least so many of the guest's have gone by; all ones for
    /// more than there are.
    pub fn back(&self, ticks: u64) -> u64 {
        let Ratio { int, frac } = self.back;
        let whole = u128::from(ticks) * u128::from(int);
        let part = (u128::from(ticks) * u128::from(frac)) >> 64;
        u64::try_from(whole + part + 1).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scaled_tsc_is_what_the_cpu_makes_it() {
        for fraction in [32, 48] {
            for (from, to) in [
                (2_400_000_000, 3_100_000_000),
                (3_100_000_000, 2_400_000_000),
                (50_000_000, 5_000_000_000),
            ] {
                let s = Scaling::new(from, to, fraction).unwrap();
                // A day, to the part in a billion that 32 bits of fraction allow.
                let day = to * 86_400;
                assert!(s.apply(from * 86_400).abs_diff(day) <= day / 1_000_000_000);
                for ticks in [1, 1_000, to] {
                    let host = s.back(ticks);
                    assert!(s.apply(host) + 1 >= ticks, "{ticks} of {to}: early");
                    assert!(host <= ticks.div_ceil(to.div_ceil(from)) * 2 + from / 1_000_000);
                }
            }
        }
        // A deadline that never comes does not come at once.
        let slow = Scaling::new(5_000_000_000, 1_000_000, 48).unwrap();
        for ticks in [1 << 52, 1 << 63, u64::MAX] {
            assert_eq!(slow.back(ticks), u64::MAX, "{ticks}");
        }
        assert_eq!(Scaling::new(1_000_000_000, 0, 48), None);
        assert_eq!(Scaling::new(1_000_000, 256_000_000, 48), None);
        assert_eq!(Scaling::new(u64::MAX, 1, 32), None);
        // Also after as many ticks as there can be.
        let s = Scaling::new(1_000_000_000, 255_000_000_000, 48).unwrap();
        assert_eq!(s.apply(u64::MAX), u64::MAX.wrapping_mul(255));
    }

    #[test]
    fn one_second_of_tsc_is_one_second_of_every_clock() {
        for hz in [50_000_000, 1_000_000_000, 2_399_999_871, 4_700_000_000] {
            let c = Clock::new(hz);
            let (to, back) = c.ratios(PIT_HZ);
            assert!(to.apply(hz).abs_diff(PIT_HZ) <= 1);
            assert!(c.to_ns.apply(hz).abs_diff(1_000_000_000) <= 1);
            assert!(back.apply_up(PIT_HZ).abs_diff(hz) <= 2);
        }
    }

    #[test]
    fn a_year_of_ticks_does_not_drift() {
        let c = Clock::new(2_399_999_871);
        let year = 2_399_999_871 * 31_536_000;
        assert!(c.to_ns.apply(year).abs_diff(31_536_000 * 1_000_000_000) <= 2);
    }
}
