//! VM entry and the way back.

use super::caps::Features;
use super::exit::raw;
use super::fields::{msr, reason, vmcs};
use super::instr::{self, vmwrite};
use super::vcpu::{Vcpu, work};
use crate::mitigation::{arrival, fill_rsb, ret};
use core::arch::{asm, naked_asm};
use core::mem::offset_of;
use core::sync::atomic::Ordering;
use vmm_core::cpu::Exit;
use vmm_core::host::Host;

/// What the assembly saves and loads.
#[repr(C)]
pub(super) struct Regs {
    /// In the order of instruction encodings; RSP's place is unused, RSP
    /// lives in the VMCS.
    pub gpr: [u64; 16],
    pub cr2: u64,
    /// What HOST_RSP in the VMCS holds.
    pub host_rsp: u64,
    /// A selector for VERW to look at.
    pub verw: u16,
    /// Not 0: fill the return-stack buffer after an exit.
    pub fill_rsb: u16,
}

const LAUNCHED: u32 = 1;
/// Overwrite the CPU's buffers before the entry.
pub(super) const VERW: u32 = 2;

/// Enters the guest: RDI points to [`Regs`], ESI holds flags. Returns in EAX
/// 0 after a VM exit, 1 if the entry instruction failed. Keeps RBX and RBP,
/// which inline assembly cannot give up, and no other register.
///
/// # Safety
/// Called by `enter` only: the vCPU's VMCS is current, interrupts are off,
/// bit 0 of the flags tells its launch state.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter_guest() {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push rdi",
        "cmp rsp, [rdi + {host_rsp}]",
        "je 2f",
        "mov [rdi + {host_rsp}], rsp",
        "mov eax, {HOST_RSP}",
        "vmwrite rax, rsp",
        "2:",
        "mov rax, cr2",
        "mov rcx, [rdi + {cr2}]",
        "cmp rax, rcx",
        "je 3f",
        "mov cr2, rcx",
        "3:",
        "test esi, {VERW}",
        "jz 4f",
        "verw word ptr [rdi + {verw}]",
        "4:",
        "test esi, {LAUNCHED}",
        // MOV leaves the flags alone.
        "mov rax, [rdi]",
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
        "jz 5f",
        "vmresume",
        "jmp 6f",
        "5:",
        "vmlaunch",
        "6:",
        // Only a failed entry comes here, on the stack it left from.
        "mov eax, 1",
        "pop rdi",
        "pop rbx",
        "pop rbp",
        ret!(),
        host_rsp = const offset_of!(Regs, host_rsp),
        cr2 = const offset_of!(Regs, cr2),
        verw = const offset_of!(Regs, verw),
        HOST_RSP = const vmcs::HOST_RSP,
        VERW = const VERW,
        LAUNCHED = const LAUNCHED,
    )
}

/// Where VM exits arrive (HOST_RIP), with the stack of [`enter_guest`].
///
/// # Safety
/// Never called: only a VM exit comes here.
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn exit_from_guest() {
    naked_asm!(
        arrival!(),
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov [rdi], rax",
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
        "mov rax, cr2",
        "mov [rdi + {cr2}], rax",
        // Guest values must not steer the host's speculation.
        "xor eax, eax",
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
        // CALLs of our own (as many as any return-stack buffer holds), each
        // with a trap for speculation behind it, before the first RET.
        "cmp word ptr [rdi + {fill_rsb}], 0",
        "je 9f",
        fill_rsb!(),
        "add rsp, 32 * 8",
        "lfence",
        "9:",
        "pop rdi",
        "pop rbx",
        "pop rbp",
        ret!(),
        this = sym exit_from_guest,
        cr2 = const offset_of!(Regs, cr2),
        fill_rsb = const offset_of!(Regs, fill_rsb),
    )
}

impl<H: Host> Vcpu<H> {
    /// One VM entry, and what ended it. Host NMIs and machine checks that
    /// ended it have been handed to the host when this returns.
    ///
    /// # Safety
    /// Between [`Vcpu::load`] and [`Vcpu::unload`], on the same CPU, with
    /// interrupts off.
    #[inline(always)]
    pub unsafe fn enter(&mut self) -> Exit {
        let todo = self.work;
        if todo == work::RIP {
            self.work = 0;
            // SAFETY: our VMCS is current; a bad RIP fails the entry.
            unsafe { vmwrite(vmcs::GUEST_RIP, self.rip) };
        } else if todo != 0 {
            self.entry_work(todo);
        }
        // Interrupts are off: whoever raises the generation after this kicks
        // us out of the guest.
        let generation = self.generation.current();
        if generation != self.ept_seen {
            self.invalidate_ept(generation);
        }
        // SAFETY: CPL 0. The host may have changed both from an interrupt
        // since `load`.
        let (cr3, cr4) = unsafe { (instr::read_cr3(), instr::read_cr4()) };
        if (cr3 ^ self.host.cr3) | (cr4 ^ self.host.cr4) != 0 {
            self.host.set_cr3_cr4(cr3, cr4);
        }
        let failed: u32;
        // SAFETY: by the caller's promise, our VMCS is current and interrupts
        // are off; `load` took the launch state into the flags. The callee
        // keeps RBX and RBP, everything else is declared lost; vector
        // registers are the guest's, and kernel code uses none.
        unsafe {
            asm!(
                "call {enter}",
                enter = sym enter_guest,
                inout("rdi") &raw mut self.regs => _,
                inout("esi") self.entry_flags => _,
                out("eax") failed,
                out("rcx") _, out("rdx") _,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            );
        }
        if self.spec_ctrl_used {
            self.restore_spec_ctrl();
        }
        if failed != 0 {
            // What the last exit interrupted has been taken over since.
            self.idt_vectoring = 0;
            return Exit::EntryFailed {
                error: self.vmread(vmcs::INSTRUCTION_ERROR) as u32,
            };
        }
        let raw = raw::read();
        if self.entry_flags & LAUNCHED == 0 {
            self.note_launch(raw.reason);
        }
        self.entry_info = 0;
        self.exit_reason = raw.reason;
        self.rip = raw.rip;
        self.idt_vectoring = raw.idt_vectoring;
        self.decode_exit(raw.reason)
    }

    /// The launch state after a first entry: still "clear" if the entry
    /// failed (SDM Vol. 3C §26.8).
    #[cold]
    fn note_launch(&mut self, why: u32) {
        if why & reason::ENTRY_FAILURE == 0 {
            self.entry_flags |= LAUNCHED;
            self.node.launched.store(true, Ordering::Relaxed);
        }
    }

    /// The launch state for the entries to come.
    pub(super) fn take_launch_state(&mut self) {
        let launched = u32::from(self.node.launched.load(Ordering::Relaxed));
        self.entry_flags = (self.entry_flags & !LAUNCHED) | (launched * LAUNCHED);
    }

    #[cold]
    #[cfg_attr(target_os = "none", optimize(speed))]
    fn entry_work(&mut self, todo: u32) {
        self.work = todo & work::STICKY;
        let caps = &self.backend.caps;
        // SAFETY: CPL 0 with our VMCS current; each MSR and INVVPID is used
        // only where the CPU has it.
        unsafe {
            if todo & work::RIP != 0 {
                vmwrite(vmcs::GUEST_RIP, self.rip);
            }
            if todo & work::FLUSH_VPID != 0
                && self.vpid != 0
                && caps.features.contains(Features::VPID)
            {
                let _ = instr::invvpid(Some(self.vpid));
            }
            if todo & work::FLUSH_L1D != 0 && caps.mitigations.flush_l1d {
                instr::wrmsr(msr::FLUSH_CMD, 1);
            }
            if todo & work::SPEC_CTRL != 0 {
                self.host_spec_ctrl = instr::rdmsr(msr::SPEC_CTRL);
                instr::wrmsr(msr::SPEC_CTRL, self.spec_ctrl);
            }
        }
    }

    #[cold]
    fn restore_spec_ctrl(&mut self) {
        // SAFETY: the flag is set only where the MSR exists.
        unsafe {
            self.spec_ctrl = instr::rdmsr(msr::SPEC_CTRL);
            instr::wrmsr(msr::SPEC_CTRL, self.host_spec_ctrl);
        }
    }

    /// Drops what this CPU has cached of our address space before
    /// `generation`.
    #[cold]
    fn invalidate_ept(&mut self, generation: u64) {
        if self.generation.seen(self.cpu) < generation {
            // SAFETY: CPL 0 in VMX operation; `probe` made sure that one of
            // the types exists.
            unsafe {
                if self
                    .backend
                    .caps
                    .features
                    .contains(Features::INVEPT_CONTEXT)
                {
                    let _ = instr::invept_context(self.eptp);
                } else {
                    let _ = instr::invept_all();
                }
            }
            self.generation.set_seen(self.cpu, generation);
        }
        self.ept_seen = generation;
    }

    /// Asks for an L1 data-cache flush with the next entry, if the CPU needs
    /// it: after a return from userland, or a switch of VM (L1TF).
    pub fn request_l1d_flush(&mut self) {
        if self.backend.caps.mitigations.flush_l1d {
            self.work |= work::FLUSH_L1D;
        }
    }
}
