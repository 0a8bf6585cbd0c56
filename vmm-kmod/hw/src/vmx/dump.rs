//! Explaining a failed VM entry.

use super::fields::vmcs;
use super::vcpu::Vcpu;
use core::fmt;
use vmm_core::cpu::{CpuState, EFER_LMA, Gpr, Reg, Seg};
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

/// What is wrong with guest state, of the commonest causes of a failed entry
/// (SDM Vol. 3C §26.3).
#[cfg_attr(target_os = "none", optimize(size))]
pub fn suspects(cpu: &dyn CpuState, out: &mut dyn fmt::Write) -> fmt::Result {
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
    for (name, seg) in segments() {
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

/// Names and values, each behind the other.
#[cfg_attr(target_os = "none", optimize(size))]
fn line(out: &mut dyn fmt::Write, names: &str, values: &dyn Fn(usize) -> u64) -> fmt::Result {
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
        self.fields(out, HOST_NAMES, &HOST)?;
        suspects(self, out)
    }
}
