//! The virtual CPU as exit handlers see it: registers, events and exits, the
//! same for VT-x and AMD-V.

use bitflags::bitflags;

/// General-purpose registers in the order in which instructions encode them
/// (SDM Vol. 2 §3.1.1.1, table 3-1); `gprs[reg as usize]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Gpr {
    Rax = 0,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Gpr {
    /// The register with the given encoding (REX bit included); the upper
    /// bits of `n` are ignored.
    pub const fn from_encoding(n: u8) -> Self {
        const ALL: [Gpr; 16] = [
            Gpr::Rax,
            Gpr::Rcx,
            Gpr::Rdx,
            Gpr::Rbx,
            Gpr::Rsp,
            Gpr::Rbp,
            Gpr::Rsi,
            Gpr::Rdi,
            Gpr::R8,
            Gpr::R9,
            Gpr::R10,
            Gpr::R11,
            Gpr::R12,
            Gpr::R13,
            Gpr::R14,
            Gpr::R15,
        ];
        #[allow(clippy::indexing_slicing)] // masked to the array's length
        ALL[(n & 15) as usize]
    }
}

/// Segment registers in the order in which instructions encode them, and the
/// two system segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Seg {
    Es = 0,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
    Ldtr,
    Tr,
}

/// Base, limit and access rights of a segment, the latter as VMX encodes them
/// (SDM Vol. 3C §24.4.1, table 24-2; bit 16 = unusable).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegDesc {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights, VMX encoding.
    pub access: u32,
}

impl SegDesc {
    /// Code segment "L" bit: 64-bit mode when EFER.LMA is set.
    pub const fn long(&self) -> bool {
        self.access & (1 << 13) != 0
    }
    /// "D/B" bit: 32-bit default operand and address size.
    pub const fn default32(&self) -> bool {
        self.access & (1 << 14) != 0
    }
    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ((self.access >> 5) & 3) as u8
    }
    /// Bit 16: the segment is unusable.
    pub const fn unusable(&self) -> bool {
        self.access & (1 << 16) != 0
    }
}

/// Control and other registers that are not general-purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Reg {
    Rip,
    Rflags,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Efer,
    Dr0,
    Dr1,
    Dr2,
    Dr3,
    Dr6,
    Dr7,
    Pdpte0,
    Pdpte1,
    Pdpte2,
    Pdpte3,
    GdtrBase,
    GdtrLimit,
    IdtrBase,
    IdtrLimit,
}

/// Kinds of events that are delivered through the IDT, numbered as in the
/// VM-entry interruption-information field (SDM Vol. 3C §24.8.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    /// External interrupt.
    External = 0,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// Hardware exception.
    Exception = 3,
    /// `INT n`.
    SoftwareInterrupt = 4,
    /// `INT1`.
    PrivilegedSoftwareException = 5,
    /// `INT3`, `INTO`.
    SoftwareException = 6,
}

/// An event to deliver through the guest's IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What kind of event it is.
    pub kind: EventKind,
    /// IDT vector.
    pub vector: u8,
    /// Error code, where the exception pushes one.
    pub error_code: Option<u32>,
    /// Instruction length in bytes, used by software events only.
    pub inst_len: u8,
}

/// Whether an exception pushes an error code outside real mode (SDM Vol. 3A
/// table 6-1, but for #CP, which no guest here can have).
pub const fn pushes_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

impl Event {
    /// A hardware exception that pushes no error code.
    pub const fn exception(vector: u8) -> Self {
        Event {
            kind: EventKind::Exception,
            vector,
            error_code: None,
            inst_len: 0,
        }
    }
    /// A hardware exception that pushes an error code.
    pub const fn exception_with(vector: u8, error_code: u32) -> Self {
        Event {
            kind: EventKind::Exception,
            vector,
            error_code: Some(error_code),
            inst_len: 0,
        }
    }
    /// #UD.
    pub const UD: Event = Event::exception(6);
    /// #GP(0).
    pub const GP0: Event = Event::exception_with(13, 0);

    /// Whether this is a fault: RFLAGS.RF is set in the image of RFLAGS that
    /// its delivery pushes (SDM Vol. 3B §17.3.1.1). #DB, which can be either,
    /// and the traps #BP and #OF and the aborts are not.
    pub const fn is_fault(&self) -> bool {
        matches!(self.kind, EventKind::Exception) && !matches!(self.vector, 1..=4 | 8 | 18)
    }
}

bitflags! {
    /// What an access to guest-physical memory tried to do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Access: u8 {
        /// Data read.
        const READ = 1;
        /// Data write.
        const WRITE = 2;
        /// Instruction fetch.
        const EXEC = 4;
    }
}

/// An IN, OUT, INS or OUTS that left the guest.
///
/// What most exits are: so it stays in the word in which VT-x tells it
/// (SDM Vol. 3C table 27-5) until somebody asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoExit {
    word: u32,
    /// For INS and OUTS, what the CPU itself says of them; `None` where it
    /// says nothing and the instruction must be decoded.
    pub string_info: Option<IoString>,
}

impl IoExit {
    const INPUT: u32 = 1 << 3;
    const STRING: u32 = 1 << 4;
    const REP: u32 = 1 << 5;

    /// IN or OUT of 1, 2 or 4 bytes.
    #[inline(always)]
    pub const fn new(port: u16, size: u8, input: bool) -> IoExit {
        let input = if input { Self::INPUT } else { 0 };
        IoExit {
            word: ((port as u32) << 16) | input | (size as u32 - 1),
            string_info: None,
        }
    }

    /// From an exit qualification of VT-x.
    #[inline(always)]
    pub const fn from_qualification(q: u64) -> IoExit {
        IoExit {
            word: q as u32 & 0xffff_003f,
            string_info: None,
        }
    }

    /// Made an INS or OUTS.
    pub const fn string_of(self, rep: bool, info: Option<IoString>) -> IoExit {
        let rep = if rep { Self::REP } else { 0 };
        IoExit {
            word: self.word & !Self::REP | Self::STRING | rep,
            string_info: info,
        }
    }

    /// Bits 31 to 16: port. 5: REP. 4: string. 3: input. 2 to 0: size less 1.
    #[inline(always)]
    pub const fn word(&self) -> u32 {
        self.word
    }

    /// Port number.
    #[inline(always)]
    pub const fn port(&self) -> u16 {
        (self.word >> 16) as u16
    }

    /// Operand size: 1, 2 or 4 bytes.
    #[inline(always)]
    pub const fn size(&self) -> u8 {
        (self.word & 7) as u8 + 1
    }

    /// True for IN and INS.
    #[inline(always)]
    pub const fn input(&self) -> bool {
        self.word & Self::INPUT != 0
    }

    /// True for INS and OUTS.
    #[inline(always)]
    pub const fn string(&self) -> bool {
        self.word & Self::STRING != 0
    }

    /// True with a REP prefix.
    #[inline(always)]
    pub const fn rep(&self) -> bool {
        self.word & Self::REP != 0
    }
}

/// Address size and segment of INS or OUTS (SDM Vol. 3C §27.2.5,
/// VM-exit instruction-information field).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoString {
    /// Address size in bytes: 2, 4 or 8.
    pub addr_size: u8,
    /// Segment of the memory operand (ES for INS).
    pub seg: Seg,
}

/// An access to a control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrAccess {
    /// MOV to CRn.
    Write {
        /// 0, 3, 4 or 8.
        cr: u8,
        /// Source register.
        src: Gpr,
    },
    /// MOV from CRn.
    Read {
        /// 0, 3, 4 or 8.
        cr: u8,
        /// Destination register.
        dst: Gpr,
    },
    /// CLTS.
    Clts,
    /// LMSW with its 16-bit operand.
    Lmsw(u16),
}

/// An access to a debug register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrAccess {
    /// 0 to 7.
    pub dr: u8,
    /// True for MOV from DRn.
    pub read: bool,
    /// The general-purpose operand.
    pub gpr: Gpr,
}

/// Why the guest was left. Payloads are what the CPU reported; where it gives
/// no instruction length (`inst_len` of the backend is then 0) the decoder
/// finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// CPUID.
    Cpuid,
    /// RDMSR; ECX has the number.
    Rdmsr,
    /// WRMSR; ECX has the number.
    Wrmsr,
    /// Port I/O.
    Io(IoExit),
    /// A guest-physical access that the nested page tables do not allow.
    NestedFault {
        /// Guest-physical address.
        gpa: u64,
        /// Guest-linear address, where the CPU reports it.
        gla: Option<u64>,
        /// What was tried.
        access: Access,
        /// True if the fault came from the guest's own page-table walk
        /// rather than from the final access.
        during_walk: bool,
    },
    /// An access to the APIC-access page that needs emulation; page offset
    /// (APIC-access exit, SDM Vol. 3C §29.4).
    ApicAccess {
        /// Offset within the page.
        offset: u16,
        /// What was tried.
        access: Access,
    },
    /// A write to the virtual-APIC page that has been done and whose effect
    /// is due (APIC-write exit, SDM Vol. 3C §29.4.3.3).
    ApicWrite {
        /// Offset within the page.
        offset: u16,
    },
    /// An IPI that the CPU has put into the register pages of all targets, of
    /// which one does not run and is to be woken (AVIC incomplete IPI,
    /// APM Vol. 2 §15.29.9.1).
    IpiToWaiting,
    /// EOI of a vector in the EOI-exit bitmap.
    VirtualEoi {
        /// The vector that ended.
        vector: u8,
    },
    /// TPR fell below the threshold.
    TprBelowThreshold,
    /// MOV CR, CLTS, LMSW.
    Cr(CrAccess),
    /// MOV DR.
    Dr(DrAccess),
    /// HLT.
    Hlt,
    /// PAUSE (or a PAUSE loop).
    Pause,
    /// MONITOR.
    Monitor,
    /// MWAIT.
    Mwait,
    /// XSETBV; ECX, EDX:EAX.
    Xsetbv,
    /// INVD or WBINVD: nothing to do with coherent memory.
    CacheControl,
    /// VMCALL on Intel's CPUs, VMMCALL on AMD's.
    Hypercall,
    /// Another virtualization instruction, GETSEC, ENCLS and the like: #UD.
    VirtualizationInstruction,
    /// RDPMC.
    Rdpmc,
    /// The guest can take an interrupt now.
    InterruptWindow,
    /// The guest can take an NMI now.
    NmiWindow,
    /// A host interrupt is pending or was taken.
    HostInterrupt,
    /// A host NMI arrived.
    HostNmi,
    /// The preemption timer ran out.
    PreemptionTimer,
    /// An intercepted exception.
    Exception {
        /// What happened.
        event: Event,
        /// The CPU's exit qualification (linear address for #PF, DR6 bits
        /// for #DB).
        qualification: u64,
    },
    /// Triple fault.
    TripleFault,
    /// A task switch through a gate, CALL, JMP or IRET.
    TaskSwitch {
        /// New TSS selector.
        selector: u16,
        /// 0 CALL, 1 IRET, 2 JMP, 3 task gate.
        reason: u8,
    },
    /// Monitor trap flag: one instruction was executed.
    Mtf,
    /// INIT or SIPI reached the CPU while in the guest.
    InitSignal,
    /// Page-modification log full.
    PmlFull,
    /// VM entry failed because of the guest's state (reason bit 31).
    InvalidGuestState {
        /// Raw basic exit reason.
        reason: u32,
        /// Raw qualification.
        qualification: u64,
    },
    /// VMLAUNCH or VMRESUME itself failed.
    EntryFailed {
        /// VM-instruction error (SDM Vol. 3C §30.4).
        error: u32,
    },
    /// Anything else.
    Unhandled {
        /// Raw exit reason.
        reason: u32,
        /// Raw qualification.
        qualification: u64,
    },
}

/// The registers and pending state of one vCPU, as exit handlers use them.
///
/// Implemented by the VT-x and AMD-V backends (static dispatch) and by a plain
/// structure in tests. Reads of anything but `gpr` may cost a VMREAD.
pub trait CpuState {
    /// A general-purpose register.
    fn gpr(&self, r: Gpr) -> u64;
    /// Sets a general-purpose register (all 64 bits).
    fn set_gpr(&mut self, r: Gpr, v: u64);
    /// Any other register.
    fn reg(&self, r: Reg) -> u64;
    /// Sets any other register; the backend keeps CR0/CR4/EFER consistent
    /// with what the CPU requires and with its shadows.
    fn set_reg(&mut self, r: Reg, v: u64);
    /// Descriptor cache of a segment.
    fn seg(&self, s: Seg) -> SegDesc;
    /// Sets the descriptor cache of a segment.
    fn set_seg(&mut self, s: Seg, d: SegDesc);
    /// Selector of a segment.
    fn selector(&self, s: Seg) -> u16;
    /// Sets the selector of a segment.
    fn set_selector(&mut self, s: Seg, v: u16);
    /// Length in bytes of the instruction that caused the exit; 0 if the CPU
    /// does not say.
    fn inst_len(&self) -> u8;
    /// Whether STI or MOV SS still blocks interrupts.
    fn interrupt_shadow(&self) -> bool;
    /// Sets or ends blocking by STI or MOV SS.
    fn set_interrupt_shadow(&mut self, on: bool);
    /// Whether NMIs are blocked (an NMI handler runs).
    fn nmi_blocked(&self) -> bool;

    /// Moves RIP behind the instruction and ends the interrupt shadow.
    fn advance(&mut self, len: u8) {
        let rip = self.reg(Reg::Rip).wrapping_add(u64::from(len));
        let rip = if self.long_mode_code() {
            rip
        } else {
            rip & 0xffff_ffff
        };
        self.set_reg(Reg::Rip, rip);
        self.set_interrupt_shadow(false);
    }

    /// True when the vCPU executes 64-bit code.
    fn long_mode_code(&self) -> bool {
        self.reg(Reg::Efer) & EFER_LMA != 0 && self.seg(Seg::Cs).long()
    }

    /// Current privilege level: the DPL of SS (SDM Vol. 3C §24.4.1).
    fn cpl(&self) -> u8 {
        self.seg(Seg::Ss).dpl()
    }
}

/// EFER.LMA (SDM Vol. 3A §2.2.1).
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.LME.
pub const EFER_LME: u64 = 1 << 8;
/// CR0.PE.
pub const CR0_PE: u64 = 1;
/// CR0.PG.
pub const CR0_PG: u64 = 1 << 31;
/// CR0.WP.
pub const CR0_WP: u64 = 1 << 16;
/// CR4.PAE.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.PSE.
pub const CR4_PSE: u64 = 1 << 4;
/// RFLAGS.IF.
pub const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS.RF
pub const RFLAGS_RF: u64 = 1 << 16;

#[cfg(test)]
mod tests {
    use super::{Event, EventKind};

    #[test]
    fn faults_push_the_resume_flag() {
        for vector in [0, 5, 6, 7, 10, 11, 12, 13, 14, 16, 17, 19] {
            assert!(Event::exception(vector).is_fault(), "{vector}");
        }
        for vector in [1, 2, 3, 4, 8, 18] {
            assert!(!Event::exception(vector).is_fault(), "{vector}");
        }
        let interrupt = Event {
            kind: EventKind::External,
            ..Event::GP0
        };
        assert!(!interrupt.is_fault());
    }
}
