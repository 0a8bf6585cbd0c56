//! What ended the guest's run (SDM Vol. 3C chapter 27 and appendix C).

use super::apicv::ApicVirt;
use super::caps::Features;
use super::fields::{interruptibility, intr_info, reason, vmcs};
use super::inject;
use super::instr::{self, vmread, vmwrite};
use super::vcpu::Vcpu;
use vmm_core::cpu::{Access, CrAccess, DrAccess, Exit, Gpr, IoExit, IoString, Seg};
use vmm_core::host::{Gpa, Host};

/// The fields that every exit reads.
pub(super) mod raw {
    use super::{vmcs, vmread};

    pub(crate) struct Raw {
        pub reason: u32,
        pub rip: u64,
        pub idt_vectoring: u32,
    }

    #[inline(always)]
    pub(crate) fn read() -> Raw {
        // SAFETY: an exit has just left its VMCS current.
        unsafe {
            Raw {
                reason: vmread(vmcs::EXIT_REASON) as u32,
                rip: vmread(vmcs::GUEST_RIP),
                idt_vectoring: vmread(vmcs::IDT_VECTORING_INFO) as u32,
            }
        }
    }
}

/// Exit qualification of a control-register access (table 27-3).
pub(super) fn cr_access(q: u64) -> CrAccess {
    let cr = (q & 15) as u8;
    let gpr = Gpr::from_encoding((q >> 8) as u8);
    match (q >> 4) & 3 {
        0 => CrAccess::Write { cr, src: gpr },
        1 => CrAccess::Read { cr, dst: gpr },
        2 => CrAccess::Clts,
        _ => CrAccess::Lmsw((q >> 16) as u16),
    }
}

/// Exit qualification of a MOV DR (table 27-4).
pub(super) fn dr_access(q: u64) -> DrAccess {
    DrAccess {
        dr: (q & 7) as u8,
        read: q & 0x10 != 0,
        gpr: Gpr::from_encoding((q >> 8) as u8),
    }
}

/// Exit qualification of an I/O instruction (table 27-5).
#[inline(always)]
pub(super) fn io_exit(q: u64, string_info: impl Fn(bool) -> Option<IoString>) -> IoExit {
    let io = IoExit::from_qualification(q);
    if !io.string() {
        return io;
    }
    io.string_of(io.rep(), string_info(io.input()))
}

/// Instruction-information field of INS and OUTS (table 27-8).
pub(super) fn io_string(info: u32, input: bool) -> IoString {
    let addr_size = match (info >> 7) & 7 {
        0 => 2,
        1 => 4,
        _ => 8,
    };
    let seg = match (info >> 15) & 7 {
        _ if input => Seg::Es,
        0 => Seg::Es,
        1 => Seg::Cs,
        2 => Seg::Ss,
        4 => Seg::Fs,
        5 => Seg::Gs,
        _ => Seg::Ds,
    };
    IoString { addr_size, seg }
}

/// Exit qualification of an EPT violation (table 27-7).
pub(super) fn nested_fault(q: u64, gpa: Gpa, gla: impl Fn() -> u64) -> Exit {
    let gla_valid = q & 0x80 != 0;
    Exit::NestedFault {
        gpa,
        gla: gla_valid.then(gla),
        access: Access::from_bits_truncate((q & 7) as u8),
        during_walk: gla_valid && q & 0x100 == 0,
    }
}

/// Exit qualification of an APIC access (table 27-6).
pub(super) fn apic_access(q: u64) -> Exit {
    let access = match (q >> 12) & 15 {
        1 | 3 => Access::WRITE,
        2 => Access::EXEC,
        _ => Access::READ,
    };
    Exit::ApicAccess {
        offset: (q & 0xfff) as u16,
        access,
    }
}

const QUALIFICATION_NMI_UNBLOCKING: u64 = 1 << 12;

impl<H: Host> Vcpu<H> {
    /// The interrupt that the last exit has acknowledged, after one by an external
    /// interrupt (SDM Vol. 3C §27.2.2).
    pub fn acknowledged(&self) -> Option<u8> {
        if !self.apic_virt.contains(ApicVirt::POSTED) {
            return None;
        }
        let info = self.vmread(vmcs::EXIT_INTERRUPTION_INFO) as u32;
        (info & intr_info::VALID != 0).then_some(info as u8)
    }

    fn read_inst_len(&mut self) {
        self.inst_len = self.vmread(vmcs::EXIT_INST_LEN) as u8;
    }

    fn qualification(&self) -> u64 {
        self.vmread(vmcs::EXIT_QUALIFICATION)
    }

    /// An instruction exit without further information.
    #[inline(always)]
    fn instruction(&mut self, exit: Exit) -> Exit {
        self.read_inst_len();
        exit
    }

    #[inline(always)]
    pub(super) fn decode_exit(&mut self, why: u32) -> Exit {
        // The commonest first, ahead of the jump table.
        if why == reason::CPUID {
            return self.instruction(Exit::Cpuid);
        }
        self.inst_len = 0;
        match why {
            reason::EXTERNAL_INTERRUPT => Exit::HostInterrupt,
            reason::IO => {
                self.read_inst_len();
                let described = self.backend.caps.features.contains(Features::INS_OUTS_INFO);
                Exit::Io(io_exit(self.qualification(), |input| {
                    described.then(|| io_string(self.vmread(vmcs::EXIT_INST_INFO) as u32, input))
                }))
            }
            reason::EPT_VIOLATION => {
                let q = self.qualification();
                self.nmi_unblocking(q & QUALIFICATION_NMI_UNBLOCKING != 0);
                nested_fault(q, self.vmread(vmcs::GUEST_PHYSICAL_ADDRESS), || {
                    self.vmread(vmcs::GUEST_LINEAR_ADDRESS)
                })
            }
            reason::RDMSR => self.instruction(Exit::Rdmsr),
            reason::WRMSR => self.instruction(Exit::Wrmsr),
            reason::HLT => self.instruction(Exit::Hlt),
            reason::INTERRUPT_WINDOW => Exit::InterruptWindow,
            reason::PREEMPTION_TIMER => Exit::PreemptionTimer,
            reason::CR_ACCESS => {
                self.read_inst_len();
                Exit::Cr(cr_access(self.qualification()))
            }
            reason::APIC_ACCESS => {
                let exit = apic_access(self.qualification());
                self.nmi_unblocking(false);
                exit
            }
            reason::APIC_WRITE => Exit::ApicWrite {
                offset: (self.qualification() & 0xfff) as u16,
            },
            reason::VIRTUALIZED_EOI => Exit::VirtualEoi {
                vector: self.qualification() as u8,
            },
            reason::PAUSE => self.instruction(Exit::Pause),
            reason::TPR_BELOW_THRESHOLD => Exit::TprBelowThreshold,
            reason::EXCEPTION_OR_NMI => self.exception(),
            _ => self.decode_rare(why),
        }
    }

    /// If the guest was leaving an NMI handler (IRET) when something else
    /// ended its run, NMIs are blocked still (SDM Vol. 3C §27.2.3).
    fn nmi_unblocking(&mut self, unblocked: bool) {
        if unblocked && self.idt_vectoring & intr_info::VALID == 0 {
            let old = self.vmread(vmcs::GUEST_INTERRUPTIBILITY);
            // SAFETY: our VMCS is current; the bit is defined.
            unsafe { vmwrite(vmcs::GUEST_INTERRUPTIBILITY, old | interruptibility::NMI) };
        }
    }

    #[cold]
    fn exception(&mut self) -> Exit {
        let info = self.vmread(vmcs::EXIT_INTERRUPTION_INFO) as u32;
        let kind = info & intr_info::TYPE;
        if kind == intr_info::TYPE_NMI {
            // SAFETY: CPL 0 with interrupts off, in the host.
            unsafe { instr::host_nmi() };
            return Exit::HostNmi;
        }
        if kind == intr_info::TYPE_HARDWARE_EXCEPTION && info & intr_info::VECTOR == 18 {
            // SAFETY: as above.
            unsafe { instr::host_machine_check() };
            return Exit::HostNmi;
        }
        self.nmi_unblocking(info & intr_info::NMI_UNBLOCKING != 0 && info & intr_info::VECTOR != 8);
        let qualification = self.qualification();
        let event = inject::decode(
            info,
            || self.vmread(vmcs::EXIT_INTERRUPTION_ERROR) as u32,
            || self.vmread(vmcs::EXIT_INST_LEN) as u8,
        );
        match event {
            Some(event) => {
                self.inst_len = event.inst_len;
                Exit::Exception {
                    event,
                    qualification,
                }
            }
            None => Exit::Unhandled {
                reason: reason::EXCEPTION_OR_NMI,
                qualification,
            },
        }
    }

    #[cold]
    #[cfg_attr(target_os = "none", optimize(size))]
    fn decode_rare(&mut self, why: u32) -> Exit {
        if why & reason::ENTRY_FAILURE != 0 {
            let basic = why & 0xffff;
            if basic == reason::MACHINE_CHECK_ENTRY {
                // SAFETY: CPL 0 with interrupts off, in the host.
                unsafe { instr::host_machine_check() };
                return Exit::HostNmi;
            }
            return Exit::InvalidGuestState {
                reason: basic,
                qualification: self.qualification(),
            };
        }
        match why {
            reason::TRIPLE_FAULT => Exit::TripleFault,
            reason::INIT | reason::SIPI => Exit::InitSignal,
            reason::NMI_WINDOW => Exit::NmiWindow,
            reason::TASK_SWITCH => {
                self.read_inst_len();
                let q = self.qualification();
                Exit::TaskSwitch {
                    selector: q as u16,
                    reason: ((q >> 30) & 3) as u8,
                }
            }
            reason::DR_ACCESS => {
                self.read_inst_len();
                Exit::Dr(dr_access(self.qualification()))
            }
            reason::INVD | reason::WBINVD => self.instruction(Exit::CacheControl),
            reason::RDPMC => self.instruction(Exit::Rdpmc),
            reason::MWAIT => self.instruction(Exit::Mwait),
            reason::MONITOR => self.instruction(Exit::Monitor),
            reason::XSETBV => self.instruction(Exit::Xsetbv),
            reason::MTF => Exit::Mtf,
            reason::PML_FULL => Exit::PmlFull,
            reason::VMCALL => self.instruction(Exit::Hypercall),
            reason::GETSEC
            | reason::VMCLEAR..=reason::VMXON
            | reason::INVEPT
            | reason::INVVPID
            | reason::VMFUNC
            | reason::ENCLS => self.instruction(Exit::VirtualizationInstruction),
            _ => {
                self.read_inst_len();
                Exit::Unhandled {
                    reason: why,
                    qualification: self.qualification(),
                }
            }
        }
    }

    /// Raw reason of the last exit (bit 31: the entry failed).
    pub fn exit_reason(&self) -> u32 {
        self.exit_reason
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_register_accesses() {
        assert_eq!(
            cr_access(0x0300),
            CrAccess::Write {
                cr: 0,
                src: Gpr::Rbx
            }
        );
        assert_eq!(
            cr_access(0x0f14),
            CrAccess::Read {
                cr: 4,
                dst: Gpr::R15
            }
        );
        assert_eq!(cr_access(0x20), CrAccess::Clts);
        assert_eq!(cr_access(0x1234_0030), CrAccess::Lmsw(0x1234));
        assert_eq!(
            dr_access(0x0117),
            DrAccess {
                dr: 7,
                read: true,
                gpr: Gpr::Rcx
            }
        );
    }

    #[test]
    fn io_instructions() {
        let none = |_| None;
        let out = io_exit(0x03f8_0000, none);
        assert_eq!(
            (out.port(), out.size(), out.input(), out.string(), out.rep()),
            (0x3f8, 1, false, false, false)
        );
        let ins = io_exit(0x01f0_0039, |input| Some(io_string(0x100, input)));
        assert_eq!(
            (ins.port(), ins.size(), ins.input(), ins.string(), ins.rep()),
            (0x1f0, 2, true, true, true)
        );
        assert_eq!(
            ins.string_info,
            Some(IoString {
                addr_size: 8,
                seg: Seg::Es
            })
        );
        assert_eq!(
            io_string(4 << 15 | 1 << 7, false),
            IoString {
                addr_size: 4,
                seg: Seg::Fs
            }
        );
        assert_eq!(io_exit(0x0cfc_000b, none).size(), 4);
    }

    #[test]
    fn nested_faults_tell_walk_from_access() {
        let walk = nested_fault(0x81, 0x1000, || 0xffff_8000_0000_0000);
        assert_eq!(
            walk,
            Exit::NestedFault {
                gpa: 0x1000,
                gla: Some(0xffff_8000_0000_0000),
                access: Access::READ,
                during_walk: true
            }
        );
        let write = nested_fault(0x182, 0xfee0_0000, || 1);
        assert!(matches!(
            write,
            Exit::NestedFault {
                access: Access::WRITE,
                during_walk: false,
                ..
            }
        ));
        let pdpte = nested_fault(1, 0x1000, || 1);
        assert!(matches!(
            pdpte,
            Exit::NestedFault {
                gla: None,
                during_walk: false,
                ..
            }
        ));
    }

    #[test]
    fn apic_accesses() {
        assert_eq!(
            apic_access(0x1300),
            Exit::ApicAccess {
                offset: 0x300,
                access: Access::WRITE
            }
        );
        assert_eq!(
            apic_access(0x0080),
            Exit::ApicAccess {
                offset: 0x80,
                access: Access::READ
            }
        );
        assert_eq!(
            apic_access(0x2000),
            Exit::ApicAccess {
                offset: 0,
                access: Access::EXEC
            }
        );
    }
}
