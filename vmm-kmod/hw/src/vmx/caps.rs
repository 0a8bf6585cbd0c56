//! What the CPU's VT-x can do (SDM Vol. 3D appendix A), and refusing politely
//! when it is not enough.

use super::fields::{entry_ctl, exit_ctl, msr, pin, proc1, proc2};
use super::instr;
use crate::mitigation::Mitigations;
use bitflags::bitflags;
use core::fmt;

/// Where capability values come from: the CPU, or a table in tests.
pub trait CpuInfo {
    /// RDMSR; only asked for MSRs that must exist by what was read before.
    fn rdmsr(&self, msr: u32) -> u64;
    /// CPUID as EAX, EBX, ECX, EDX.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];
}

/// The CPU that this code runs on. Needs CPL 0.
pub struct ThisCpu(());

impl ThisCpu {
    /// # Safety
    /// CPL 0, and every CPU of the machine is alike.
    pub unsafe fn new() -> Self {
        ThisCpu(())
    }
}

impl CpuInfo for ThisCpu {
    fn rdmsr(&self, msr: u32) -> u64 {
        // SAFETY: CPL 0 by the promise at creation; `probe` asks only for
        // MSRs that CPUID or another MSR announced.
        unsafe { instr::rdmsr(msr) }
    }
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        instr::cpuid(leaf, subleaf)
    }
}

bitflags! {
    /// What is used where the CPU has it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u32 {
        /// 2 MiB EPT pages.
        const EPT_2M = 1 << 0;
        /// 1 GiB EPT pages.
        const EPT_1G = 1 << 1;
        /// EPT accessed and dirty bits.
        const EPT_AD = 1 << 2;
        /// Execute-only EPT translations.
        const EPT_EXEC_ONLY = 1 << 3;
        /// INVEPT, single-context type.
        const INVEPT_CONTEXT = 1 << 4;
        /// VPID, with the single-context and all-context INVVPID types.
        const VPID = 1 << 5;
        /// TPR shadow.
        const TPR_SHADOW = 1 << 6;
        /// Virtualize APIC accesses (an APIC-access page).
        const APIC_ACCESSES = 1 << 7;
        /// APIC-register virtualization.
        const APIC_REGISTER = 1 << 8;
        /// Virtual-interrupt delivery.
        const VIRTUAL_INTERRUPTS = 1 << 9;
        /// Virtualize x2APIC mode.
        const X2APIC = 1 << 10;
        /// Posted interrupts.
        const POSTED_INTERRUPTS = 1 << 11;
        /// VMX-preemption timer.
        const PREEMPTION_TIMER = 1 << 12;
        /// RDTSCP and RDPID in the guest.
        const RDTSCP = 1 << 13;
        /// INVPCID in the guest.
        const INVPCID = 1 << 14;
        /// XSAVES and XRSTORS in the guest.
        const XSAVES = 1 << 15;
        /// WBINVD exiting.
        const WBINVD_EXITING = 1 << 16;
        /// PAUSE-loop exiting.
        const PAUSE_LOOP = 1 << 17;
        /// TSC scaling.
        const TSC_SCALING = 1 << 18;
        /// Page-modification log.
        const PML = 1 << 19;
        /// The CPU describes INS and OUTS in the instruction-information field.
        const INS_OUTS_INFO = 1 << 20;
        /// PAUSE exiting.
        const PAUSE_EXITING = 1 << 21;
        /// Monitor trap flag.
        const MTF = 1 << 22;
        /// XSAVE, and the host has turned it on.
        const XSAVE = 1 << 23;
        /// IA32_DEBUGCTL exists, as the debug store or the performance
        /// capabilities tell.
        const DEBUGCTL = 1 << 24;
    }
}

bitflags! {
    /// What VT-x lacks on this machine. `Display` says it to a user, with
    /// what to do about it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Missing: u32 {
        /// No VMX in CPUID.
        const VMX = 1 << 0;
        /// Locked off in IA32_FEATURE_CONTROL.
        const BIOS = 1 << 1;
        /// No secondary controls.
        const SECONDARY = 1 << 2;
        /// No EPT.
        const EPT = 1 << 3;
        /// No unrestricted guest.
        const UNRESTRICTED = 1 << 4;
        /// EPT cannot do a 4-level walk in write-back memory, or INVEPT lacks
        /// the all-context type.
        const EPT_KIND = 1 << 5;
        /// No load/save of EFER.
        const EFER = 1 << 6;
        /// No load/save of PAT.
        const PAT = 1 << 7;
        /// No MSR bitmaps.
        const MSR_BITMAPS = 1 << 8;
        /// No HLT exiting.
        const HLT = 1 << 9;
        /// No NMI exiting or virtual NMIs.
        const VIRTUAL_NMI = 1 << 10;
        /// No external-interrupt exiting.
        const EXTERNAL_INTERRUPT = 1 << 11;
        /// CR3 or INVLPG exits cannot be turned off.
        const TRUE_CONTROLS = 1 << 12;
        /// No TSC offsetting.
        const TSC_OFFSET = 1 << 13;
        /// A 64-bit host or guest is not possible.
        const LONG_MODE = 1 << 14;
        /// No MOV-DR exiting.
        const MOV_DR = 1 << 15;
        /// No interrupt-window or NMI-window exiting.
        const WINDOWS = 1 << 16;
        /// VMCS memory type is not write-back, or above 4 KiB.
        const VMCS_REGION = 1 << 17;
        /// Debug controls cannot be loaded and saved.
        const DEBUG_CONTROLS = 1 << 18;
    }
}

impl Missing {
    const fn text(self) -> &'static str {
        match self {
            Missing::VMX => {
                "the CPU has no VT-x (CPUID.1:ECX.VMX is 0); inside a virtual machine, turn on nested virtualization"
            }
            Missing::BIOS => {
                "VT-x is turned off and locked by the firmware (IA32_FEATURE_CONTROL); enable \"Intel Virtualization Technology\" in the BIOS setup and power-cycle"
            }
            Missing::SECONDARY => {
                "the CPU's VT-x has no secondary processor-based controls; a CPU of 2010 (Westmere) or later is needed"
            }
            Missing::EPT => {
                "the CPU's VT-x has no extended page tables (EPT); a CPU of 2010 (Westmere) or later is needed"
            }
            Missing::UNRESTRICTED => {
                "the CPU's VT-x has no unrestricted guest; a CPU of 2010 (Westmere) or later is needed"
            }
            Missing::EPT_KIND => {
                "the CPU's EPT lacks 4-level walks, write-back paging structures or all-context INVEPT"
            }
            Missing::EFER => "VT-x cannot load and save IA32_EFER at VM entry and exit",
            Missing::PAT => "VT-x cannot load and save IA32_PAT at VM entry and exit",
            Missing::MSR_BITMAPS => "VT-x has no MSR bitmaps",
            Missing::HLT => "VT-x cannot intercept HLT",
            Missing::VIRTUAL_NMI => "VT-x has no NMI exiting with virtual NMIs",
            Missing::EXTERNAL_INTERRUPT => "VT-x cannot intercept external interrupts",
            Missing::TRUE_CONTROLS => {
                "VT-x cannot run a guest without CR3 and INVLPG intercepts (no IA32_VMX_TRUE_*_CTLS)"
            }
            Missing::TSC_OFFSET => "VT-x has no TSC offsetting",
            Missing::LONG_MODE => "VT-x cannot run 64-bit hosts and guests",
            Missing::MOV_DR => "VT-x cannot intercept debug-register accesses",
            Missing::WINDOWS => "VT-x has no interrupt-window or NMI-window exiting",
            Missing::VMCS_REGION => "the VMCS region is not 4 KiB of write-back memory",
            Missing::DEBUG_CONTROLS => {
                "VT-x cannot load and save debug controls at VM entry and exit"
            }
            _ => "several VT-x features",
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not by `iter()`, which needs a table with the names.
        let mut left = self.bits();
        while left != 0 {
            let one = Missing::from_bits_retain(left & left.wrapping_neg());
            f.write_str(one.text())?;
            left &= left - 1;
            if left != 0 {
                f.write_str("; ")?;
            }
        }
        Ok(())
    }
}

/// Which bits of a control may be 0 and 1 (SDM Vol. 3D §A.3.1): a bit that is
/// 1 in `must1` must be 1, one that is 0 in `may1` must be 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Allowed 0-settings: bits that must be 1.
    pub must1: u32,
    /// Allowed 1-settings: bits that may be 1.
    pub may1: u32,
}

impl Allowed {
    /// From a capability MSR.
    pub const fn from_msr(v: u64) -> Self {
        Allowed {
            must1: v as u32,
            may1: (v >> 32) as u32,
        }
    }
    /// Whether all of `bits` may be 1.
    pub const fn can_set(&self, bits: u32) -> bool {
        self.may1 & bits == bits
    }
    /// Whether all of `bits` may be 0.
    pub const fn can_clear(&self, bits: u32) -> bool {
        self.must1 & bits == 0
    }
    /// The control value nearest to `wanted`: unavailable bits off, forced
    /// bits on.
    pub const fn adjust(&self, wanted: u32) -> u32 {
        wanted & self.may1 | self.must1
    }
}

/// IA32_FEATURE_CONTROL bit 0.
pub const FEATURE_CONTROL_LOCK: u64 = 1;
/// IA32_FEATURE_CONTROL bit 2.
pub const FEATURE_CONTROL_VMXON: u64 = 1 << 2;

/// The CPU's VT-x, all of it that is used.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// VMCS revision identifier.
    pub revision: u32,
    /// Pin-based controls.
    pub pin: Allowed,
    /// Primary processor-based controls.
    pub proc1: Allowed,
    /// Secondary processor-based controls.
    pub proc2: Allowed,
    /// VM-exit controls.
    pub exit: Allowed,
    /// VM-entry controls.
    pub entry: Allowed,
    /// CR0 bits that must be 1 in VMX operation.
    pub cr0_fixed0: u64,
    /// CR0 bits that may be 1.
    pub cr0_fixed1: u64,
    /// CR4 bits that must be 1.
    pub cr4_fixed0: u64,
    /// CR4 bits that may be 1.
    pub cr4_fixed1: u64,
    /// Optional features found.
    pub features: Features,
    /// The preemption timer counts down once every `1 << rate` TSC ticks.
    pub preemption_rate: u8,
    /// What speculative execution asks for.
    pub mitigations: Mitigations,
    /// XCR0 bits that a guest may use: those of the host whose state is
    /// switched (0 without XSAVE).
    pub xcr0: u64,
}

/// IA32_VMX_EPT_VPID_CAP bits (§A.10).
mod ept_cap {
    pub const EXEC_ONLY: u64 = 1 << 0;
    pub const WALK4: u64 = 1 << 6;
    pub const WRITE_BACK: u64 = 1 << 14;
    pub const PAGE_2M: u64 = 1 << 16;
    pub const PAGE_1G: u64 = 1 << 17;
    pub const INVEPT: u64 = 1 << 20;
    pub const AD: u64 = 1 << 21;
    pub const INVEPT_CONTEXT: u64 = 1 << 25;
    pub const INVEPT_ALL: u64 = 1 << 26;
    pub const INVVPID: u64 = 1 << 32;
    pub const INVVPID_CONTEXT: u64 = 1 << 41;
    pub const INVVPID_ALL: u64 = 1 << 42;
}

/// XCR0 components that are switched for a guest: x87, SSE, AVX, AVX-512.
/// PKRU and AMX are not: the host does not restore them around a guest.
pub const GUEST_XCR0: u64 = 0xe7;

impl Capabilities {
    /// Reads and judges. `host_xcr0` is XCR0 where the host has set
    /// CR4.OSXSAVE, else 0.
    pub fn probe(cpu: &impl CpuInfo, host_xcr0: u64) -> Result<Capabilities, Missing> {
        let [signature, _, ecx, edx] = cpu.cpuid(1, 0);
        if ecx & (1 << 5) == 0 {
            return Err(Missing::VMX);
        }
        let fc = cpu.rdmsr(msr::FEATURE_CONTROL);
        if fc & FEATURE_CONTROL_LOCK != 0 && fc & FEATURE_CONTROL_VMXON == 0 {
            return Err(Missing::BIOS);
        }
        let mut missing = Missing::empty();
        let mut need = |ok: bool, what: Missing| {
            if !ok {
                missing |= what;
            }
        };

        let basic = cpu.rdmsr(msr::VMX_BASIC);
        let region = (basic >> 32) & 0x1fff;
        let memory_type = (basic >> 50) & 0xf;
        need(region <= 4096 && memory_type == 6, Missing::VMCS_REGION);
        let exact = basic & (1 << 55) != 0;
        let control =
            |plain, exactly| Allowed::from_msr(cpu.rdmsr(if exact { exactly } else { plain }));
        let pin_c = control(msr::VMX_PINBASED, msr::VMX_TRUE_PINBASED);
        let proc_c = control(msr::VMX_PROCBASED, msr::VMX_TRUE_PROCBASED);
        let exit_c = control(msr::VMX_EXIT, msr::VMX_TRUE_EXIT);
        let entry_c = control(msr::VMX_ENTRY, msr::VMX_TRUE_ENTRY);
        let secondary = proc_c.can_set(proc1::SECONDARY);
        let proc2_c = if secondary {
            Allowed::from_msr(cpu.rdmsr(msr::VMX_PROCBASED2))
        } else {
            Allowed::default()
        };

        need(
            pin_c.can_set(pin::EXTERNAL_INTERRUPT),
            Missing::EXTERNAL_INTERRUPT,
        );
        need(
            pin_c.can_set(pin::NMI | pin::VIRTUAL_NMI),
            Missing::VIRTUAL_NMI,
        );
        need(proc_c.can_set(proc1::HLT), Missing::HLT);
        need(proc_c.can_set(proc1::TSC_OFFSETTING), Missing::TSC_OFFSET);
        need(proc_c.can_set(proc1::MSR_BITMAPS), Missing::MSR_BITMAPS);
        need(proc_c.can_set(proc1::MOV_DR), Missing::MOV_DR);
        need(
            proc_c.can_set(proc1::INTERRUPT_WINDOW | proc1::NMI_WINDOW),
            Missing::WINDOWS,
        );
        need(
            proc_c.can_clear(proc1::CR3_LOAD | proc1::CR3_STORE | proc1::INVLPG | proc1::RDTSC),
            Missing::TRUE_CONTROLS,
        );
        need(secondary, Missing::SECONDARY);
        need(proc2_c.can_set(proc2::EPT), Missing::EPT);
        need(
            proc2_c.can_set(proc2::UNRESTRICTED_GUEST),
            Missing::UNRESTRICTED,
        );
        need(
            exit_c.can_set(exit_ctl::HOST_64BIT) && entry_c.can_set(entry_ctl::IA32E_GUEST),
            Missing::LONG_MODE,
        );
        need(
            exit_c.can_set(exit_ctl::SAVE_EFER | exit_ctl::LOAD_EFER)
                && entry_c.can_set(entry_ctl::LOAD_EFER),
            Missing::EFER,
        );
        need(
            exit_c.can_set(exit_ctl::SAVE_PAT | exit_ctl::LOAD_PAT)
                && entry_c.can_set(entry_ctl::LOAD_PAT),
            Missing::PAT,
        );
        need(
            exit_c.can_set(exit_ctl::SAVE_DEBUG) && entry_c.can_set(entry_ctl::LOAD_DEBUG),
            Missing::DEBUG_CONTROLS,
        );

        let ept_vpid = if proc2_c.may1 & (proc2::EPT | proc2::VPID) != 0 {
            cpu.rdmsr(msr::VMX_EPT_VPID_CAP)
        } else {
            0
        };
        const EPT_NEEDED: u64 = ept_cap::WALK4 | ept_cap::WRITE_BACK | ept_cap::INVEPT;
        let invept_types = ept_vpid & (ept_cap::INVEPT_CONTEXT | ept_cap::INVEPT_ALL);
        need(
            !proc2_c.can_set(proc2::EPT)
                || (ept_vpid & EPT_NEEDED == EPT_NEEDED && invept_types != 0),
            Missing::EPT_KIND,
        );
        if !missing.is_empty() {
            return Err(missing);
        }

        let misc = cpu.rdmsr(msr::VMX_MISC);
        let mut features = Features::empty();
        let mut have = |ok: bool, f: Features| features.set(f, ok);
        have(ept_vpid & ept_cap::PAGE_2M != 0, Features::EPT_2M);
        have(ept_vpid & ept_cap::PAGE_1G != 0, Features::EPT_1G);
        have(ept_vpid & ept_cap::AD != 0, Features::EPT_AD);
        have(ept_vpid & ept_cap::EXEC_ONLY != 0, Features::EPT_EXEC_ONLY);
        have(
            ept_vpid & ept_cap::INVEPT_CONTEXT != 0,
            Features::INVEPT_CONTEXT,
        );
        const VPID_NEEDED: u64 = ept_cap::INVVPID | ept_cap::INVVPID_CONTEXT | ept_cap::INVVPID_ALL;
        have(
            proc2_c.can_set(proc2::VPID) && ept_vpid & VPID_NEEDED == VPID_NEEDED,
            Features::VPID,
        );
        let tpr = proc_c.can_set(proc1::TPR_SHADOW);
        have(tpr, Features::TPR_SHADOW);
        have(
            proc2_c.can_set(proc2::APIC_ACCESSES),
            Features::APIC_ACCESSES,
        );
        have(
            tpr && proc2_c.can_set(proc2::APIC_REGISTER),
            Features::APIC_REGISTER,
        );
        have(
            tpr && proc2_c.can_set(proc2::VIRTUAL_INTERRUPT_DELIVERY),
            Features::VIRTUAL_INTERRUPTS,
        );
        have(tpr && proc2_c.can_set(proc2::X2APIC), Features::X2APIC);
        have(
            pin_c.can_set(pin::POSTED_INTERRUPTS) && exit_c.can_set(exit_ctl::ACK_INTERRUPT),
            Features::POSTED_INTERRUPTS,
        );
        have(
            pin_c.can_set(pin::PREEMPTION_TIMER),
            Features::PREEMPTION_TIMER,
        );
        have(proc2_c.can_set(proc2::RDTSCP), Features::RDTSCP);
        have(proc2_c.can_set(proc2::INVPCID), Features::INVPCID);
        have(proc2_c.can_set(proc2::XSAVES), Features::XSAVES);
        have(proc2_c.can_set(proc2::WBINVD), Features::WBINVD_EXITING);
        have(proc2_c.can_set(proc2::PAUSE_LOOP), Features::PAUSE_LOOP);
        have(proc2_c.can_set(proc2::TSC_SCALING), Features::TSC_SCALING);
        have(proc2_c.can_set(proc2::PML), Features::PML);
        have(basic & (1 << 54) != 0, Features::INS_OUTS_INFO);
        have(proc_c.can_set(proc1::PAUSE), Features::PAUSE_EXITING);
        have(proc_c.can_set(proc1::MTF), Features::MTF);
        have(host_xcr0 & 3 == 3, Features::XSAVE);
        have(
            ecx & (1 << 15) != 0 || edx & (1 << 21) != 0,
            Features::DEBUGCTL,
        );

        let [max_leaf, ..] = cpu.cpuid(0, 0);
        let (mut ebx7, mut edx7) = (0, 0);
        if max_leaf >= 7 {
            [_, ebx7, _, edx7] = cpu.cpuid(7, 0);
        }
        let arch = if edx7 & crate::mitigation::CPUID7_EDX_ARCH_CAPABILITIES != 0 {
            cpu.rdmsr(msr::ARCH_CAPABILITIES)
        } else {
            0
        };
        Ok(Capabilities {
            revision: basic as u32 & 0x7fff_ffff,
            pin: pin_c,
            proc1: proc_c,
            proc2: proc2_c,
            exit: exit_c,
            entry: entry_c,
            cr0_fixed0: cpu.rdmsr(msr::VMX_CR0_FIXED0),
            cr0_fixed1: cpu.rdmsr(msr::VMX_CR0_FIXED1),
            cr4_fixed0: cpu.rdmsr(msr::VMX_CR4_FIXED0),
            cr4_fixed1: cpu.rdmsr(msr::VMX_CR4_FIXED1),
            features,
            preemption_rate: (misc & 31) as u8,
            mitigations: Mitigations::new(edx7, arch, ebx7 & (1 << 11) != 0, signature),
            xcr0: if host_xcr0 & 3 == 3 {
                host_xcr0 & GUEST_XCR0
            } else {
                0
            },
        })
    }

    /// The EPT page sizes and bits that [`crate::ept::Ept`] may use.
    pub fn ept_options(&self) -> crate::ept::Options {
        crate::ept::Options {
            pages_2m: self.features.contains(Features::EPT_2M),
            pages_1g: self.features.contains(Features::EPT_1G),
            accessed_dirty: self.features.contains(Features::EPT_AD),
        }
    }

    /// What guests can be offered.
    pub fn offer(&self) -> crate::backend::Offer {
        let f = self.features;
        crate::backend::Offer {
            invpcid: f.contains(Features::INVPCID),
            pcid: f.contains(Features::VPID),
            rdtscp: f.contains(Features::RDTSCP),
            xcr0: if f.contains(Features::XSAVE) {
                self.xcr0
            } else {
                0
            },
            xsaves: f.contains(Features::XSAVES),
        }
    }
}

#[cfg(test)]
#[path = "caps_tests.rs"]
mod tests;
