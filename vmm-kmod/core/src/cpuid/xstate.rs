//! Leaf 0xD: which XSAVE components there are and how large they make the
//! save area (SDM Vol. 1 §13.2).

use super::{CpuidConfig, CpuidTable, Kind, Regs, ZERO};

/// Sub-leaf 1 EAX: XSAVEC or XSAVES, so sizes are those of the compacted
/// format.
pub(super) const COMPACTION: u32 = 1 << 1 | 1 << 3;

/// x87, SSE, AVX, AVX-512 (opmask, ZMM_Hi256, Hi16_ZMM). Not MPX, PT, PKRU,
/// CET, AMX.
const OFFERED: u64 = 0b1110_0111;
const AVX: u64 = 1 << 2;
const AVX512: u64 = 0b1110_0000;
/// Legacy region and header, bytes.
const BASE_SIZE: u32 = 576;
/// Components 2 to 7 can be offered; each is {size, offset, flags}.
const COMPONENTS: usize = 8;

/// Sizes and offsets of the components that the guest may use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Components {
    allowed: u64,
    /// Size, offset in the standard format, flags (sub-leaf ECX).
    parts: [[u32; 3]; COMPONENTS],
}

/// "Align to 64 when compacted".
const ALIGN: u32 = 2;

impl Components {
    /// None.
    pub(super) const NONE: Self = Components {
        allowed: 0,
        parts: [[0; 3]; COMPONENTS],
    };

    pub(super) fn new(cfg: &CpuidConfig, host: &impl Fn(u32, u32) -> Regs) -> Self {
        let mut c = Self::NONE;
        let has_xsave = host(0, 0)[0] >= 0xd && host(1, 0)[2] & (1 << 26) != 0;
        if !has_xsave || cfg.caps.xcr0 & 3 != 3 {
            return c;
        }
        let [lo, _, _, hi] = host(0xd, 0);
        let mut allowed = (u64::from(hi) << 32 | u64::from(lo)) & cfg.caps.xcr0 & OFFERED;
        // AVX-512 is all three components upon AVX, or nothing (SDM Vol. 1
        // §13.3): XSETBV could not set a part of it.
        if allowed & (AVX512 | AVX) != AVX512 | AVX {
            allowed &= !AVX512;
        }
        for (i, part) in c.parts.iter_mut().enumerate().skip(2) {
            if allowed & (1 << i) != 0 {
                let [size, offset, flags, _] = host(0xd, i as u32);
                *part = [size, offset, flags];
            }
        }
        c.allowed = allowed;
        c
    }

    pub(super) fn allowed(&self) -> u64 {
        self.allowed
    }

    pub(super) fn avx(&self) -> bool {
        self.allowed & AVX != 0
    }

    pub(super) fn avx512(&self) -> bool {
        self.allowed & AVX512 == AVX512
    }

    /// Bytes that XSAVE needs for the components of `xcr0`.
    pub(super) fn standard_size(&self, xcr0: u64) -> u32 {
        if self.allowed == 0 {
            return 0;
        }
        let mut size = BASE_SIZE;
        for (i, &[len, offset, _]) in self.parts.iter().enumerate() {
            if xcr0 & (1 << i) != 0 {
                size = size.max(offset.saturating_add(len));
            }
        }
        size
    }

    /// Bytes that XSAVEC or XSAVES need for the components of
    /// `XCR0 | IA32_XSS`.
    pub(super) fn compacted_size(&self, mask: u64) -> u32 {
        let mut size = BASE_SIZE;
        for (i, &[len, _, flags]) in self.parts.iter().enumerate() {
            if mask & (1 << i) != 0 {
                if flags & ALIGN != 0 {
                    size = size.saturating_add(63) & !63;
                }
                size = size.saturating_add(len);
            }
        }
        size
    }
}

pub(super) fn fill(t: &mut CpuidTable, cfg: &CpuidConfig, host: &impl Fn(u32, u32) -> Regs) {
    let allowed = t.xstate.allowed();
    if allowed == 0 {
        return;
    }
    let first = t.used;
    t.push([
        allowed as u32,
        0,
        t.xstate.standard_size(allowed),
        (allowed >> 32) as u32,
    ]);
    // XSAVEOPT, XSAVEC, XGETBV with ECX = 1; XSAVES by the backend. No bit of
    // IA32_XSS exists for the guest.
    let mut mask = 0b0111;
    if cfg.caps.xsaves {
        mask |= 0b1000;
    }
    t.push([host(0xd, 1)[0] & mask, 0, 0, 0]);
    for i in 2..COMPONENTS as u32 {
        let row = if allowed & (1 << i) != 0 {
            host(0xd, i)
        } else {
            ZERO
        };
        t.push(row);
    }
    let count = t.used - first;
    t.set_basic(0xd, Kind::Xstate { first, count }, ZERO);
}
