//! Explaining a failed VM entry.

use super::fields::vmcs;
use super::vcpu::Vcpu;
use core::fmt;
use vmm_core::cpu::{CpuState, Gpr, Reg, Seg};
use vmm_core::host::Host;
use vmm_core::text::parts;

/// Text of a VM-instruction error that an entry can have; of the others the number is enough
/// to find it in the manual (SDM Vol. 3C §30.4).
pub const fn vm_instruction_error(n: u32) -> &'static str {
    match n {
        0 => "none recorded",
        5 => "VMRESUME with non-launched VMCS",
        7 => "invalid control field",
        8 => "invalid host-state field",
        26 => "events blocked by MOV SS",
        _ => "see SDM Vol. 3C 30.4",
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

// Names as one string: a pointer to each would be a relocation.
const GPR_NAMES: &str = "rax,rbx,rcx,rdx,rsi,rdi,rbp,rsp,r8,r9,r10,r11,r12,r13,r14,r15";
const GPRS: [Gpr; 16] = [
    Gpr::Rax,
    Gpr::Rbx,
    Gpr::Rcx,
    Gpr::Rdx,
    Gpr::Rsi,
    Gpr::Rdi,
    Gpr::Rbp,
    Gpr::Rsp,
    Gpr::R8,
    Gpr::R9,
    Gpr::R10,
    Gpr::R11,
    Gpr::R12,
    Gpr::R13,
    Gpr::R14,
    Gpr::R15,
];

const SEG_NAMES: &str = "cs,ds,es,fs,gs,ss,ldtr,tr";
const SEGS: [Seg; 8] = [
    Seg::Cs,
    Seg::Ds,
    Seg::Es,
    Seg::Fs,
    Seg::Gs,
    Seg::Ss,
    Seg::Ldtr,
    Seg::Tr,
];

fn segments() -> impl Iterator<Item = (&'static str, Seg)> {
    parts(SEG_NAMES, b',').zip(SEGS)
}

/// Names and values, each behind the other.
#[cfg_attr(target_os = "none", optimize(size))]
pub fn line(out: &mut dyn fmt::Write, names: &str, values: &dyn Fn(usize) -> u64) -> fmt::Result {
    for (n, name) in parts(names, b',').enumerate() {
        write!(out, "{name} {:x} ", values(n))?;
    }
    writeln!(out)
}

const REG_NAMES: &str = " rip,rflags,cr0,cr2,cr3,cr4,efer,gdtr,limit,idtr,limit,dr7";
const REGS: [Reg; 12] = [
    Reg::Rip,
    Reg::Rflags,
    Reg::Cr0,
    Reg::Cr2,
    Reg::Cr3,
    Reg::Cr4,
    Reg::Efer,
    Reg::GdtrBase,
    Reg::GdtrLimit,
    Reg::IdtrBase,
    Reg::IdtrLimit,
    Reg::Dr7,
];

const STATE_NAMES: &str =
    "real cr0,cr4,pat,exceptions,interruptibility,activity,pending debug,entry info,exit,eptp";
const STATE: [u32; 10] = [
    vmcs::GUEST_CR0,
    vmcs::GUEST_CR4,
    vmcs::GUEST_PAT,
    vmcs::EXCEPTION_BITMAP,
    vmcs::GUEST_INTERRUPTIBILITY,
    vmcs::GUEST_ACTIVITY,
    vmcs::GUEST_PENDING_DEBUG,
    vmcs::ENTRY_INTERRUPTION_INFO,
    vmcs::EXIT_CONTROLS,
    vmcs::EPTP,
];

const HOST_NAMES: &str = "host rsp,rip,cr3,tr,base,gs,gdtr,idtr";
const HOST: [u32; 8] = [
    vmcs::HOST_RSP,
    vmcs::HOST_RIP,
    vmcs::HOST_CR3,
    vmcs::HOST_TR_SEL,
    vmcs::HOST_TR_BASE,
    vmcs::HOST_GS_BASE,
    vmcs::HOST_GDTR_BASE,
    vmcs::HOST_IDTR_BASE,
];

impl<H: Host> Vcpu<H> {
    fn fields(&self, out: &mut dyn fmt::Write, names: &str, fields: &[u32]) -> fmt::Result {
        line(out, names, &|n| {
            fields.get(n).map_or(0, |f| self.vmread(*f))
        })
    }

    /// Writes guest state and controls for a log. The VMCS is current.
    #[cfg_attr(target_os = "none", optimize(size))]
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
        for (n, (name, r)) in parts(GPR_NAMES, b',').zip(GPRS).enumerate() {
            write!(out, "{name:>4} {:016x}", self.gpr(r))?;
            if n % 4 == 3 {
                writeln!(out)?;
            }
        }
        line(out, REG_NAMES, &|n| REGS.get(n).map_or(0, |r| self.reg(*r)))?;
        for (name, s) in segments() {
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
        let controls = [
            self.pin,
            self.proc1,
            self.proc2,
            self.entry_ctl,
            self.idt_vectoring,
        ];
        line(out, "pin,proc,proc2,entry,vectoring", &|n| {
            controls.get(n).map_or(0, |c| u64::from(*c))
        })?;
        self.fields(out, STATE_NAMES, &STATE)?;
        self.fields(out, HOST_NAMES, &HOST)
    }
}
