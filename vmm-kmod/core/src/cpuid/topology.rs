//! Sockets, cores and threads: leaves 1, 4, 0xB, 0x1F and AMD's.
//!
//! SDM Vol. 3A §8.9, APM Vol. 3 appendix E.5.

use super::{CpuidConfig, CpuidTable, Kind, Regs, Vendor, ZERO};

/// Shape of the virtual machine; 0 counts as 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Packages.
    pub sockets: u16,
    /// Cores of a package.
    pub cores: u16,
    /// Threads of a core.
    pub threads: u16,
}

impl Default for Topology {
    fn default() -> Self {
        Topology {
            sockets: 1,
            cores: 1,
            threads: 1,
        }
    }
}

/// Bits that number `n` things.
fn width(n: u32) -> u32 {
    n.max(1).next_power_of_two().trailing_zeros()
}

pub(super) fn fill(t: &mut CpuidTable, cfg: &CpuidConfig, host: &impl Fn(u32, u32) -> Regs) {
    let threads = u32::from(cfg.topology.threads.max(1));
    let cores = u32::from(cfg.topology.cores.max(1));
    // Both are 16 bits wide.
    let logical = threads.saturating_mul(cores);

    let [_, b, _, d] = &mut t.basic[1].regs;
    *b = *b & 0xffff | logical.min(255) << 16 | (cfg.apic_id & 0xff) << 24;
    *d &= !(1 << 28);
    if logical > 1 {
        *d |= 1 << 28;
    }

    let host_max = host(0, 0)[0];
    if cfg.vendor == Vendor::Intel {
        caches(t, threads, cores, |i| {
            if host_max >= 4 { host(4, i) } else { ZERO }
        });
    }
    if cfg.vendor == Vendor::Intel || host_max >= 0xb {
        levels(t, cfg, threads, logical, host_max);
    }
    if cfg.vendor == Vendor::Amd {
        amd(t, cfg, threads, logical);
    }
}

/// Leaf 4: L1 and L2 belong to a core, L3 and beyond to the package.
fn caches(t: &mut CpuidTable, threads: u32, cores: u32, host: impl Fn(u32) -> Regs) {
    let first = t.used;
    for i in 0..8 {
        let [a, b, c, d] = host(i);
        if a & 0x1f == 0 {
            break;
        }
        let level = a >> 5 & 7;
        let sharing = if level >= 3 {
            threads.saturating_mul(cores)
        } else {
            threads
        };
        let a = a & 0x3ff | (sharing.min(4096) - 1) << 14 | (cores.min(64) - 1) << 26;
        if !t.push([a, b, c, d]) {
            break;
        }
    }
    let count = t.used - first;
    t.set_basic(4, Kind::Sub { first, count }, ZERO);
}

/// Leaves 0xB and 0x1F: SMT, then core.
fn levels(t: &mut CpuidTable, cfg: &CpuidConfig, threads: u32, logical: u32, host_max: u32) {
    let first = t.used;
    let id = cfg.apic_id;
    t.push([width(threads), threads & 0xffff, 1 << 8, id]);
    t.push([width(logical), logical & 0xffff, 2 << 8 | 1, id]);
    let count = t.used - first;
    t.set_basic(0xb, Kind::Topology { first, count }, ZERO);
    if host_max >= 0x1f && cfg.vendor == Vendor::Intel {
        t.set_basic(0x1f, Kind::Topology { first, count }, ZERO);
    }
}

/// 0x8000_0008 ECX, 0x8000_001D, 0x8000_001E.
fn amd(t: &mut CpuidTable, cfg: &CpuidConfig, threads: u32, logical: u32) {
    t.ext[8].regs[2] = width(logical).min(15) << 12 | (logical.min(256) - 1);
    if t.max_extended() < 0x8000_001e || t.ext[1].regs[2] & (1 << 22) == 0 {
        return;
    }
    // L1 data, L1 instruction, L2, L3: sizes of a plain core, 64-byte lines.
    // {type, level, ways, sets, sharing}
    let first = t.used;
    for (kind, level, ways, sets, sharing) in [
        (1, 1, 8, 64, threads),
        (2, 1, 8, 64, threads),
        (3, 2, 8, 1024, threads),
        (3, 3, 16, 8192, logical),
    ] {
        let a = kind | level << 5 | 1 << 8 | (sharing.min(4096) - 1) << 14;
        t.push([a, 63 | (ways - 1) << 22, sets - 1, 0]);
    }
    let count = t.used - first;
    t.set_ext(0x1d, Kind::Sub { first, count }, ZERO);
    let core = cfg.apic_id >> width(threads);
    t.set_ext(
        0x1e,
        Kind::Plain,
        [cfg.apic_id, (threads.min(256) - 1) << 8 | core & 0xff, 0, 0],
    );
}
