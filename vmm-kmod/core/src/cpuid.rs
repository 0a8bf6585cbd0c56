//! What the guest's CPUID says: a table built when a vCPU is made, so that a
//! CPUID exit costs an indexed load and no decision about features.
//!
//! Sources: SDM Vol. 2A "CPUID", APM Vol. 3 appendix E.

mod features;
mod topology;
mod xstate;

pub use topology::Topology;

use crate::pv::Features;

/// EAX, EBX, ECX, EDX.
pub type Regs = [u32; 4];

/// Whose CPUID conventions the guest sees (the host's own).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// "GenuineIntel" and those that follow it.
    Intel,
    /// "AuthenticAMD", "HygonGenuine".
    Amd,
}

/// What the backend can honour beyond plain instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidCaps {
    /// INVPCID runs in the guest.
    pub invpcid: bool,
    /// CR4.PCIDE may be set.
    pub pcid: bool,
    /// RDTSCP, RDPID and IA32_TSC_AUX.
    pub rdtscp: bool,
    /// The LAPIC has the TSC-deadline mode.
    pub tsc_deadline: bool,
    /// IA32_TSC_ADJUST is emulated.
    pub tsc_adjust: bool,
    /// The TSC runs at one rate, never stops and agrees between CPUs.
    pub invariant_tsc: bool,
    /// 1 GiB pages in the guest's own page tables.
    pub gib_pages: bool,
    /// XCR0 bits that the backend switches; 0 hides XSAVE altogether. Bits
    /// beyond x87, SSE, AVX and AVX-512 are ignored.
    pub xcr0: u64,
    /// XSAVES, XRSTORS and IA32_XSS (of which no bit is offered).
    pub xsaves: bool,
    /// IA32_SPEC_CTRL and IA32_PRED_CMD (IBRS, IBPB, STIBP) are switched.
    pub spec_ctrl: bool,
    /// SSBD in IA32_SPEC_CTRL (or, AMD, in SPEC_CTRL) is switched.
    pub ssbd: bool,
    /// IA32_ARCH_CAPABILITIES can be read.
    pub arch_capabilities: bool,
    /// IA32_FLUSH_CMD can be written.
    pub l1d_flush: bool,
    /// Interrupt messages carry 15 bits of destination.
    pub ext_dest_id: bool,
}

/// All that the table is made of besides the host's own leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidConfig {
    /// Host's vendor.
    pub vendor: Vendor,
    /// Index of the vCPU.
    pub vcpu_id: u32,
    /// Initial (x2)APIC id.
    pub apic_id: u32,
    /// Sockets, cores, threads.
    pub topology: Topology,
    /// Guest's TSC frequency, Hz.
    pub tsc_hz: u64,
    /// Input clock of the LAPIC timer, Hz. See [`lapic_timer_hz`].
    pub lapic_hz: u64,
    /// Whether x2APIC is offered.
    pub x2apic: bool,
    /// Whether the guest is told that there is a hypervisor: leaf 1 ECX bit
    /// 31 and the leaves from 0x4000_0000 on.
    pub hypervisor: bool,
    /// Whether a second hypervisor interface, KVM's signature with these
    /// features (perhaps none), stands at 0x4000_0100. Linux before 6.16 does
    /// not know bhyve's signature and uses x2APIC without interrupt remapping
    /// only under a hypervisor that it knows. FreeBSD 12.1 looks at 0x4000_0000
    /// alone.
    pub kvm: Option<Features>,
    /// Guest-physical address width, bits; 0 for the host's.
    pub phys_bits: u8,
    /// What the backend honours.
    pub caps: CpuidCaps,
}

/// What an answer depends on at the moment of the exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DynState {
    /// The guest's CR4.OSXSAVE.
    pub osxsave: bool,
    /// The guest's XCR0.
    pub xcr0: u64,
    /// The guest's IA32_XSS.
    pub xss: u64,
    /// IA32_APIC_BASE.EN: leaf 1 EDX bit 9 follows it (SDM Vol. 3A §10.4.3).
    pub apic_enabled: bool,
}

/// First leaf of the hypervisor's range.
pub const HV_BASE: u32 = 0x4000_0000;
/// "bhyve bhyve ".
pub const HV_SIGNATURE: [u8; 12] = *b"bhyve bhyve ";
const KVM_SIGNATURE: [u8; 12] = *b"KVMKVMKVM\0\0\0";
/// Timing leaf: EAX TSC kHz, EBX LAPIC timer kHz. VMware's definition, which
/// FreeBSD 13 and later read under every hypervisor.
pub const HV_TIMING: u32 = 0x4000_0010;

const BASIC: usize = 0x20;
const EXT: usize = 0x22;
const HV: usize = 0x11;
/// Sub-leaf rows: leaf 4 (8), 7 (3), 0xB and 0x1F (4), 0xD (16),
/// 0x8000_001D (5).
const SUB: usize = 40;
const ZERO: Regs = [0; 4];

/// How a leaf's answer is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One row whatever ECX is.
    Plain,
    /// Leaf 1: OSXSAVE and APIC follow the guest.
    Features,
    /// `count` rows from `first` on; zeros beyond.
    Sub { first: u8, count: u8 },
    /// As `Sub`, but what lies beyond still carries ECX and the APIC id.
    Topology { first: u8, count: u8 },
    /// Leaf 0xD.
    Xstate { first: u8, count: u8 },
}

/// A leaf. All zeroes, without padding, are the plain one of zeroes, so that a table of
/// them is made at once.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    /// A [`Kind`]: which, `first`, `count` and 0.
    kind: [u8; 4],
    regs: Regs,
}

const EMPTY: Leaf = Leaf {
    kind: [0; 4],
    regs: ZERO,
};

impl Leaf {
    const fn new(kind: Kind, regs: Regs) -> Self {
        let kind = match kind {
            Kind::Plain => [0; 4],
            Kind::Features => [1, 0, 0, 0],
            Kind::Sub { first, count } => [2, first, count, 0],
            Kind::Topology { first, count } => [3, first, count, 0],
            Kind::Xstate { first, count } => [4, first, count, 0],
        };
        Leaf { kind, regs }
    }

    #[inline]
    const fn kind(&self) -> Kind {
        let [which, first, count, _] = self.kind;
        match which {
            0 => Kind::Plain,
            1 => Kind::Features,
            2 => Kind::Sub { first, count },
            3 => Kind::Topology { first, count },
            _ => Kind::Xstate { first, count },
        }
    }
}

/// CPUID of one vCPU. About 2.5 KiB; nothing in it is allocated.
#[derive(Clone, Debug)]
pub struct CpuidTable {
    basic: [Leaf; BASIC],
    ext: [Leaf; EXT],
    hv: [Regs; HV],
    kvm: [Regs; 2],
    sub: [Regs; SUB],
    used: u8,
    max_basic: u32,
    /// Number of hypervisor leaves, 0 if there are none.
    hv_leaves: u32,
    apic_id: u32,
    intel: bool,
    xstate: xstate::Components,
}

impl CpuidTable {
    /// Builds the table from the host's leaves, `host(leaf, sub-leaf)`.
    pub fn new(cfg: &CpuidConfig, host: impl Fn(u32, u32) -> Regs) -> Self {
        let mut t = Self::blank();
        t.fill(cfg, host);
        t
    }

    /// A table without leaves. What is large is to be made where it stays, and then filled.
    #[inline(never)]
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub const fn blank() -> Self {
        Self::BLANK
    }

    // All zeroes.
    const BLANK: Self = CpuidTable {
        basic: [EMPTY; BASIC],
        ext: [EMPTY; EXT],
        hv: [ZERO; HV],
        kvm: [ZERO; 2],
        sub: [ZERO; SUB],
        used: 0,
        max_basic: 0,
        hv_leaves: 0,
        apic_id: 0,
        intel: false,
        xstate: xstate::Components::NONE,
    };

    /// Makes a blank table the one of the host's leaves, `host(leaf, sub-leaf)`.
    pub fn fill(&mut self, cfg: &CpuidConfig, host: impl Fn(u32, u32) -> Regs) {
        self.apic_id = cfg.apic_id;
        self.intel = cfg.vendor == Vendor::Intel;
        self.xstate = xstate::Components::new(cfg, &host);
        features::basic(self, cfg, &host);
        features::extended(self, cfg, &host);
        topology::fill(self, cfg, &host);
        xstate::fill(self, cfg, &host);
        self.timing(cfg);
        if cfg.hypervisor {
            self.hypervisor(cfg);
        }
    }

    /// The answer to CPUID with these EAX and ECX.
    #[inline]
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub fn get(&self, eax: u32, ecx: u32, now: &DynState) -> Regs {
        let leaf = if eax <= self.max_basic {
            self.basic.get(eax as usize)
        } else if eax >= 0x8000_0000 {
            match self.ext.get((eax & 0x7fff_ffff) as usize) {
                Some(l) if eax <= self.max_extended() => Some(l),
                _ => return self.beyond(ecx, now),
            }
        } else if eax >= HV_BASE && self.hv_leaves != 0 {
            return self.hypervisor_leaf(eax);
        } else {
            return self.beyond(ecx, now);
        };
        match leaf {
            Some(l) => self.answer(l, ecx, now),
            None => ZERO,
        }
    }

    /// Highest basic leaf.
    pub fn max_basic(&self) -> u32 {
        self.max_basic
    }

    /// Highest extended leaf.
    pub fn max_extended(&self) -> u32 {
        self.ext[0].regs[0]
    }

    /// Guest-physical address width, bits (leaf 0x8000_0008).
    pub fn phys_bits(&self) -> u8 {
        let bits = (self.ext[8].regs[0] & 0xff) as u8;
        if bits == 0 { 36 } else { bits }
    }

    /// XCR0 bits that the guest may set.
    pub fn xcr0_allowed(&self) -> u64 {
        self.xstate.allowed()
    }

    /// Leaf 7 sub-leaf 0, which several MSRs' existence hangs on.
    pub fn leaf7(&self) -> Regs {
        match self.basic[7].kind() {
            Kind::Sub { first, .. } => self.sub_row(first, 0),
            _ => ZERO,
        }
    }

    /// Leaf 1 as it stands in the table.
    pub fn leaf1(&self) -> Regs {
        self.basic[1].regs
    }

    /// Leaf 0x8000_0001.
    pub fn ext1(&self) -> Regs {
        self.ext[1].regs
    }

    /// Leaf 0x8000_0008.
    pub fn ext8(&self) -> Regs {
        self.ext[8].regs
    }

    /// Whether XSAVES and IA32_XSS exist (leaf 0xD sub-leaf 1 EAX bit 3).
    pub fn has_xsaves(&self) -> bool {
        match self.basic[0xd].kind() {
            Kind::Xstate { first, .. } => self.sub_row(first, 1)[0] & (1 << 3) != 0,
            _ => false,
        }
    }

    #[inline]
    fn answer(&self, l: &Leaf, ecx: u32, now: &DynState) -> Regs {
        match l.kind() {
            Kind::Plain => l.regs,
            Kind::Features => {
                let [a, b, mut c, mut d] = l.regs;
                if now.osxsave {
                    c |= features::L1C_OSXSAVE;
                }
                if !now.apic_enabled {
                    d &= !features::L1D_APIC;
                }
                [a, b, c, d]
            }
            Kind::Sub { first, count } => {
                if ecx < u32::from(count) {
                    self.sub_row(first, ecx)
                } else {
                    ZERO
                }
            }
            Kind::Topology { first, count } => {
                if ecx < u32::from(count) {
                    self.sub_row(first, ecx)
                } else {
                    [0, 0, ecx & 0xff, self.apic_id]
                }
            }
            Kind::Xstate { first, count } => {
                if ecx >= u32::from(count) {
                    return ZERO;
                }
                let mut r = self.sub_row(first, ecx);
                match ecx {
                    0 => r[1] = self.xstate.standard_size(now.xcr0),
                    1 if r[0] & xstate::COMPACTION != 0 => {
                        r[1] = self.xstate.compacted_size(now.xcr0 | now.xss);
                    }
                    _ => {}
                }
                r
            }
        }
    }

    #[inline]
    fn sub_row(&self, first: u8, n: u32) -> Regs {
        self.sub
            .get(usize::from(first).wrapping_add(n as usize))
            .copied()
            .unwrap_or(ZERO)
    }

    /// Above the highest leaf Intel answers with the highest basic leaf, AMD
    /// with zeros.
    #[cold]
    fn beyond(&self, ecx: u32, now: &DynState) -> Regs {
        match self.basic.get(self.max_basic as usize) {
            Some(l) if self.intel => self.answer(l, ecx, now),
            _ => ZERO,
        }
    }

    #[cold]
    fn hypervisor_leaf(&self, eax: u32) -> Regs {
        match eax & 0xffff {
            n if n < self.hv_leaves => self.hv.get(n as usize).copied().unwrap_or(ZERO),
            n @ 0x100..=0x101 => self.kvm.get((n & 1) as usize).copied().unwrap_or(ZERO),
            _ => ZERO,
        }
    }

    /// Adds sub-leaf rows; what does not fit is left out.
    #[inline(never)]
    fn push(&mut self, row: Regs) -> bool {
        match self.sub.get_mut(usize::from(self.used)) {
            Some(r) => {
                *r = row;
                self.used += 1;
                true
            }
            None => false,
        }
    }

    #[inline(never)]
    fn set_basic(&mut self, leaf: usize, kind: Kind, regs: Regs) {
        if let Some(l) = self.basic.get_mut(leaf) {
            *l = Leaf::new(kind, regs);
        }
    }

    #[inline(never)]
    fn set_ext(&mut self, leaf: usize, kind: Kind, regs: Regs) {
        if let Some(l) = self.ext.get_mut(leaf) {
            *l = Leaf::new(kind, regs);
        }
    }

    /// Leaves 0x15 and 0x16 (Intel): guests that find them need not measure
    /// the TSC, and Linux takes the LAPIC timer's clock from them as well.
    fn timing(&mut self, cfg: &CpuidConfig) {
        if cfg.vendor != Vendor::Intel || !cfg.caps.invariant_tsc {
            return;
        }
        let Some((den, num, crystal)) = tsc_ratio(cfg.tsc_hz, cfg.lapic_hz) else {
            return;
        };
        self.set_basic(0x15, Kind::Plain, [den, num, crystal, 0]);
        let mhz = (cfg.tsc_hz.saturating_add(500_000) / 1_000_000).min(0xffff) as u32;
        self.set_basic(0x16, Kind::Plain, [mhz, mhz, 100, 0]);
    }

    fn hypervisor(&mut self, cfg: &CpuidConfig) {
        let [b, c, d] = signature(&HV_SIGNATURE);
        self.hv[0] = [HV_TIMING, b, c, d];
        self.hv[1] = [u32::from(cfg.caps.ext_dest_id), 0, 0, 0];
        let khz = |hz: u64| (hz.saturating_add(500) / 1000).min(u64::from(u32::MAX)) as u32;
        if cfg.caps.invariant_tsc {
            self.hv[0x10] = [khz(cfg.tsc_hz), khz(cfg.lapic_hz), 0, 0];
        } else {
            // Without the timing leaf guests measure, which stays right.
            self.hv[0][0] = HV_BASE + 1;
        }
        self.hv_leaves = (self.hv[0][0] & 0xff) + 1;
        if let Some(features) = cfg.kvm {
            let [b, c, d] = signature(&KVM_SIGNATURE);
            self.kvm = [[HV_BASE + 0x101, b, c, d], [features.bits(), 0, 0, 0]];
        }
    }
}

fn signature(s: &[u8; 12]) -> [u32; 3] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *s;
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
        u32::from_le_bytes([i, j, k, l]),
    ]
}

/// The LAPIC timer clock, Hz, that lets leaf 0x15 state the TSC's frequency
/// exactly: the TSC itself, or the largest integer part of it that fits the
/// leaf's 32 bits.
pub const fn lapic_timer_hz(tsc_hz: u64) -> u64 {
    let mut k = 1;
    while tsc_hz / k > u32::MAX as u64 {
        k += 1;
    }
    // An exact divisor close by, if there is one.
    let mut n = k;
    while n < k + 64 {
        if tsc_hz.is_multiple_of(n) {
            return tsc_hz / n;
        }
        n += 1;
    }
    tsc_hz / k
}

/// Denominator, numerator and crystal of leaf 0x15, if the TSC's frequency
/// can be told exactly (to 1 ppb) in a way that every guest computes right:
/// Linux multiplies kHz of the crystal and numerator in 32 bits.
fn tsc_ratio(tsc_hz: u64, crystal_hz: u64) -> Option<(u32, u32, u32)> {
    let crystal = u32::try_from(crystal_hz).ok().filter(|&c| c >= 1000)?;
    let (mut a, mut b) = (tsc_hz, crystal_hz);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let (mut num, mut den) = (tsc_hz.checked_div(a)?, crystal_hz.checked_div(a)?);
    let fits = |num: u64| {
        (crystal_hz / 1000)
            .checked_mul(num)
            .is_some_and(|p| p <= u64::from(u32::MAX))
    };
    if !fits(num) {
        // Not exact in small numbers; a whole multiple may be near enough.
        num = (tsc_hz + crystal_hz / 2) / crystal_hz;
        den = 1;
        let told = num.checked_mul(crystal_hz)?;
        if !fits(num) || told.abs_diff(tsc_hz) > tsc_hz / 1_000_000_000 {
            return None;
        }
    }
    let (num, den) = (u32::try_from(num).ok()?, u32::try_from(den).ok()?);
    if num == 0 || den == 0 {
        None
    } else {
        Some((den, num, crystal))
    }
}

#[cfg(test)]
mod tests;
