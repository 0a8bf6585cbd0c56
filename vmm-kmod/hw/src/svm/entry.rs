//! VMRUN and the way back (APM Vol. 2 §15.5, §15.6).

use super::vcpu::{Vcpu, Wanted, work};
use super::vmcb::{clean, msr, tlb};
use crate::instr;
use crate::mitigation::{fill_rsb, ret};
use core::arch::{asm, naked_asm};
use core::mem::{offset_of, replace};
use vmm_core::cpu::{Exit, Gpr};
use vmm_core::host::{Host, Hpa};

/// What the assembly saves and loads.
#[repr(C)]
pub(super) struct Regs {
    /// In the order of instruction encodings. RSP's place is unused: it lives
    /// in the VMCB, as RAX does while the guest runs.
    pub gpr: [u64; 16],
    /// The guest's VMCB.
    pub vmcb_pa: Hpa,
    /// Where VMSAVE has put the host's FS, GS, TR, LDTR and MSRs.
    pub host_vmcb_pa: Hpa,
    /// Not 0: fill the return-stack buffer after an exit.
    pub fill_rsb: u64,
}

/// Runs the guest: RDI points to [`Regs`]. Keeps RBX and RBP, which inline
/// assembly cannot give up, and no other register.
///
/// Host interrupts, NMIs and the rest wait from CLGI to STGI. RFLAGS.IF is set
/// at VMRUN, so that an interrupt for the host ends the guest's run (§15.21.1);
/// it is taken where the run loop lets it, an NMI right at STGI, when the
/// host's GS and TR are back.
///
/// # Safety
/// Called by `enter` only: the VMCBs are ours, AMD-V is on, interrupts are off.
#[unsafe(naked)]
unsafe extern "sysv64" fn run_guest() {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push rdi",
        "mov rax, [rdi + {vmcb}]",
        "clgi",
        "sti",
        "vmload rax",
        "mov rcx, [rdi + 8]",
        "mov rdx, [rdi + 16]",
        "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]",
        "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]",
        "mov r9, [rdi + 72]",
        "mov r10, [rdi + 80]",
        "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]",
        "mov r13, [rdi + 104]",
        "mov r14, [rdi + 112]",
        "mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        "vmrun rax",
        // RAX and RSP are the host's again.
        "vmsave rax",
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov [rdi + 8], rcx",
        "mov [rdi + 16], rdx",
        "mov [rdi + 24], rbx",
        "mov [rdi + 40], rbp",
        "mov [rdi + 48], rsi",
        "mov [rdi + 64], r8",
        "mov [rdi + 72], r9",
        "mov [rdi + 80], r10",
        "mov [rdi + 88], r11",
        "mov [rdi + 96], r12",
        "mov [rdi + 104], r13",
        "mov [rdi + 112], r14",
        "mov [rdi + 120], r15",
        "pop rax",
        "mov [rdi + 56], rax",
        "mov rax, [rdi + {host_vmcb}]",
        "vmload rax",
        // Guest values must not steer the host's speculation.
        "xor ecx, ecx",
        "xor edx, edx",
        "xor esi, esi",
        "xor r8d, r8d",
        "xor r9d, r9d",
        "xor r10d, r10d",
        "xor r11d, r11d",
        "xor r12d, r12d",
        "xor r13d, r13d",
        "xor r14d, r14d",
        "xor r15d, r15d",
        // Nor may the guest's CALLs predict where the host's RETs go: 32
        // CALLs of our own, as many as a return-stack buffer holds, each with
        // a trap for speculation behind it, before the first RET.
        "cmp qword ptr [rdi + {fill_rsb}], 0",
        "je 9f",
        fill_rsb!(),
        "add rsp, 32 * 8",
        "lfence",
        "9:",
        "cli",
        "stgi",
        "pop rdi",
        "pop rbx",
        "pop rbp",
        ret!(),
        vmcb = const offset_of!(Regs, vmcb_pa),
        host_vmcb = const offset_of!(Regs, host_vmcb_pa),
        fill_rsb = const offset_of!(Regs, fill_rsb),
    )
}

impl<H: Host> Vcpu<H> {
    /// One VMRUN, and what ended it. Host NMIs have reached the host when this
    /// returns, and machine checks have been handed to it.
    ///
    /// # Safety
    /// Between `load` and `unload`, on the same CPU, with interrupts off.
    #[inline(always)]
    pub unsafe fn enter(&mut self) -> Exit {
        // Interrupts are off: whoever raises the generation after this kicks
        // us out of the guest.
        let generation = self.generation.current();
        if generation != self.npt_seen {
            self.npt_seen = generation;
            self.work |= work::FLUSH;
        }
        if self.work != 0 {
            self.entry_work();
        }
        let clean_bits = replace(&mut self.clean, self.clean_mask);
        let [rax, ..] = self.regs.gpr;
        let vmcb = self.vmcb_mut();
        vmcb.state.rax = rax;
        vmcb.control.clean = clean_bits;
        self.injected = vmcb.control.event_inj;
        // SAFETY: by the caller's promise; `load` has put the host's state
        // into its VMCB on this CPU. The callee keeps RBX and RBP, everything
        // else is declared lost; vector registers are the guest's, and kernel
        // code uses none.
        unsafe {
            asm!(
                "call {run}",
                run = sym run_guest,
                inout("rdi") &raw mut self.regs => _,
                out("rsi") _, out("rax") _, out("rcx") _, out("rdx") _,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            );
        }
        if self.work | u32::from(self.spec_ctrl_used) != 0 {
            self.exit_work();
        }
        self.inst_len = 0;
        self.wanted = Wanted::Nothing;
        let vmcb = self.vmcb_mut();
        vmcb.control.event_inj = 0;
        let (rax, code) = (vmcb.state.rax, vmcb.control.exit_code);
        // An array of 16 and an enum of 16.
        #[allow(clippy::indexing_slicing)]
        {
            self.regs.gpr[Gpr::Rax as usize] = rax;
        }
        self.decode_exit(code)
    }

    #[cold]
    fn entry_work(&mut self) {
        if self.work & work::FLUSH != 0 {
            self.flush_now();
        }
        if self.work & work::SPEC_CTRL != 0 {
            // SAFETY: the flag is set only where the MSR exists.
            unsafe {
                self.host_spec_ctrl = instr::rdmsr(msr::SPEC_CTRL);
                instr::wrmsr(msr::SPEC_CTRL, self.spec_ctrl);
            }
        }
    }

    #[cold]
    fn exit_work(&mut self) {
        if self.work & work::TLB_CONTROL != 0 {
            self.work &= !work::TLB_CONTROL;
            self.vmcb_mut().control.tlb_control = tlb::NOTHING;
        }
        if self.spec_ctrl_used {
            // SAFETY: the flag is set only where the MSR exists.
            unsafe {
                self.spec_ctrl = instr::rdmsr(msr::SPEC_CTRL);
                instr::wrmsr(msr::SPEC_CTRL, self.host_spec_ctrl);
            }
        }
    }

    /// The next VMRUN drops this guest's translations, or uses an ASID under
    /// which there are none.
    fn flush_now(&mut self) {
        self.work &= !work::FLUSH;
        if self.has(super::caps::Features::FLUSH_BY_ASID) {
            self.set_tlb_control(tlb::THIS_ASID);
        } else {
            self.new_asid();
        }
    }

    fn set_tlb_control(&mut self, what: u32) {
        self.vmcb_mut().control.tlb_control = what;
        self.work |= work::TLB_CONTROL;
    }

    /// Takes an ASID on this CPU.
    #[cold]
    pub(super) fn new_asid(&mut self) {
        // SAFETY: `load` and `enter` run with interrupts off on `self.cpu`.
        let Some((asid, first)) = (unsafe { self.backend.take_asid(self.cpu) }) else {
            return;
        };
        self.asid = asid;
        self.touch(clean::ASID).control.asid = asid.number;
        self.work &= !work::FLUSH;
        if first {
            self.set_tlb_control(tlb::EVERYTHING);
        }
    }
}
