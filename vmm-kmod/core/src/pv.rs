//! The paravirtual interface that guests know from KVM, as far as it is here:
//! clock, end of interrupt, IPIs and wake-ups by hypercall.
//!
//! Source: Linux, Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst. What
//! is meant by names here is what is meant there.

use crate::apicbus::DeliveryMode;

/// MSR_KVM_WALL_CLOCK_NEW.
pub const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
/// MSR_KVM_SYSTEM_TIME_NEW.
pub const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// MSR_KVM_PV_EOI_EN.
pub const MSR_EOI: u32 = 0x4b56_4d04;
/// The range that KVM has for itself.
pub const MSR_FIRST: u32 = 0x4b56_4d00;
/// Its end.
pub const MSR_LAST: u32 = 0x4b56_4dff;

bitflags::bitflags! {
    /// What is offered: EAX of leaf 0x4000_0101.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u32 {
        /// OUTs to port 0x80 as a delay are not needed.
        const NOP_IO_DELAY = 1 << 1;
        /// The clock at [`MSR_SYSTEM_TIME`] and [`MSR_WALL_CLOCK`].
        const CLOCK = 1 << 3;
        /// [`MSR_EOI`].
        const EOI = 1 << 6;
        /// KVM_HC_KICK_CPU wakes a CPU from HLT, with interrupts off too.
        const UNHALT = 1 << 7;
        /// KVM_HC_SEND_IPI.
        const SEND_IPI = 1 << 11;
        /// The clock's CLOCK_TSC_STABLE flag is used: it agrees between CPUs.
        const CLOCK_STABLE = 1 << 24;
    }
}

/// Bit 0 of [`MSR_SYSTEM_TIME`] and [`MSR_EOI`]: on.
pub const ENABLED: u64 = 1;

/// Where an MSR's value says that its structure is: aligned to 4 bytes.
/// `None` for a value with other bits; `Some(None)` for one that turns it off.
pub const fn address(value: u64) -> Option<Option<u64>> {
    if value & 2 != 0 {
        return None;
    }
    if value & ENABLED == 0 {
        return Some(None);
    }
    Some(Some(value & !3))
}

/// Bytes of `struct pvclock_vcpu_time_info`.
pub const CLOCK_LEN: usize = 32;
/// Bytes of `struct pvclock_wall_clock`.
pub const WALL_LEN: usize = 12;

const FLAG_TSC_STABLE: u8 = 1;

/// How a guest makes nanoseconds of TSC ticks:
/// `((ticks << shift) * mul) >> 32`, a negative shift being to the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    mul: u32,
    shift: i8,
}

impl Scale {
    /// For a TSC of so many Hz.
    pub fn new(tsc_hz: u64) -> Self {
        let hz = u128::from(tsc_hz.max(1));
        // The largest multiplier of 32 bits is the most exact one.
        for shift in -31i8..=31 {
            let mul = ((1_000_000_000u128 << (64 - i32::from(shift))) / hz) >> 32;
            if let Ok(mul) = u32::try_from(mul) {
                return Scale { mul, shift };
            }
        }
        Scale { mul: 0, shift: 0 }
    }

    /// The clock's structure with this version: time 0 was at `tsc_at_zero` of
    /// the vCPU's TSC. As it holds for good, it is written but once.
    pub fn clock(&self, version: u32, tsc_at_zero: u64) -> [u8; CLOCK_LEN] {
        let mut b = [0; CLOCK_LEN];
        let fields = version
            .to_le_bytes()
            .into_iter()
            .chain([0; 4])
            .chain(tsc_at_zero.to_le_bytes())
            .chain([0; 8])
            .chain(self.mul.to_le_bytes())
            .chain(self.shift.to_le_bytes())
            .chain([FLAG_TSC_STABLE]);
        for (to, from) in b.iter_mut().zip(fields) {
            *to = from;
        }
        b
    }
}

/// `struct pvclock_wall_clock`: the wall clock, ns since 1970 UTC, when the
/// paravirtual clock was 0.
pub fn wall_clock(version: u32, ns: u64) -> [u8; WALL_LEN] {
    let mut b = [0; WALL_LEN];
    let fields = version
        .to_le_bytes()
        .into_iter()
        .chain(((ns / 1_000_000_000) as u32).to_le_bytes())
        .chain(((ns % 1_000_000_000) as u32).to_le_bytes());
    for (to, from) in b.iter_mut().zip(fields) {
        *to = from;
    }
    b
}

/// Versions of a structure for while it is written (odd) and after, from what
/// the guest has there.
pub const fn versions(old: u32) -> (u32, u32) {
    let writing = old.wrapping_add(1) | 1;
    (writing, writing.wrapping_add(1))
}

/// KVM_ENOSYS: no such hypercall.
pub const ENOSYS: i64 = -1000;
/// KVM_EPERM: not from CPL 0.
pub const EPERM: i64 = -1;
/// KVM_EINVAL.
pub const EINVAL: i64 = -22;

/// What a hypercall asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hypercall {
    /// KVM_HC_VAPIC_POLL_IRQ: nothing but the exit.
    PollIrq,
    /// KVM_HC_KICK_CPU.
    Kick {
        /// Whom.
        apic_id: u32,
    },
    /// KVM_HC_SEND_IPI.
    SendIpi {
        /// APIC ids, bit 0 being `first`.
        set: u128,
        /// Lowest APIC id.
        first: u32,
        /// Fixed or NMI.
        mode: DeliveryMode,
        /// Vector, for Fixed.
        vector: u8,
    },
    /// The answer is this.
    Refused(i64),
}

/// Decodes a hypercall: RAX, then RBX, RCX, RDX, RSI. Outside 64-bit mode the
/// registers have 32 bits.
pub fn hypercall(offered: Features, long: bool, cpl: u8, rax: u64, args: [u64; 4]) -> Hypercall {
    let low = |v: u64| if long { v } else { v & 0xffff_ffff };
    let [a0, a1, a2, a3] = args.map(low);
    if cpl != 0 {
        return Hypercall::Refused(EPERM);
    }
    match low(rax) {
        1 => Hypercall::PollIrq,
        5 if offered.contains(Features::UNHALT) => Hypercall::Kick { apic_id: a1 as u32 },
        10 if offered.contains(Features::SEND_IPI) => {
            let bits = if long { 64 } else { 32 };
            send_ipi(u128::from(a0) | u128::from(a1) << bits, a2, a3)
        }
        _ => Hypercall::Refused(ENOSYS),
    }
}

fn send_ipi(set: u128, first: u64, icr: u64) -> Hypercall {
    let vector = icr as u8;
    let (mode, set) = match (icr >> 8) & 7 {
        // A vector of the CPU's own is no error, and nobody's interrupt.
        0 if vector < 16 => (DeliveryMode::Fixed, 0),
        0 => (DeliveryMode::Fixed, set),
        4 => (DeliveryMode::Nmi, set),
        _ => return Hypercall::Refused(EINVAL),
    };
    // Neither a logical destination nor a shorthand: they are in the arguments.
    match u32::try_from(first) {
        Ok(first) if icr >> 32 == 0 && icr & 0xc_0800 == 0 => Hypercall::SendIpi {
            set,
            first,
            mode,
            vector,
        },
        _ => Hypercall::Refused(EINVAL),
    }
}

/// The APIC ids of a [`Hypercall::SendIpi`].
pub fn destinations(set: u128, first: u32) -> impl Iterator<Item = u32> {
    let mut left = set;
    core::iter::from_fn(move || {
        let bit = left.trailing_zeros();
        if bit >= 128 {
            return None;
        }
        left &= left - 1;
        first.checked_add(bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// Linux's pvclock_scale_delta, as the structure's bytes ask for it.
    fn guest_ns(page: &[u8; CLOCK_LEN], tsc: u64) -> u64 {
        let at = u64::from_le_bytes(page[8..16].try_into().unwrap());
        let base = u64::from_le_bytes(page[16..24].try_into().unwrap());
        let mul = u32::from_le_bytes(page[24..28].try_into().unwrap());
        let delta = tsc.wrapping_sub(at);
        let shifted = match page[28] as i8 {
            s if s < 0 => delta >> -s,
            s => delta << s,
        };
        base + ((u128::from(shifted) * u128::from(mul)) >> 32) as u64
    }

    #[test]
    fn the_clock_goes_as_the_tsc_does() {
        for hz in [50_000_000, 1_000_000_000, 2_399_999_871, 4_700_000_001] {
            let page = Scale::new(hz).clock(2, 12345);
            let hour = guest_ns(&page, 12345 + 3600 * hz);
            assert!(
                hour.abs_diff(3600 * 1_000_000_000) <= 2000,
                "{hz}: {hour} ns an hour"
            );
            assert_eq!(guest_ns(&page, 12345), 0);
            assert_eq!(page[29], 1);
            assert_eq!(page[..4], [2, 0, 0, 0]);
        }
    }

    #[test]
    fn a_tsc_that_the_guest_set_back_still_gives_the_time() {
        // The guest wrote 0 to its TSC at tick 5,000,000,000.
        let page = Scale::new(1_000_000_000).clock(0, 5_000_000_000u64.wrapping_neg());
        assert!(guest_ns(&page, 7).abs_diff(5_000_000_007) <= 2);
    }

    #[test]
    fn a_reader_sees_an_odd_version_while_it_is_written() {
        assert_eq!(versions(0), (1, 2));
        assert_eq!(versions(1), (3, 4));
        assert_eq!(versions(u32::MAX), (1, 2));
        assert_eq!(
            wall_clock(2, 1_600_000_000_250_000_000)[4..8],
            1_600_000_000u32.to_le_bytes()
        );
    }

    #[test]
    fn addresses() {
        assert_eq!(address(0x1000), Some(None));
        assert_eq!(address(0x1005), Some(Some(0x1004)));
        assert_eq!(address(0x1003), None);
    }

    #[test]
    fn ipis_name_their_receivers_and_nothing_else() {
        let all = Features::all();
        let send = |long, args| hypercall(all, long, 0, 10, args);
        let Hypercall::SendIpi {
            set,
            first,
            mode,
            vector,
        } = send(true, [5, 1, 3, 0xf1])
        else {
            panic!("refused");
        };
        assert_eq!((mode, vector), (DeliveryMode::Fixed, 0xf1));
        assert_eq!(destinations(set, first).collect::<Vec<_>>(), [3, 5, 67]);
        let Hypercall::SendIpi { set, first, .. } = send(false, [1, 1 << 40 | 2, 0, 0x402]) else {
            panic!("refused");
        };
        assert_eq!(destinations(set, first).collect::<Vec<_>>(), [0, 33]);
        // INIT, a shorthand, a logical destination.
        for icr in [0x500, 0x8_00f1, 0x8f1, 1 << 32 | 0xf1] {
            assert_eq!(send(true, [1, 0, 0, icr]), Hypercall::Refused(EINVAL));
        }
        assert_eq!(destinations(u128::MAX, 0).count(), 128);
        // What apic of kvm-unit-tests sends: beyond all APIC ids, vector 0.
        let Hypercall::SendIpi { set, first, .. } = send(true, [0xffff_ffff, 0, 0xffff_ffff, 0])
        else {
            panic!("refused");
        };
        assert_eq!(destinations(set, first).count(), 0);
        assert_eq!(destinations(3, u32::MAX).count(), 1);
    }

    #[test]
    fn only_what_is_offered_and_only_to_the_kernel() {
        let none = Features::empty();
        for (offered, cpl, nr, want) in [
            (Features::all(), 3, 10, EPERM),
            (none, 0, 10, ENOSYS),
            (none, 0, 5, ENOSYS),
            (Features::all(), 0, 9, ENOSYS),
        ] {
            assert_eq!(
                hypercall(offered, true, cpl, nr, [1, 0, 0, 0xf1]),
                Hypercall::Refused(want)
            );
        }
        assert_eq!(
            hypercall(Features::UNHALT, true, 0, 5, [0, 3, 0, 0]),
            Hypercall::Kick { apic_id: 3 }
        );
    }
}
