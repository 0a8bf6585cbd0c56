//! What ended the guest's run (APM Vol. 2 §15.6 to §15.14, appendix C).

use super::avic;
use super::caps::Features;
use super::vcpu::{NmiState, Vcpu, Wanted};
use super::vmcb::{clean, code, event, misc1, virq};
use crate::backend::Completed;
use crate::instr;
use vmm_core::cpu::{
    Access, CpuState, CrAccess, DrAccess, Event, Exit, Gpr, IoExit, IoString, Seg,
};
use vmm_core::host::{Gpa, Host};
use vmm_core::inst::{self, CodeMode, Inst, Op, Operand, Rep};

const RFLAGS_TF: u64 = 1 << 8;
const DR6_BS: u64 = 1 << 14;

/// EXITINFO1 of an I/O instruction (§15.10.2). `assists`: the CPU tells the
/// segment of OUTS.
pub(super) fn io_exit(info: u64, assists: bool) -> IoExit {
    let input = info & 1 != 0;
    let string = info & 4 != 0;
    let addr_size = match (info >> 7) & 7 {
        1 => 2,
        2 => 4,
        _ => 8,
    };
    let seg = match (info >> 10) & 7 {
        _ if input => Seg::Es,
        0 => Seg::Es,
        1 => Seg::Cs,
        2 => Seg::Ss,
        4 => Seg::Fs,
        5 => Seg::Gs,
        _ => Seg::Ds,
    };
    let size = match (info >> 4) & 7 {
        1 => 1,
        2 => 2,
        _ => 4,
    };
    let io = IoExit::new((info >> 16) as u16, size, input);
    if !string {
        return io;
    }
    io.string_of(
        info & 8 != 0,
        assists.then_some(IoString { addr_size, seg }),
    )
}

/// Length of an instruction without operands or prefixes, which is how nearly
/// all that exit are written; the decoder does the rest.
#[inline(always)]
fn plain_length(exit: Exit, bytes: &[u8]) -> Option<u8> {
    match (exit, bytes) {
        (Exit::Cpuid, [0x0f, 0xa2, ..])
        | (Exit::Rdmsr, [0x0f, 0x32, ..])
        | (Exit::Wrmsr, [0x0f, 0x30, ..])
        | (Exit::Pause, [0xf3, 0x90, ..]) => Some(2),
        (Exit::Hypercall, [0x0f, 0x01, 0xd9, ..]) => Some(3),
        (Exit::Hlt, [0xf4, ..]) => Some(1),
        _ => None,
    }
}

/// EXITINFO1 and 2 of a nested page fault (§15.25.6).
pub(super) fn nested_fault(info: u64, gpa: Gpa) -> Exit {
    let access = if info & 0x10 != 0 {
        Access::EXEC
    } else if info & 2 != 0 {
        Access::WRITE
    } else {
        Access::READ
    };
    Exit::NestedFault {
        gpa,
        gla: None,
        access,
        during_walk: info & (1 << 33) != 0,
    }
}

/// EXITINFO2 of a task switch (§15.14.1); `event`: one was being delivered.
pub(super) fn task_switch(selector: u64, info: u64, event: bool) -> Exit {
    let reason = if info & (1 << 36) != 0 {
        1
    } else if info & (1 << 38) != 0 {
        2
    } else if event {
        3
    } else {
        0
    };
    Exit::TaskSwitch {
        selector: selector as u16,
        reason,
    }
}

impl<H: Host> Vcpu<H> {
    /// An exit that an instruction caused, about which nothing more is to be
    /// known than its length.
    #[inline(always)]
    fn instruction(&mut self, exit: Exit) -> Exit {
        if self.has(Features::NRIP_SAVE) {
            let vmcb = self.vmcb();
            self.inst_len = vmcb.control.next_rip.wrapping_sub(vmcb.state.rip) as u8;
        } else {
            self.wanted = Wanted::Length;
        }
        exit
    }

    /// One whose operands EXITINFO1 has with decode assists.
    fn operands(&mut self, exit: impl FnOnce(Gpr) -> Exit, told: bool) -> Exit {
        let info = self.vmcb().control.exit_info1;
        let exit = self.instruction(exit(Gpr::from_encoding(info as u8)));
        if !self.has(Features::DECODE_ASSISTS) || !told {
            self.wanted = Wanted::Operands;
        }
        exit
    }

    #[inline(always)]
    pub(super) fn decode_exit(&mut self, why: u64) -> Exit {
        // The commonest first, ahead of the jump table.
        if why == code::CPUID {
            return self.instruction(Exit::Cpuid);
        }
        match why {
            code::INTR => Exit::HostInterrupt,
            code::IOIO => self.io(),
            code::NPF => {
                let control = &self.vmcb().control;
                nested_fault(control.exit_info1, control.exit_info2)
            }
            code::MSR => {
                let write = self.vmcb().control.exit_info1 & 1 != 0;
                self.instruction(if write { Exit::Wrmsr } else { Exit::Rdmsr })
            }
            code::HLT => self.instruction(Exit::Hlt),
            code::VINTR => {
                self.set_interrupt_window(false);
                Exit::InterruptWindow
            }
            _ => self.decode_rare(why),
        }
    }

    fn io(&mut self) -> Exit {
        let assists = self.has(Features::DECODE_ASSISTS);
        let vmcb = self.vmcb();
        let exit = io_exit(vmcb.control.exit_info1, assists);
        self.inst_len = vmcb.control.exit_info2.wrapping_sub(vmcb.state.rip) as u8;
        if exit.string() && exit.string_info.is_none() {
            self.wanted = Wanted::Operands;
        }
        Exit::Io(exit)
    }

    #[cold]
    #[cfg_attr(target_os = "none", optimize(size))]
    fn decode_rare(&mut self, why: u64) -> Exit {
        let info1 = self.vmcb().control.exit_info1;
        // Bit 63: a MOV, and not CLTS, LMSW or SMSW (§15.8.1).
        let mov = info1 & (1 << 63) != 0;
        match why {
            code::CR_READ..=code::CR_READ_LAST => {
                let cr = (why - code::CR_READ) as u8;
                self.operands(|dst| Exit::Cr(CrAccess::Read { cr, dst }), mov)
            }
            code::CR_WRITE..=code::CR_WRITE_LAST => {
                let cr = (why - code::CR_WRITE) as u8;
                self.operands(|src| Exit::Cr(CrAccess::Write { cr, src }), mov)
            }
            code::CR0_SELECTIVE => {
                self.operands(|src| Exit::Cr(CrAccess::Write { cr: 0, src }), mov)
            }
            code::DR_READ..=code::DR_READ_LAST => {
                let dr = (why - code::DR_READ) as u8;
                let access = |gpr| {
                    let read = true;
                    Exit::Dr(DrAccess { dr, read, gpr })
                };
                self.operands(access, true)
            }
            code::DR_WRITE..=code::DR_WRITE_LAST => {
                let dr = (why - code::DR_WRITE) as u8;
                let access = |gpr| {
                    let read = false;
                    Exit::Dr(DrAccess { dr, read, gpr })
                };
                self.operands(access, true)
            }
            code::EXCEPTION..=code::EXCEPTION_LAST => {
                self.exception((why - code::EXCEPTION) as u8, info1)
            }
            // The host's own have been taken at STGI.
            code::NMI => Exit::HostNmi,
            // A system-management interrupt likewise; the host's INIT waits.
            code::SMI | code::INIT => Exit::InitSignal,
            code::IRET => self.iret(),
            code::PAUSE => self.instruction(Exit::Pause),
            code::INVD | code::WBINVD => self.instruction(Exit::CacheControl),
            code::XSETBV => self.instruction(Exit::Xsetbv),
            code::RDPMC => Exit::Rdpmc,
            code::MONITOR => Exit::Monitor,
            code::MWAIT | code::MWAIT_ARMED => Exit::Mwait,
            code::VMMCALL => self.instruction(Exit::Hypercall),
            code::RSM
            | code::INVLPGA
            | code::VMRUN..=code::RDTSCP
            | code::RDPRU
            | code::INVPCID => Exit::VirtualizationInstruction,
            code::TASK_SWITCH => {
                let control = &self.vmcb().control;
                let delivering = control.exit_int_info & event::VALID != 0;
                let exit = task_switch(info1, control.exit_info2, delivering);
                self.instruction(exit)
            }
            // The CPU would freeze until a chip that a PC of today does not
            // have tells it to go on (§15.12.16); the guest gets the exception
            // that CR0.NE makes of it.
            code::FERR_FREEZE => Exit::Exception {
                event: Event::exception(16),
                qualification: 0,
            },
            code::SHUTDOWN => Exit::TripleFault,
            code::AVIC_INCOMPLETE_IPI => avic::incomplete_ipi(self.vmcb().control.exit_info2),
            code::AVIC_NOACCEL => avic::not_accelerated(info1),
            code::INVALID => Exit::InvalidGuestState {
                reason: why as u32,
                qualification: info1,
            },
            _ => Exit::Unhandled {
                reason: why as u32,
                qualification: info1,
            },
        }
    }

    fn exception(&mut self, vector: u8, info1: u64) -> Exit {
        if vector == 18 {
            // SAFETY: CPL 0 with interrupts off, in the host.
            unsafe { instr::host_machine_check() };
            return Exit::HostNmi;
        }
        let dr6 = self.vmcb().state.dr6;
        if vector == 1 && self.nmi == NmiState::Stepping && dr6 & DR6_BS != 0 {
            // Behind the IRET. Its own RFLAGS are in force, without our TF.
            self.touch(clean::DRX).state.dr6 = dr6 & !DR6_BS;
            self.nmi = NmiState::Open;
            return Exit::NmiWindow;
        }
        let event = if vmm_core::cpu::pushes_error_code(vector) {
            Event::exception_with(vector, info1 as u32)
        } else {
            Event::exception(vector)
        };
        Exit::Exception {
            event,
            qualification: if vector == 1 { dr6 } else { 0 },
        }
    }

    /// The end of an NMI handler: NMIs may come once IRET is done.
    fn iret(&mut self) -> Exit {
        self.intercept1(misc1::IRET, false);
        self.nmi = NmiState::AtIret(self.vmcb().state.rip);
        Exit::NmiWindow
    }

    /// An NMI waits and the guest is at its IRET: an exit right behind that.
    pub(super) fn step_over_iret(&mut self) {
        self.nmi = NmiState::Stepping;
        self.vmcb_mut().state.rflags |= RFLAGS_TF;
    }

    /// Exit (`InterruptWindow`) as soon as the guest can take an interrupt:
    /// a virtual interrupt is pending, and exits instead of being delivered
    /// (§15.21.4).
    pub fn set_interrupt_window(&mut self, on: bool) {
        let old = self.vmcb().control.virtual_interrupt;
        let pending = virq::PENDING | virq::PRIORITY_HIGHEST | virq::IGNORE_TPR;
        let new = if on { old | pending } else { old & !pending };
        if new != old {
            self.touch(clean::TPR).control.virtual_interrupt = new;
            self.intercept1(misc1::VINTR, on);
        }
    }

    /// Whether [`Vcpu::complete`] is to be called.
    #[inline]
    pub fn wants_instruction(&self) -> bool {
        self.wanted != Wanted::Nothing
    }

    /// Completes the last exit if `plain_length` knows its instruction.
    #[inline(always)]
    #[cfg_attr(target_os = "none", optimize(size))]
    pub fn complete_plain(&mut self, exit: Exit, bytes: &[u8]) -> bool {
        let Some(len) = plain_length(exit, bytes) else {
            return false;
        };
        self.inst_len = len;
        self.wanted = Wanted::Nothing;
        true
    }

    /// Completes the last exit with the instruction that caused it, which
    /// `bytes` start with.
    pub fn complete(&mut self, exit: Exit, bytes: &[u8]) -> Completed {
        if self.complete_plain(exit, bytes) {
            return Completed::Exit(exit);
        }
        match inst::decode(bytes, CodeMode::of(self)) {
            Ok(inst) => self
                .described(exit, &inst)
                .map_or(Completed::Changed, Completed::Exit),
            Err(_) => Completed::Undecoded,
        }
    }

    fn described(&mut self, exit: Exit, inst: &Inst) -> Option<Exit> {
        let exit = match exit {
            Exit::Cpuid => (inst.op == Op::Cpuid).then_some(exit),
            Exit::Rdmsr => (inst.op == Op::Rdmsr).then_some(exit),
            Exit::Wrmsr => (inst.op == Op::Wrmsr).then_some(exit),
            Exit::Hlt => (inst.op == Op::Hlt).then_some(exit),
            Exit::Pause => (inst.op == Op::Pause).then_some(exit),
            Exit::Hypercall => (inst.op == Op::Vmmcall).then_some(exit),
            Exit::Xsetbv => (inst.op == Op::Xsetbv).then_some(exit),
            Exit::CacheControl => matches!(inst.op, Op::Invd | Op::Wbinvd).then_some(exit),
            Exit::Cr(_) if inst.op == Op::Lmsw => self.lmsw(inst),
            Exit::Cr(access) if self.wanted == Wanted::Operands => {
                self.cr_operands(access, inst).map(Exit::Cr)
            }
            Exit::Dr(access) if self.wanted == Wanted::Operands => match (inst.dst, inst.src) {
                (Operand::Reg(gpr), Operand::Dr(_)) if access.read => {
                    Some(Exit::Dr(DrAccess { gpr, ..access }))
                }
                (Operand::Dr(_), Operand::Reg(gpr)) if !access.read => {
                    Some(Exit::Dr(DrAccess { gpr, ..access }))
                }
                _ => None,
            },
            Exit::Io(io) => {
                let info = IoString {
                    addr_size: inst.addr_size,
                    seg: if io.input() { Seg::Es } else { inst.seg },
                };
                matches!(inst.op, Op::Ins | Op::Outs)
                    .then(|| Exit::Io(io.string_of(inst.rep != Rep::None, Some(info))))
            }
            other => Some(other),
        }?;
        self.inst_len = inst.len;
        self.wanted = Wanted::Nothing;
        Some(exit)
    }

    /// LMSW of a register. One of memory is left to the CPU: mode switches of
    /// a guest that does so are not looked at any more, which only matters where
    /// a CPU does not check what MOV CR0 may not do (QEMU's TCG).
    fn lmsw(&mut self, inst: &Inst) -> Option<Exit> {
        if let Operand::Reg(src) = inst.src {
            let operand = self.gpr(src) as u16;
            return Some(Exit::Cr(CrAccess::Lmsw(operand)));
        }
        self.intercept1(misc1::CR0_SELECTIVE, false);
        None
    }

    fn cr_operands(&self, access: CrAccess, inst: &Inst) -> Option<CrAccess> {
        match (access, inst.op, inst.dst, inst.src) {
            (CrAccess::Read { cr, .. }, Op::MovCr, Operand::Reg(dst), Operand::Cr(n))
                if n == cr =>
            {
                Some(CrAccess::Read { cr, dst })
            }
            (CrAccess::Write { cr, .. }, Op::MovCr, Operand::Cr(n), Operand::Reg(src))
                if n == cr =>
            {
                Some(CrAccess::Write { cr, src })
            }
            _ => None,
        }
    }

    /// Raw code of the last exit.
    pub fn exit_reason(&self) -> u32 {
        self.vmcb().control.exit_code as u32
    }

    /// RIP, for what compares it.
    pub(super) fn rip(&self) -> u64 {
        self.reg(vmm_core::cpu::Reg::Rip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_instructions() {
        let out = io_exit(0x03f8_0010, false);
        assert_eq!(
            (out.port(), out.size(), out.input(), out.string(), out.rep()),
            (0x3f8, 1, false, false, false)
        );
        let ins = io_exit(0x01f0_022d, true);
        assert_eq!(
            (ins.port(), ins.size(), ins.input(), ins.string(), ins.rep()),
            (0x1f0, 2, true, true, true)
        );
        let es = IoString {
            addr_size: 8,
            seg: Seg::Es,
        };
        assert_eq!(ins.string_info, Some(es));
        let outs = io_exit(0x0cfc_1144, true);
        let fs = IoString {
            addr_size: 4,
            seg: Seg::Fs,
        };
        assert_eq!((outs.size(), outs.string_info), (4, Some(fs)));
        assert_eq!(io_exit(0x0cfc_1144, false).string_info, None);
    }

    #[test]
    fn plain_instructions_need_no_decoder_and_others_are_left_to_it() {
        assert_eq!(plain_length(Exit::Cpuid, &[0x0f, 0xa2]), Some(2));
        assert_eq!(plain_length(Exit::Hlt, &[0xf4, 0xeb]), Some(1));
        assert_eq!(plain_length(Exit::Rdmsr, &[0x0f, 0x32, 0x89]), Some(2));
        // A prefix, another instruction, not all of it.
        assert_eq!(plain_length(Exit::Cpuid, &[0x66, 0x0f, 0xa2]), None);
        assert_eq!(plain_length(Exit::Wrmsr, &[0x0f, 0x32]), None);
        assert_eq!(plain_length(Exit::Cpuid, &[0x0f]), None);
    }

    #[test]
    fn nested_faults_tell_walk_from_access() {
        let is = |info, want, walk| {
            let got = nested_fault(info, 0x1000);
            assert!(
                matches!(got, Exit::NestedFault { gpa: 0x1000, gla: None, access, during_walk }
                    if access == want && during_walk == walk),
                "{got:?}"
            );
        };
        is(1 << 32 | 4, Access::READ, false);
        is(1 << 32 | 7, Access::WRITE, false);
        is(1 << 32 | 0x15, Access::EXEC, false);
        is(1 << 33 | 6, Access::WRITE, true);
    }

    #[test]
    fn task_switches() {
        let reason = |info, event| match task_switch(0x28, info, event) {
            Exit::TaskSwitch {
                selector: 0x28,
                reason,
            } => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(reason(0, false), 0);
        assert_eq!(reason(1 << 36, false), 1);
        assert_eq!(reason(1 << 38, false), 2);
        assert_eq!(reason(0, true), 3);
    }
}
