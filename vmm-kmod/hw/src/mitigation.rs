//! What a CPU's speculative-execution weaknesses ask of a hypervisor.
//!
//! Intel, "Deep Dive: L1 Terminal Fault", "Microarchitectural Data Sampling",
//! "Indirect Branch Predictor Barrier"; SDM Vol. 4, IA32_ARCH_CAPABILITIES.

/// Assembly: 32 CALLs, as many as any return-stack buffer holds, each with a trap for
/// speculation behind it. They leave 32 * 8 bytes on the stack.
///
/// Linux' objtool, which completes the modules of kernels that check indirect branches,
/// takes no CALL into the middle of a function that it has not been told of: before Linux
/// 6.14 in the first of these sections, from then on in the second. Neither is loaded.
macro_rules! fill_rsb {
    () => {
        ".rept 32
         7: call 8f
         int3
         8:
         .pushsection .discard.intra_function_calls
         .long 7b
         .popsection
         .pushsection .discard.annotate_insn, \"M\", @progbits, 8
         .long 7b - ., 7
         .popsection
         .endr"
    };
}
pub(crate) use fill_rsb;

/// Assembly: RET. In a module for kernels whose own returns are jumps to a thunk, which does
/// what the CPU needs (Retbleed, SRSO, ITS), one such; the kernel puts a RET there at load
/// where it needs nothing. Straight-line speculation ends at the INT3 behind.
#[cfg(thunks)]
macro_rules! ret {
    () => {
        "jmp __x86_return_thunk
         int3"
    };
}
#[cfg(not(thunks))]
macro_rules! ret {
    () => {
        "ret"
    };
}
pub(crate) use ret;

/// Assembly: what objtool is to know of a function in which the CPU arrives by itself, its
/// frame made by another: no CALL leads there, nor an indirect branch that wants an ENDBR.
/// Its name is the operand `this`. None of these sections is loaded; as in [`fill_rsb`]
/// the second is for Linux before 6.14, the third from then on.
#[cfg(thunks)]
macro_rules! arrival {
    () => {
        "7:
         .pushsection .discard.func_stack_frame_non_standard
         .quad {this}
         .popsection
         .pushsection .discard.noendbr
         .long 7b
         .popsection
         .pushsection .discard.annotate_insn, \"M\", @progbits, 8
         .long 7b - ., 1
         .popsection"
    };
}
#[cfg(not(thunks))]
macro_rules! arrival {
    () => {
        "/* {this} */"
    };
}
pub(crate) use arrival;

/// CPUID.07H.0:EDX bit 10: VERW overwrites the buffers that MDS leaks.
pub const CPUID7_EDX_MD_CLEAR: u32 = 1 << 10;
/// CPUID.07H.0:EDX bit 26: IBRS and IBPB (SPEC_CTRL and PRED_CMD exist).
pub const CPUID7_EDX_IBRS_IBPB: u32 = 1 << 26;
/// CPUID.07H.0:EDX bit 28: IA32_FLUSH_CMD exists.
pub const CPUID7_EDX_L1D_FLUSH: u32 = 1 << 28;
/// CPUID.07H.0:EDX bit 29: IA32_ARCH_CAPABILITIES exists.
pub const CPUID7_EDX_ARCH_CAPABILITIES: u32 = 1 << 29;

/// ARCH_CAPABILITIES bit 0: not susceptible to Rogue Data Cache Load (and so
/// not to L1TF).
pub const ARCH_CAP_RDCL_NO: u64 = 1 << 0;
/// ARCH_CAPABILITIES bit 3: an outer hypervisor flushes the L1D.
pub const ARCH_CAP_SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
/// ARCH_CAPABILITIES bit 5: not susceptible to MDS.
pub const ARCH_CAP_MDS_NO: u64 = 1 << 5;
/// ARCH_CAPABILITIES bit 6: page-size change machine check does not happen.
pub const ARCH_CAP_IF_PSCHANGE_MC_NO: u64 = 1 << 6;
/// ARCH_CAPABILITIES bit 8: not susceptible to TAA.
pub const ARCH_CAP_TAA_NO: u64 = 1 << 8;

/// What to do, decided once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mitigations {
    /// Flush the L1 data cache (IA32_FLUSH_CMD) on an entry that follows a
    /// return from userland or a switch of VM (L1TF).
    pub flush_l1d: bool,
    /// The CPU is open to L1TF, and it offers no flush: a microcode update
    /// is missing. Worth a line in the log.
    pub l1tf_without_flush: bool,
    /// VERW before every entry (MDS, TAA).
    pub verw: bool,
    /// The CPU is open to MDS but its microcode lacks MD_CLEAR.
    pub mds_without_clear: bool,
    /// IA32_PRED_CMD.IBPB exists: barrier when another VM ran here last.
    pub ibpb: bool,
    /// IA32_SPEC_CTRL exists.
    pub spec_ctrl: bool,
    /// Executable 2 MiB and 1 GiB EPT pages can bring the CPU down
    /// (CVE-2018-12207): a malicious guest can crash the host.
    pub itlb_multihit: bool,
}

impl Mitigations {
    /// Decides from CPUID.07H.0:EDX and IA32_ARCH_CAPABILITIES (0 where the
    /// MSR does not exist). `rtm` says whether the CPU has TSX; `signature` is
    /// CPUID.01H:EAX.
    pub const fn new(cpuid7_edx: u32, arch_capabilities: u64, rtm: bool, signature: u32) -> Self {
        let arch = if cpuid7_edx & CPUID7_EDX_ARCH_CAPABILITIES != 0 {
            arch_capabilities
        } else {
            0
        };
        let l1tf = arch & ARCH_CAP_RDCL_NO == 0;
        let skip = arch & ARCH_CAP_SKIP_L1DFL_VMENTRY != 0;
        let can_flush = cpuid7_edx & CPUID7_EDX_L1D_FLUSH != 0;
        let mds = arch & ARCH_CAP_MDS_NO == 0 || (rtm && arch & ARCH_CAP_TAA_NO == 0);
        let can_clear = cpuid7_edx & CPUID7_EDX_MD_CLEAR != 0;
        let spec = cpuid7_edx & CPUID7_EDX_IBRS_IBPB != 0;
        Mitigations {
            flush_l1d: l1tf && !skip && can_flush,
            l1tf_without_flush: l1tf && !skip && !can_flush,
            verw: mds && can_clear,
            mds_without_clear: mds && !can_clear,
            ibpb: spec,
            spec_ctrl: spec,
            itlb_multihit: arch & ARCH_CAP_IF_PSCHANGE_MC_NO == 0 && !without_multihit(signature),
        }
    }
}

/// Atom and Xeon Phi, which have no iTLB multihit and may have no MSR to say so (Intel,
/// "Deep Dive: Machine Check Error Avoidance on Page Size Change"): family 6, by model.
const fn without_multihit(signature: u32) -> bool {
    let model = signature >> 4 & 15 | signature >> 12 & 0xf0;
    signature >> 8 & 15 == 6
        && matches!(
            model,
            0x1c | 0x26 | 0x27 | 0x35
                ..=0x37
                    | 0x4a
                    | 0x4c
                    | 0x4d
                    | 0x57
                    | 0x5a
                    | 0x5c
                    | 0x5d
                    | 0x5f
                    | 0x6e
                    | 0x75
                    | 0x7a
                    | 0x85
                    | 0x86
        )
}

impl Mitigations {
    /// Decides for an AMD CPU, which knows neither L1TF nor MDS, from CPUID
    /// 8000_0008H:EBX (APM Vol. 3 §E.4.6): IBPB; IBRS, STIBP or SSBD in
    /// SPEC_CTRL.
    pub const fn amd(ext8_ebx: u32) -> Self {
        Mitigations {
            flush_l1d: false,
            l1tf_without_flush: false,
            verw: false,
            mds_without_clear: false,
            ibpb: ext8_ebx & 1 << 12 != 0,
            spec_ctrl: ext8_ebx & (1 << 14 | 1 << 15 | 1 << 24) != 0,
            itlb_multihit: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u32 = CPUID7_EDX_MD_CLEAR
        | CPUID7_EDX_IBRS_IBPB
        | CPUID7_EDX_L1D_FLUSH
        | CPUID7_EDX_ARCH_CAPABILITIES;
    /// Xeon, model 55H.
    const SKYLAKE: u32 = 0x50654;

    #[test]
    fn an_old_cpu_with_new_microcode_pays_for_everything() {
        let m = Mitigations::new(ALL & !CPUID7_EDX_ARCH_CAPABILITIES, u64::MAX, true, SKYLAKE);
        assert!(m.flush_l1d && m.verw && m.ibpb && m.itlb_multihit);
        assert!(!m.l1tf_without_flush && !m.mds_without_clear);
    }

    #[test]
    fn a_cpu_without_any_new_microcode_is_named_but_not_slowed() {
        let m = Mitigations::new(0, 0, false, SKYLAKE);
        assert!(!m.flush_l1d && !m.verw && !m.ibpb && !m.spec_ctrl);
        assert!(m.l1tf_without_flush && m.mds_without_clear);
    }

    #[test]
    fn a_fixed_cpu_pays_nothing_but_ibpb() {
        let arch = ARCH_CAP_RDCL_NO | ARCH_CAP_MDS_NO | ARCH_CAP_IF_PSCHANGE_MC_NO;
        let m = Mitigations::new(ALL, arch, false, SKYLAKE);
        assert_eq!(
            m,
            Mitigations {
                ibpb: true,
                spec_ctrl: true,
                ..Mitigations::default()
            }
        );
        assert!(
            Mitigations::new(ALL, arch, true, SKYLAKE).verw,
            "TAA without TAA_NO needs VERW"
        );
    }

    #[test]
    fn below_another_hypervisor_the_flush_is_its_business() {
        let m = Mitigations::new(ALL, ARCH_CAP_SKIP_L1DFL_VMENTRY, false, SKYLAKE);
        assert!(!m.flush_l1d && !m.l1tf_without_flush);
    }

    #[test]
    fn an_atom_without_the_msr_has_no_multihit() {
        // Goldmont (5CH) and Saltwell (26H); Westmere (2CH) has it.
        for (signature, open) in [(0x506c9, false), (0x20661, false), (0x206c2, true)] {
            assert_eq!(Mitigations::new(0, 0, false, signature).itlb_multihit, open);
        }
    }
}
