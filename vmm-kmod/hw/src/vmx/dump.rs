//! Explaining a failed VM entry.

use super::fields::vmcs;
use super::vcpu::Vcpu;
use core::fmt;
use vmm_core::cpu::{CpuState, EFER_LMA, Gpr, Reg, Seg};
use vmm_core::host::Host;

/// Text of a VM-instruction error (SDM Vol. 3C §30.4).
pub const fn vm_instruction_error(n: u32) -> &'static str {
    match n {
        0 => "no error recorded (VMfailInvalid: no current VMCS)",
        1 => "VMCALL executed in VMX root operation",
        2 => "VMCLEAR with invalid physical address",
        3 => "VMCLEAR with VMXON pointer",
        4 => "VMLAUNCH with non-clear VMCS",
        5 => "VMRESUME with non-launched VMCS",
        6 => "VMRESUME after VMXOFF",
        7 => "VM entry with invalid control field(s)",
        8 => "VM entry with invalid host-state field(s)",
        9 => "VMPTRLD with invalid physical address",
        10 => "VMPTRLD with VMXON pointer",
        11 => "VMPTRLD with incorrect VMCS revision identifier",
        12 => "VMREAD/VMWRITE from/to unsupported VMCS component",
        13 => "VMWRITE to read-only VMCS component",
        15 => "VMXON executed in VMX root operation",
        16 => "VM entry with invalid executive-VMCS pointer",
        17 => "VM entry with non-launched executive VMCS",
        18 => "VM entry with executive-VMCS pointer not VMXON pointer",
        19 => "VMCALL with non-clear VMCS",
        20 => "VMCALL with invalid VM-exit control fields",
        22 => "VMCALL with incorrect MSEG revision identifier",
        23 => "VMXOFF under dual-monitor treatment",
        24 => "VMCALL with invalid SMM-monitor features",
        25 => "VM entry with invalid VM-execution control fields in executive VMCS",
        26 => "VM entry with events blocked by MOV SS",
        28 => "invalid operand to INVEPT/INVVPID",
        _ => "unknown VM-instruction error",
    }
}

/// Text of the exit qualification of an entry that failed because of guest
/// state (SDM Vol. 3C §26.8).
pub const fn entry_failure(qualification: u64) -> &'static str {
    match qualification {
        2 => "loading the PDPTEs failed",
        3 => "an NMI was injected while events are blocked by STI",
        4 => "the VMCS link pointer is invalid",
        _ => "a guest-state field is invalid",
    }
}

const GPRS: [(&str, Gpr); 16] = [
    ("rax", Gpr::Rax),
    ("rbx", Gpr::Rbx),
    ("rcx", Gpr::Rcx),
    ("rdx", Gpr::Rdx),
    ("rsi", Gpr::Rsi),
    ("rdi", Gpr::Rdi),
    ("rbp", Gpr::Rbp),
    ("rsp", Gpr::Rsp),
    ("r8", Gpr::R8),
    ("r9", Gpr::R9),
    ("r10", Gpr::R10),
    ("r11", Gpr::R11),
    ("r12", Gpr::R12),
    ("r13", Gpr::R13),
    ("r14", Gpr::R14),
    ("r15", Gpr::R15),
];

const SEGS: [(&str, Seg); 8] = [
    ("cs", Seg::Cs),
    ("ds", Seg::Ds),
    ("es", Seg::Es),
    ("fs", Seg::Fs),
    ("gs", Seg::Gs),
    ("ss", Seg::Ss),
    ("ldtr", Seg::Ldtr),
    ("tr", Seg::Tr),
];

/// What is wrong with guest state, of the commonest causes of a failed entry
/// (SDM Vol. 3C §26.3).
pub fn suspects(cpu: &impl CpuState, out: &mut dyn fmt::Write) -> fmt::Result {
    let cr0 = cpu.reg(Reg::Cr0);
    let cr4 = cpu.reg(Reg::Cr4);
    let efer = cpu.reg(Reg::Efer);
    let rflags = cpu.reg(Reg::Rflags);
    let long = efer & EFER_LMA != 0;
    let cs = cpu.seg(Seg::Cs);
    let tr = cpu.seg(Seg::Tr);
    let rip = cpu.reg(Reg::Rip);
    let mut say = |wrong: bool, what: &str| {
        if wrong {
            writeln!(out, "  suspect: {what}")
        } else {
            Ok(())
        }
    };
    say(cr0 & 0x8000_0001 == 0x8000_0000, "CR0.PG without CR0.PE")?;
    say(long && cr4 & 0x20 == 0, "long mode without CR4.PAE")?;
    say(!long && cr4 & 1 << 17 != 0, "CR4.PCIDE outside long mode")?;
    say(long && rflags & 1 << 17 != 0, "RFLAGS.VM in long mode")?;
    say(cs.unusable(), "CS is unusable")?;
    say(cs.long() && cs.default32() && long, "CS has both L and D")?;
    say(
        !(long && cs.long()) && rip >> 32 != 0,
        "RIP above 4 GiB outside 64-bit code",
    )?;
    say(
        !matches!(cs.access & 15, 3 | 9 | 11 | 13 | 15),
        "CS is not an accessed code segment",
    )?;
    say(
        tr.unusable() || !matches!(tr.access & 15, 3 | 11),
        "TR is not a busy TSS",
    )?;
    say(
        long && tr.access & 15 != 11,
        "TR is not a 64-bit busy TSS in long mode",
    )?;
    say(cpu.selector(Seg::Tr) & 4 != 0, "TR selects from the LDT")?;
    for (name, seg) in SEGS {
        let d = cpu.seg(seg);
        let granular = d.access & 1 << 15 != 0;
        let bad = !d.unusable()
            && ((granular && d.limit & 0xfff != 0xfff) || (!granular && d.limit >> 20 != 0));
        if bad {
            writeln!(out, "  suspect: limit and G of {} do not fit", name)?;
        }
        if !d.unusable() && d.access & 0x80 == 0 {
            writeln!(out, "  suspect: {} is not present", name)?;
        }
    }
    Ok(())
}

impl<H: Host> Vcpu<H> {
    /// Writes guest state and controls for a log. The VMCS is current.
    pub fn dump(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        let error = self.vmread(vmcs::INSTRUCTION_ERROR) as u32;
        let qualification = self.vmread(vmcs::EXIT_QUALIFICATION);
        writeln!(
            out,
            "exit reason {:#x}, qualification {qualification:#x}",
            self.exit_reason
        )?;
        if self.exit_reason >> 31 != 0 {
            writeln!(out, "VM entry failed: {}", entry_failure(qualification))?;
        }
        writeln!(
            out,
            "VM-instruction error {error}: {}",
            vm_instruction_error(error)
        )?;
        for row in GPRS.chunks(4) {
            for (name, r) in row {
                write!(out, "{name:>4} {:016x}", self.gpr(*r))?;
            }
            writeln!(out)?;
        }
        writeln!(
            out,
            " rip {:016x} rflags {:x}",
            self.reg(Reg::Rip),
            self.reg(Reg::Rflags)
        )?;
        writeln!(
            out,
            " cr0 {:x} (real {:x}) cr2 {:x} cr3 {:x} cr4 {:x} (real {:x}) efer {:x}",
            self.reg(Reg::Cr0),
            self.vmread(vmcs::GUEST_CR0),
            self.reg(Reg::Cr2),
            self.reg(Reg::Cr3),
            self.reg(Reg::Cr4),
            self.vmread(vmcs::GUEST_CR4),
            self.reg(Reg::Efer),
        )?;
        for (name, s) in SEGS {
            let d = self.seg(s);
            writeln!(
                out,
                "{name:>4} {:04x} base {:016x} limit {:08x} access {:05x}",
                self.selector(s),
                d.base,
                d.limit,
                d.access
            )?;
        }
        writeln!(
            out,
            "gdtr {:x}/{:x} idtr {:x}/{:x} dr7 {:x} pat {:x}",
            self.reg(Reg::GdtrBase),
            self.reg(Reg::GdtrLimit),
            self.reg(Reg::IdtrBase),
            self.reg(Reg::IdtrLimit),
            self.reg(Reg::Dr7),
            self.vmread(vmcs::GUEST_PAT),
        )?;
        writeln!(
            out,
            "pin {:08x} proc {:08x} proc2 {:08x} entry {:08x} exit {:08x} exceptions {:08x}",
            self.pin,
            self.proc1,
            self.proc2,
            self.entry_ctl,
            self.vmread(vmcs::EXIT_CONTROLS),
            self.vmread(vmcs::EXCEPTION_BITMAP),
        )?;
        writeln!(
            out,
            "interruptibility {:x} activity {:x} pending debug {:x} entry info {:08x} vectoring {:08x} eptp {:x}",
            self.vmread(vmcs::GUEST_INTERRUPTIBILITY),
            self.vmread(vmcs::GUEST_ACTIVITY),
            self.vmread(vmcs::GUEST_PENDING_DEBUG),
            self.vmread(vmcs::ENTRY_INTERRUPTION_INFO),
            self.idt_vectoring,
            self.vmread(vmcs::EPTP),
        )?;
        writeln!(
            out,
            "host rsp {:x} rip {:x} cr3 {:x} tr {:x} base {:x} gs {:x} gdtr {:x} idtr {:x}",
            self.vmread(vmcs::HOST_RSP),
            self.vmread(vmcs::HOST_RIP),
            self.vmread(vmcs::HOST_CR3),
            self.vmread(vmcs::HOST_TR_SEL),
            self.vmread(vmcs::HOST_TR_BASE),
            self.vmread(vmcs::HOST_GS_BASE),
            self.vmread(vmcs::HOST_GDTR_BASE),
            self.vmread(vmcs::HOST_IDTR_BASE),
        )?;
        suspects(self, out)
    }
}
