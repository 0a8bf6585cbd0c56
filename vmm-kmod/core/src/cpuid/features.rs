//! Feature leaves: what of the host's bits the guest may know of.
//!
//! Every mask is an allow-list: a bit that a future CPU adds stays hidden
//! until someone has made sure that we honour it.

use super::{BASIC, CpuidConfig, CpuidTable, EXT, Kind, Regs, Vendor, ZERO};

/// Leaf 1 ECX bit 27: CR4.OSXSAVE as the guest set it.
pub(super) const L1C_OSXSAVE: u32 = 1 << 27;
/// Leaf 1 EDX bit 9: the local APIC is enabled.
pub(super) const L1D_APIC: u32 = 1 << 9;

const L1C_PCID: u32 = 1 << 17;
const L1C_X2APIC: u32 = 1 << 21;
const L1C_TSC_DEADLINE: u32 = 1 << 24;
const L1C_XSAVE: u32 = 1 << 26;
const L1C_HYPERVISOR: u32 = 1 << 31;
/// FMA, AVX, F16C: need XCR0.AVX.
const L1C_AVX: u32 = 1 << 12 | 1 << 28 | 1 << 29;
/// SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AES,
/// RDRAND, and those above. Not DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2,
/// CNXT-ID, SDBG, xTPR, PDCM, DCA: nothing stands behind them.
const L1C: u32 = 1
    | 1 << 1
    | 1 << 9
    | 1 << 13
    | L1C_PCID
    | 1 << 19
    | 1 << 20
    | 1 << 22
    | 1 << 23
    | 1 << 25
    | L1C_XSAVE
    | 1 << 30
    | L1C_AVX;
/// FPU to CX8 without MCE (0–6, 8), SEP, PGE, CMOV, PSE-36, CLFSH, MMX, FXSR,
/// SSE, SSE2, SS. Not PSN, DS, ACPI, TM, PBE.
const L1D: u32 = 0x17f
    | 1 << 11
    | 1 << 13
    | 1 << 15
    | 1 << 17
    | 1 << 19
    | 1 << 23
    | 1 << 24
    | 1 << 25
    | 1 << 26
    | 1 << 27;
/// MCE, APIC, MTRR, MCA, PAT: emulated, so there whatever the host has.
const L1D_FORCED: u32 = 1 << 7 | L1D_APIC | 1 << 12 | 1 << 14 | 1 << 16;

const L7B_TSC_ADJUST: u32 = 1 << 1;
const L7B_INVPCID: u32 = 1 << 10;
/// AVX2.
const L7B_AVX: u32 = 1 << 5;
/// AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL.
const L7B_AVX512: u32 =
    1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31;
/// FSGSBASE, BMI1, HLE, FDP_EXCPTN_ONLY, SMEP, BMI2, ERMS, RTM, FPU CS/DS
/// deprecation, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, SHA. Not SGX, PQM, MPX,
/// PQE, PT.
const L7B: u32 = 1
    | 1 << 3
    | 1 << 4
    | 1 << 6
    | 1 << 7
    | 1 << 8
    | 1 << 9
    | L7B_INVPCID
    | 1 << 11
    | 1 << 13
    | 1 << 18
    | 1 << 19
    | 1 << 20
    | 1 << 23
    | 1 << 24
    | 1 << 29
    | L7B_AVX
    | L7B_AVX512;
const L7C_RDPID: u32 = 1 << 22;
/// VAES, VPCLMULQDQ.
const L7C_AVX: u32 = 1 << 9 | 1 << 10;
/// AVX-512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ.
const L7C_AVX512: u32 = 1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14;
/// UMIP, GFNI, CLDEMOTE, MOVDIRI, MOVDIR64B. Not PKU, OSPKE, WAITPKG, CET,
/// LA57, key locker, ENQCMD, PKS.
const L7C: u32 = 1 << 2 | 1 << 8 | L7C_RDPID | 1 << 25 | 1 << 27 | 1 << 28 | L7C_AVX | L7C_AVX512;
/// AVX-512 4VNNIW, 4FMAPS, VP2INTERSECT, FP16.
const L7D_AVX512: u32 = 1 << 2 | 1 << 3 | 1 << 8 | 1 << 23;
const L7D_SPEC_CTRL: u32 = 1 << 26 | 1 << 27;
const L7D_L1D_FLUSH: u32 = 1 << 28;
const L7D_ARCH_CAPS: u32 = 1 << 29;
const L7D_SSBD: u32 = 1 << 31;
/// FSRM, MD_CLEAR, SERIALIZE, TSXLDTRK. Not UINTR, hybrid, PCONFIG, LBR, CET,
/// AMX.
const L7D: u32 = 1 << 4 | 1 << 10 | 1 << 14 | 1 << 16 | L7D_AVX512;

/// AVX-VNNI, AVX-IFMA (EAX of leaf 7 sub-leaf 1).
const L71A_AVX: u32 = 1 << 4 | 1 << 23;
/// AVX-512 BF16.
const L71A_AVX512: u32 = 1 << 5;
/// Fast zero-length MOVSB, short STOSB, short CMPSB/SCASB.
const L71A: u32 = 1 << 10 | 1 << 11 | 1 << 12 | L71A_AVX | L71A_AVX512;
/// AVX-VNNI-INT8, AVX-NE-CONVERT (EDX).
const L71D_AVX: u32 = 1 << 4 | 1 << 5;
/// MCDT_NO (EDX of leaf 7 sub-leaf 2); the others are bits of
/// IA32_SPEC_CTRL.
const L72D: u32 = 1 << 5;

const X1D_GIB: u32 = 1 << 26;
const X1D_RDTSCP: u32 = 1 << 27;
/// SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
const X1D_INTEL: u32 = 1 << 11 | 1 << 20 | X1D_GIB | X1D_RDTSCP | 1 << 29;
/// Beside Intel's: AMD's copy of leaf 1, MMXEXT, FFXSR, 3DNow.
const X1D_AMD: u32 = X1D_INTEL | 0x0183_f3ff | 1 << 22 | 1 << 25 | 1 << 30 | 1 << 31;
/// LAHF, LZCNT, PREFETCHW.
const X1C_INTEL: u32 = 1 | 1 << 5 | 1 << 8;
/// Beside Intel's: CMP legacy, AltMovCr8, SSE4A, misaligned SSE, XOP, FMA4,
/// TBM, topology extensions. Not SVM, IBS, SKINIT, WDT, performance counters,
/// MONITORX.
const X1C_AMD: u32 =
    X1C_INTEL | 1 << 1 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 11 | 1 << 16 | 1 << 21 | 1 << 22;
const X1C_AVX: u32 = 1 << 11 | 1 << 16;
/// CLZERO, XSAVEERPTR, WBNOINVD (AMD leaf 0x8000_0008 EBX).
const X8B_AMD: u32 = 1 | 1 << 2 | 1 << 9;
const X8B_SPEC_CTRL: u32 = 1 << 12 | 1 << 14 | 1 << 15;
const X8B_SSBD: u32 = 1 << 24;
/// No nested data breakpoints, LFENCE serializes, null selector clears base
/// (AMD leaf 0x8000_0021 EAX).
const X21A: u32 = 1 | 1 << 2 | 1 << 6;

/// Leaf 6 EAX bit 2: the LAPIC timer never stops.
const ARAT: u32 = 1 << 2;

/// Whether `cond` lets the bits of `mask` through.
fn gate(v: u32, mask: u32, cond: bool) -> u32 {
    if cond { v } else { v & !mask }
}

pub(super) fn basic(t: &mut CpuidTable, cfg: &CpuidConfig, host: &impl Fn(u32, u32) -> Regs) {
    let [host_max, b, c, d] = host(0, 0);
    let caps = &cfg.caps;
    // Intel guests look for the TSC's frequency in leaf 0x15 only if the
    // highest leaf reaches it; leaves in between that the host lacks are zero.
    let floor = match cfg.vendor {
        Vendor::Intel => 0x16,
        Vendor::Amd => 0xd,
    };
    t.max_basic = host_max.clamp(floor, BASIC as u32 - 1);
    t.set_basic(0, Kind::Plain, [t.max_basic, b, c, d]);

    let leaf = |n: u32, sub: u32| if n <= host_max { host(n, sub) } else { ZERO };
    let avx = t.xstate.avx();
    let avx512 = t.xstate.avx512();
    let xsave = t.xstate.allowed() != 0;

    let [a, b, c, d] = leaf(1, 0);
    let mut c = c & L1C;
    c = gate(c, L1C_PCID, caps.pcid);
    c = gate(c, L1C_XSAVE, xsave);
    c = gate(c, L1C_AVX, avx);
    for (bit, on) in [
        (L1C_X2APIC, cfg.x2apic),
        (L1C_TSC_DEADLINE, caps.tsc_deadline),
        (L1C_HYPERVISOR, cfg.hypervisor),
    ] {
        if on {
            c |= bit;
        }
    }
    // CLFLUSH line size and brand index are the host's; topology fills the
    // rest.
    t.set_basic(1, Kind::Features, [a, b & 0xffff, c, d & L1D | L1D_FORCED]);
    t.set_basic(2, Kind::Plain, leaf(2, 0));
    t.set_basic(6, Kind::Plain, [ARAT, 0, 0, 0]);

    let first = t.used;
    let [subs, b, c, d] = leaf(7, 0);
    let mut b = b & L7B;
    b = gate(b, L7B_INVPCID, caps.invpcid && caps.pcid);
    b = gate(b, L7B_AVX | L7B_AVX512, avx);
    b = gate(b, L7B_AVX512, avx512);
    if caps.tsc_adjust && cfg.vendor == Vendor::Intel {
        b |= L7B_TSC_ADJUST;
    }
    let mut c = c & L7C;
    c = gate(c, L7C_RDPID, caps.rdtscp);
    c = gate(c, L7C_AVX, avx);
    c = gate(c, L7C_AVX512, avx512);
    let mut allowed = L7D;
    for (bits, on) in [
        (L7D_SPEC_CTRL, caps.spec_ctrl),
        (L7D_SSBD, caps.ssbd && caps.spec_ctrl),
        (L7D_ARCH_CAPS, caps.arch_capabilities),
        (L7D_L1D_FLUSH, caps.l1d_flush),
    ] {
        if on {
            allowed |= bits;
        }
    }
    let d = gate(d & allowed, L7D_AVX512, avx512);
    let max_sub = subs.min(2);
    t.push([max_sub, b, c, d]);
    if max_sub >= 1 {
        let [a, _, _, d] = leaf(7, 1);
        let a = gate(a & L71A, L71A_AVX | L71A_AVX512, avx);
        t.push([
            gate(a, L71A_AVX512, avx512),
            0,
            0,
            if avx { d & L71D_AVX } else { 0 },
        ]);
    }
    if max_sub >= 2 {
        t.push([0, 0, 0, leaf(7, 2)[3] & L72D]);
    }
    t.set_basic(
        7,
        Kind::Sub {
            first,
            count: t.used - first,
        },
        ZERO,
    );
}

pub(super) fn extended(t: &mut CpuidTable, cfg: &CpuidConfig, host: &impl Fn(u32, u32) -> Regs) {
    let amd = cfg.vendor == Vendor::Amd;
    let [host_max, b, c, d] = host(0x8000_0000, 0);
    let top = if amd { EXT as u32 - 1 } else { 8 };
    // Leaf 8 exists on every CPU with nested paging; a host that says less is
    // not believed, since leaf 7 carries the invariant TSC.
    let max = host_max.clamp(0x8000_0008, 0x8000_0000 + top);
    t.set_ext(0, Kind::Plain, [max, b, c, d]);
    let leaf = |n: u32, sub: u32| {
        if host_max >= 0x8000_0000 && n <= host_max {
            host(n, sub)
        } else {
            ZERO
        }
    };

    let [a, b, c, d] = leaf(0x8000_0001, 0);
    let (mc, md) = if amd {
        (X1C_AMD, X1D_AMD)
    } else {
        (X1C_INTEL, X1D_INTEL)
    };
    let c = gate(c & mc, X1C_AVX, t.xstate.avx());
    let mut d = d & md;
    d = gate(d, X1D_GIB, cfg.caps.gib_pages);
    d = gate(d, X1D_RDTSCP, cfg.caps.rdtscp);
    t.set_ext(1, Kind::Plain, [a, if amd { b } else { 0 }, c, d]);
    for n in 2..=6 {
        if n == 5 && !amd {
            continue;
        }
        t.set_ext(n as usize, Kind::Plain, leaf(0x8000_0000 + n, 0));
    }
    let invariant = u32::from(cfg.caps.invariant_tsc) << 8;
    t.set_ext(7, Kind::Plain, [0, 0, 0, invariant]);

    let [a, b, _, _] = leaf(0x8000_0008, 0);
    let mut phys = a & 0xff;
    let lin = if a & 0xff00 == 0 {
        48
    } else {
        (a >> 8 & 0xff).min(48)
    };
    if phys == 0 {
        phys = 36;
    }
    if cfg.phys_bits != 0 {
        phys = phys.min(u32::from(cfg.phys_bits));
    }
    let mut b_allowed = if amd { X8B_AMD } else { 1 << 9 };
    if amd && cfg.caps.spec_ctrl {
        b_allowed |= X8B_SPEC_CTRL;
        if cfg.caps.ssbd {
            b_allowed |= X8B_SSBD;
        }
    }
    t.set_ext(8, Kind::Plain, [lin << 8 | phys, b & b_allowed, 0, 0]);
    if amd {
        t.set_ext(0x19, Kind::Plain, leaf(0x8000_0019, 0));
        t.set_ext(0x1a, Kind::Plain, leaf(0x8000_001a, 0));
        t.set_ext(0x21, Kind::Plain, [leaf(0x8000_0021, 0)[0] & X21A, 0, 0, 0]);
    }
}
