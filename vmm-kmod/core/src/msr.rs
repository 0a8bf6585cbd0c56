//! Model-specific registers that are emulated in the kernel, and the verdict
//! on every other: who else knows it, or #GP.
//!
//! Sources: SDM Vol. 4, APM Vol. 2 appendix A. What neither this file nor the
//! backend knows leaves to userland as FreeBSD's vmm does it (RDMSR and WRMSR
//! exits), which then injects #GP or, with `-w`, ignores the access.

mod mtrr;
pub mod number;

use crate::cpuid::{CpuidTable, Vendor};
use mtrr::Mtrrs;
use number::*;

/// What becomes of an RDMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrRead {
    /// The answer for EDX:EAX.
    Value(u64),
    /// #GP(0).
    Gp,
    /// Nobody in the kernel knows it: RDMSR exit to userland.
    Unknown,
    /// The CPU backend holds it (EFER, PAT, FS base, STAR, SPEC_CTRL, …).
    Backend,
    /// IA32_APIC_BASE: ask the LAPIC.
    ApicBase,
    /// x2APIC register, number - 0x800: ask the LAPIC.
    X2Apic(u8),
    /// IA32_TSC_DEADLINE: ask the LAPIC.
    TscDeadline,
    /// The guest's TSC.
    Tsc,
}

/// What becomes of a WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrWrite {
    /// Stored or ignored; done.
    Done,
    /// #GP(0).
    Gp,
    /// Nobody in the kernel knows it: WRMSR exit to userland.
    Unknown,
    /// The value has no reserved bit set and is canonical where it must be;
    /// the CPU backend takes it.
    Backend,
    /// IA32_EFER, reserved bits checked. What depends on the CPU's mode is
    /// [`efer_change_allowed`]'s.
    Efer,
    /// IA32_APIC_BASE: the LAPIC checks and takes it.
    ApicBase,
    /// x2APIC register, number - 0x800: the LAPIC checks and takes it.
    X2Apic(u8),
    /// IA32_TSC_DEADLINE: the LAPIC takes it.
    TscDeadline,
    /// IA32_TIME_STAMP_COUNTER: make the guest's TSC equal to the value, then
    /// tell [`MsrState::tsc_moved`] by how much it moved.
    Tsc,
    /// IA32_TSC_ADJUST was stored; the guest's TSC moves by this (modulo
    /// 2^64).
    TscAdjust(u64),
}

/// Constants of one vCPU's MSRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrConfig {
    /// Whose MSRs they are.
    pub vendor: Vendor,
    /// Microcode revision of the host, as IA32_BIOS_SIGN_ID bits 63:32 (AMD:
    /// PATCH_LEVEL bits 31:0) has it.
    pub microcode: u32,
    /// The host's IA32_ARCH_CAPABILITIES; 0 if it has none.
    pub arch_capabilities: u64,
    /// Guest's TSC frequency, Hz.
    pub tsc_hz: u64,
}

/// The emulated MSRs of one vCPU.
#[derive(Clone, Debug)]
pub struct MsrState {
    cfg: MsrConfig,
    has: Features,
    mtrr: Mtrrs,
    misc_enable: u64,
    tsc_adjust: u64,
    hwcr: u64,
    de_cfg: u64,
}

/// CPUID bits that decide whether an MSR exists.
#[derive(Clone, Copy, Debug, Default)]
struct Features {
    tsc_adjust: bool,
    tsc_deadline: bool,
    rdtscp: bool,
    spec_ctrl: bool,
    ibpb: bool,
    l1d_flush: bool,
    arch_capabilities: bool,
    xsaves: bool,
    sep: bool,
    efer: u64,
}

/// Bits of IA32_ARCH_CAPABILITIES that say "not affected" or that hold in a
/// guest as they do on the host. Not TSX_CTRL, MISC_PACKAGE_CTLS and others
/// that promise a further MSR.
const ARCH_CAPS: u64 = 1
    | 1 << 1
    | 1 << 2
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 17
    | 1 << 19
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27;
/// SKIP_L1DFL_VMENTRY: the host flushes L1D, a nested one need not.
const ARCH_CAPS_SKIP_L1DFL: u64 = 1 << 3;

/// IA32_MISC_ENABLE: fast strings, and BTS and PEBS unavailable.
const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
/// Bits of IA32_MISC_ENABLE that may be written: fast strings, TCC, EIST,
/// MONITOR, limit CPUID, xTPR, XD disable. They are stored and have no effect.
const MISC_ENABLE_RW: u64 = 1 | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 34;
/// EMON, BTS and PEBS availability: writes are ignored (SDM Vol. 4 table 2-2).
const MISC_ENABLE_RO: u64 = 1 << 7 | 1 << 11 | 1 << 12;

/// IA32_DEBUGCTL bits that may be written and read as 0: LBR, BTF, TR, BTS,
/// BTINT, BTS_OFF_OS/USR, freezes.
const DEBUGCTL_IGNORED: u64 = 0x1fc3;

/// HWCR as BIOS leaves it: TscFreqSel, MonMwaitDis, SmmLock's neighbours 0.
const HWCR_RESET: u64 = 0x0100_0010 | 1 << 9;
/// VM_CR: SVM disabled and locked (APM Vol. 2 §15.30.1).
const VM_CR_LOCKED: u64 = 1 << 3 | 1 << 4;
/// DE_CFG bit 1: LFENCE is dispatch serializing (it is, on a host that runs
/// us).
const DE_CFG_LFENCE: u64 = 1 << 1;

/// EFER.SCE, LME, LMA, NXE.
const EFER_BASE: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;
/// EFER.FFXSR (AMD).
const EFER_FFXSR: u64 = 1 << 14;

impl MsrState {
    /// The MSRs as firmware hands them over: MTRRs on, memory write-back.
    pub fn new(cfg: &MsrConfig, cpuid: &CpuidTable) -> Self {
        let [_, b7, _, d7] = cpuid.leaf7();
        let [_, _, c1, d1] = cpuid.leaf1();
        let [_, _, _, dx] = cpuid.ext1();
        let amd = cfg.vendor == Vendor::Amd;
        let b8 = if amd { cpuid.ext8()[1] } else { 0 };
        let mut efer = EFER_BASE;
        if dx & (1 << 20) == 0 {
            efer &= !(1 << 11);
        }
        if amd && dx & (1 << 25) != 0 {
            efer |= EFER_FFXSR;
        }
        let has = Features {
            tsc_adjust: b7 & (1 << 1) != 0,
            tsc_deadline: c1 & (1 << 24) != 0,
            rdtscp: dx & (1 << 27) != 0,
            spec_ctrl: d7 & (1 << 26 | 1 << 27 | 1 << 31) != 0
                || b8 & (1 << 14 | 1 << 15 | 1 << 24) != 0,
            ibpb: d7 & (1 << 26) != 0 || b8 & (1 << 12) != 0,
            l1d_flush: d7 & (1 << 28) != 0,
            arch_capabilities: d7 & (1 << 29) != 0,
            xsaves: cpuid.has_xsaves(),
            sep: d1 & (1 << 11) != 0,
            efer,
        };
        MsrState {
            cfg: *cfg,
            has,
            mtrr: Mtrrs::new(cpuid.phys_bits()),
            misc_enable: MISC_ENABLE_RESET,
            tsc_adjust: 0,
            hwcr: HWCR_RESET,
            de_cfg: DE_CFG_LFENCE,
        }
    }

    /// The guest's TSC frequency becomes this, Hz.
    pub fn set_tsc_hz(&mut self, hz: u64) {
        self.cfg.tsc_hz = hz;
    }

    /// IA32_TSC_ADJUST follows a change of the TSC by other means: a write of
    /// MSR 0x10 adds as much to it (SDM Vol. 3B §17.17.3).
    pub fn tsc_moved(&mut self, delta: u64) {
        self.tsc_adjust = self.tsc_adjust.wrapping_add(delta);
    }

    /// RDMSR of `msr`.
    #[inline]
    pub fn rdmsr(&self, msr: u32) -> MsrRead {
        match msr {
            X2APIC_FIRST..=X2APIC_LAST => MsrRead::X2Apic((msr & 0xff) as u8),
            TSC_DEADLINE => {
                if self.has.tsc_deadline {
                    MsrRead::TscDeadline
                } else {
                    MsrRead::Gp
                }
            }
            APIC_BASE => MsrRead::ApicBase,
            TSC => MsrRead::Tsc,
            _ => self.rdmsr_slow(msr),
        }
    }

    /// WRMSR of `value` to `msr`.
    #[inline]
    pub fn wrmsr(&mut self, msr: u32, value: u64) -> MsrWrite {
        match msr {
            X2APIC_FIRST..=X2APIC_LAST => MsrWrite::X2Apic((msr & 0xff) as u8),
            TSC_DEADLINE => {
                if self.has.tsc_deadline {
                    MsrWrite::TscDeadline
                } else {
                    MsrWrite::Gp
                }
            }
            APIC_BASE => MsrWrite::ApicBase,
            TSC => MsrWrite::Tsc,
            _ => self.wrmsr_slow(msr, value),
        }
    }

    fn rdmsr_slow(&self, msr: u32) -> MsrRead {
        use MsrRead::{Backend, Gp, Value};
        let only = |there: bool, r: MsrRead| if there { r } else { Gp };
        match msr {
            EFER | STAR | LSTAR | CSTAR | SFMASK | FS_BASE | GS_BASE | KERNEL_GS_BASE | PAT => {
                Backend
            }
            SYSENTER_CS | SYSENTER_ESP | SYSENTER_EIP => only(self.has.sep, Backend),
            TSC_AUX => only(self.has.rdtscp, Backend),
            SPEC_CTRL => only(self.has.spec_ctrl, Backend),
            TSC_ADJUST => only(self.has.tsc_adjust, Value(self.tsc_adjust)),
            ARCH_CAPABILITIES => only(self.has.arch_capabilities, Value(self.arch_caps())),
            // No bit of IA32_XSS is offered, so it can only be 0.
            XSS => only(self.has.xsaves, Value(0)),
            // Write-only commands.
            PRED_CMD | FLUSH_CMD | BIOS_UPDT_TRIG => Gp,
            MTRR_CAP
            | MTRR_VAR_FIRST..=MTRR_VAR_LAST
            | MTRR_FIX64K
            | MTRR_FIX16K_FIRST
            | MTRR_FIX16K_LAST
            | MTRR_FIX4K_FIRST..=MTRR_FIX4K_LAST
            | MTRR_DEF_TYPE => self.mtrr.read(msr).map_or(Gp, Value),
            // MCG_CAP says: no banks, no MCG_CTL.
            P5_MC_ADDR | P5_MC_TYPE | MCG_CAP | MCG_STATUS => Value(0),
            MCG_CTL | MC_FIRST..=MC_LAST | MC_CTL2_FIRST..=MC_CTL2_LAST => Gp,
            MISC_ENABLE => Value(self.misc_enable),
            BIOS_SIGN_ID => Value(match self.cfg.vendor {
                Vendor::Intel => u64::from(self.cfg.microcode) << 32,
                Vendor::Amd => u64::from(self.cfg.microcode),
            }),
            DEBUGCTL | LASTBRANCH_TOS | LBR_SELECT | LAST_FROM..=LAST_INT_TO => Value(0),
            _ => match self.cfg.vendor {
                Vendor::Intel => self.rdmsr_intel(msr),
                Vendor::Amd => self.rdmsr_amd(msr),
            },
        }
    }

    fn rdmsr_intel(&self, msr: u32) -> MsrRead {
        use MsrRead::{Gp, Unknown, Value};
        let ratio = self.ratio();
        match msr {
            PLATFORM_ID | SMI_COUNT | PERF_CTL => Value(0),
            // Locked, neither VMX nor SMX nor SGX.
            FEATURE_CONTROL => Value(1),
            // Base ratio twice: highest without turbo, most efficient.
            PLATFORM_INFO => Value(ratio << 8 | ratio << 40),
            PERF_STATUS => Value(ratio << 8),
            TURBO_RATIO_LIMIT | TURBO_RATIO_LIMIT1 => Value(ratio * 0x0101_0101_0101_0101),
            THERM_FIRST..=THERM_STATUS | PACKAGE_THERM_STATUS | PACKAGE_THERM_INTERRUPT => Value(0),
            // Every Linux probes these; CPUID says that they are not there.
            MISC_FEATURES_ENABLES | PERF_CAPABILITIES => Gp,
            _ => Unknown,
        }
    }

    fn rdmsr_amd(&self, msr: u32) -> MsrRead {
        use MsrRead::{Unknown, Value};
        match msr {
            K8_HWCR => Value(self.hwcr),
            K8_DE_CFG => Value(self.de_cfg),
            K8_VM_CR => Value(VM_CR_LOCKED),
            n if amd_ignored(n) => Value(0),
            _ => Unknown,
        }
    }

    #[cfg_attr(target_os = "none", optimize(speed))]
    fn wrmsr_slow(&mut self, msr: u32, value: u64) -> MsrWrite {
        use MsrWrite::{Backend, Done, Gp, Unknown};
        let check = |ok: bool, w: MsrWrite| if ok { w } else { Gp };
        match msr {
            EFER => check(value & !self.has.efer == 0, MsrWrite::Efer),
            LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE => {
                check(is_canonical(value), Backend)
            }
            STAR => Backend,
            SFMASK => check(value >> 32 == 0, Backend),
            PAT => check(pat_valid(value), Backend),
            SYSENTER_CS => check(self.has.sep, Backend),
            SYSENTER_ESP | SYSENTER_EIP => check(self.has.sep && is_canonical(value), Backend),
            TSC_AUX => check(self.has.rdtscp && value >> 32 == 0, Backend),
            // IBRS, STIBP, SSBD.
            SPEC_CTRL => check(self.has.spec_ctrl && value & !7 == 0, Backend),
            PRED_CMD => check(self.has.ibpb && value & !1 == 0, Backend),
            FLUSH_CMD => check(self.has.l1d_flush && value & !1 == 0, Backend),
            TSC_ADJUST => {
                if !self.has.tsc_adjust {
                    return Gp;
                }
                let delta = value.wrapping_sub(self.tsc_adjust);
                self.tsc_adjust = value;
                MsrWrite::TscAdjust(delta)
            }
            XSS => check(self.has.xsaves && value == 0, Done),
            MTRR_VAR_FIRST..=MTRR_VAR_LAST
            | MTRR_FIX64K
            | MTRR_FIX16K_FIRST
            | MTRR_FIX16K_LAST
            | MTRR_FIX4K_FIRST..=MTRR_FIX4K_LAST
            | MTRR_DEF_TYPE => check(self.mtrr.write(msr, value), Done),
            MTRR_CAP | ARCH_CAPABILITIES => Gp,
            P5_MC_ADDR | P5_MC_TYPE => Done,
            MCG_STATUS => check(value == 0, Done),
            MCG_CAP | MCG_CTL | MC_FIRST..=MC_LAST | MC_CTL2_FIRST..=MC_CTL2_LAST => Gp,
            // Selects the revision to be shown; an update is accepted and
            // changes nothing.
            BIOS_SIGN_ID | BIOS_UPDT_TRIG => Done,
            MISC_ENABLE => {
                if value & !(MISC_ENABLE_RW | MISC_ENABLE_RO) != 0 {
                    return Unknown;
                }
                self.misc_enable = value & MISC_ENABLE_RW | self.misc_enable & MISC_ENABLE_RO;
                Done
            }
            DEBUGCTL => check(value & !DEBUGCTL_IGNORED == 0, Done),
            LASTBRANCH_TOS | LBR_SELECT | LAST_FROM..=LAST_INT_TO => Done,
            _ => match self.cfg.vendor {
                Vendor::Intel => wrmsr_intel(msr),
                Vendor::Amd => self.wrmsr_amd(msr, value),
            },
        }
    }

    fn wrmsr_amd(&mut self, msr: u32, value: u64) -> MsrWrite {
        match msr {
            K8_HWCR => self.hwcr = value,
            K8_DE_CFG => self.de_cfg = value,
            K8_VM_CR => {}
            n if amd_ignored(n) => {}
            _ => return MsrWrite::Unknown,
        }
        MsrWrite::Done
    }

    fn arch_caps(&self) -> u64 {
        self.cfg.arch_capabilities & ARCH_CAPS | ARCH_CAPS_SKIP_L1DFL
    }

    /// TSC frequency in units of 100 MHz, at least 1.
    fn ratio(&self) -> u64 {
        (self.cfg.tsc_hz / 100_000_000).clamp(1, 0xff)
    }
}

fn wrmsr_intel(msr: u32) -> MsrWrite {
    match msr {
        PERF_CTL | THERM_FIRST..=THERM_STATUS | PACKAGE_THERM_STATUS | PACKAGE_THERM_INTERRUPT => {
            MsrWrite::Done
        }
        FEATURE_CONTROL
        | PLATFORM_ID
        | PLATFORM_INFO
        | PERF_STATUS
        | SMI_COUNT
        | MISC_FEATURES_ENABLES
        | PERF_CAPABILITIES => MsrWrite::Gp,
        _ => MsrWrite::Unknown,
    }
}

/// AMD's MSRs that read as 0 and take any write: performance counters of the
/// K7, SYSCFG, IORRs, TOP_MEM, NB_CFG, INT_PENDING, MMIO_CONF_BASE, P-states,
/// SMM's, and the configuration registers where errata are worked around.
const fn amd_ignored(msr: u32) -> bool {
    matches!(
        msr,
        0xc001_0000..=0xc001_0007
            | 0xc001_0010
            | 0xc001_0016..=0xc001_001a
            | 0xc001_001d
            | 0xc001_001f
            | 0xc001_0055
            | 0xc001_0058
            | 0xc001_0061..=0xc001_006b
            | 0xc001_0111..=0xc001_0113
            | 0xc001_1020..=0xc001_1023
            | 0xc001_1028
            | 0xc001_102a..=0xc001_102d
    )
}

/// Whether bits 63:47 of `v` are equal.
pub const fn is_canonical(v: u64) -> bool {
    (((v << 16) as i64) >> 16) as u64 == v
}

/// Whether every byte is a memory type that PAT knows (SDM Vol. 3A §11.12.2).
pub const fn pat_valid(v: u64) -> bool {
    // Types 0, 1, 4, 5, 6, 7: no reserved bit, and not 2 or 3, that is bit 1
    // only with bit 2.
    const LOW3: u64 = 0x0707_0707_0707_0707;
    const BIT1: u64 = 0x0202_0202_0202_0202;
    v & !LOW3 == 0 && (v & BIT1) << 1 & !v == 0
}

/// Whether WRMSR may change EFER from `old` to `new`: LME only while paging
/// is off (SDM Vol. 3A §4.1.2). LMA is the CPU's own; keep the old one.
pub const fn efer_change_allowed(old: u64, new: u64, cr0: u64) -> bool {
    const LME: u64 = crate::cpu::EFER_LME;
    (old ^ new) & LME == 0 || cr0 & crate::cpu::CR0_PG == 0
}

#[cfg(test)]
mod tests;
