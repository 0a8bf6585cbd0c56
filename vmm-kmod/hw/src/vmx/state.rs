//! The guest's registers (SDM Vol. 3C §24.4).

use super::cr::{
    self, CR0_GUEST_OWNED, CR4_FLUSHES, CR4_GUEST_OWNED, Controls, check_cr0, check_cr4,
};
use super::fields::{entry_ctl, interruptibility, vmcs};
use super::instr::vmwrite;
use super::vcpu::{Vcpu, work};
use vmm_core::cpu::{CR0_PG, CpuState, EFER_LMA, Gpr, Reg, Seg, SegDesc};
use vmm_core::host::Host;

/// RFLAGS bits that exist; bit 1 is always 1.
const RFLAGS_DEFINED: u64 = 0x003f_7fd5;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_FIXED: u64 = 2;
/// Pending debug exceptions: BS.
const PENDING_BS: u64 = 1 << 14;
/// Defined bits of access rights (table 24-2).
const ACCESS_DEFINED: u32 = 0x1f0ff;

fn segment(base: u32, s: Seg) -> u32 {
    base + 2 * s as u32
}

impl<H: Host> Vcpu<H> {
    fn write(&mut self, field: u32, value: u64) {
        // SAFETY: our VMCS is current; guest state that is not valid fails
        // the entry, not the host.
        unsafe { vmwrite(field, value) };
    }

    /// Guest and shadow bits of a control register as the guest sees it.
    fn merged(&self, real: u32, shadow: u32, owned: u64) -> u64 {
        self.vmread(real) & owned | self.vmread(shadow) & !owned
    }

    /// CR0, CR3, CR4, EFER and CS.L, for the checks of MOV CR.
    pub fn controls(&self) -> Controls {
        Controls {
            cr0: self.reg(Reg::Cr0),
            cr3: self.reg(Reg::Cr3),
            cr4: self.reg(Reg::Cr4),
            efer: self.reg(Reg::Efer),
            cs_long: self.seg(Seg::Cs).long(),
        }
    }

    /// Whether the guest may load `new` into CR0; #GP(0) otherwise.
    pub fn check_cr0(&self, new: u64) -> bool {
        check_cr0(new, &self.controls())
    }

    /// Whether the guest may load `new` into CR4; #GP(0) otherwise. `allowed`
    /// are the bits of the features that the guest's CPUID shows.
    pub fn check_cr4(&self, new: u64, allowed: u64) -> bool {
        check_cr4(
            new,
            &self.controls(),
            allowed & self.backend.caps.cr4_fixed1 & !cr::CR4_VMXE,
        )
    }

    /// Drops the guest's translations with the next entry, as a change of
    /// address space by the hypervisor must.
    pub fn flush_guest_tlb(&mut self) {
        self.work |= work::FLUSH_VPID;
    }

    fn set_efer(&mut self, efer: u64, cr0: u64) {
        let efer = cr::efer_lma(efer, cr0);
        self.write(vmcs::GUEST_EFER, efer);
        let mut ctl = self.entry_ctl & !entry_ctl::IA32E_GUEST;
        if efer & EFER_LMA != 0 {
            ctl |= entry_ctl::IA32E_GUEST;
        }
        if ctl != self.entry_ctl {
            self.entry_ctl = ctl;
            self.write(vmcs::ENTRY_CONTROLS, u64::from(ctl));
        }
    }

    fn set_cr0(&mut self, value: u64) {
        let value = (value | cr::CR0_ET) & cr::CR0_DEFINED;
        let old = self.reg(Reg::Cr0);
        self.write(vmcs::CR0_SHADOW, value);
        self.write(vmcs::GUEST_CR0, self.backend.caps.real_cr0(value));
        if (old ^ value) & CR0_PG != 0 {
            let efer = self.vmread(vmcs::GUEST_EFER);
            self.set_efer(efer, value);
            self.flush_guest_tlb();
        } else if (old ^ value) & cr::CR0_WP != 0 {
            self.flush_guest_tlb();
        }
    }

    fn set_cr4(&mut self, value: u64) {
        let old = self.reg(Reg::Cr4);
        self.write(vmcs::CR4_SHADOW, value);
        self.write(vmcs::GUEST_CR4, self.backend.caps.real_cr4(value));
        if (old ^ value) & CR4_FLUSHES != 0 {
            self.flush_guest_tlb();
        }
    }

    fn set_dr(&mut self, n: usize, value: u64) {
        if let Some(slot) = self.dr.get_mut(n) {
            *slot = value;
        }
        self.drs_loaded = false;
        self.load_debug_registers();
    }
}

impl<H: Host> CpuState for Vcpu<H> {
    #[inline]
    fn gpr(&self, r: Gpr) -> u64 {
        if r == Gpr::Rsp {
            return self.vmread(vmcs::GUEST_RSP);
        }
        // An array of 16 and an enum of 16.
        #[allow(clippy::indexing_slicing)]
        self.regs.gpr[r as usize]
    }

    #[inline]
    fn set_gpr(&mut self, r: Gpr, v: u64) {
        if r == Gpr::Rsp {
            self.write(vmcs::GUEST_RSP, v);
            return;
        }
        #[allow(clippy::indexing_slicing)]
        {
            self.regs.gpr[r as usize] = v;
        }
    }

    #[inline]
    fn reg(&self, r: Reg) -> u64 {
        let [dr0, dr1, dr2, dr3] = self.dr;
        match r {
            Reg::Rip => self.rip,
            Reg::Rflags => self.vmread(vmcs::GUEST_RFLAGS),
            Reg::Cr0 => self.merged(vmcs::GUEST_CR0, vmcs::CR0_SHADOW, CR0_GUEST_OWNED),
            Reg::Cr2 => self.regs.cr2,
            Reg::Cr3 => self.vmread(vmcs::GUEST_CR3),
            Reg::Cr4 => {
                let owned = CR4_GUEST_OWNED & self.backend.caps.cr4_fixed1;
                self.merged(vmcs::GUEST_CR4, vmcs::CR4_SHADOW, owned)
            }
            Reg::Efer => self.vmread(vmcs::GUEST_EFER),
            Reg::Dr0 => dr0,
            Reg::Dr1 => dr1,
            Reg::Dr2 => dr2,
            Reg::Dr3 => dr3,
            Reg::Dr6 => self.dr6,
            Reg::Dr7 => self.vmread(vmcs::GUEST_DR7),
            Reg::Pdpte0 => self.vmread(vmcs::GUEST_PDPTE0),
            Reg::Pdpte1 => self.vmread(vmcs::GUEST_PDPTE1),
            Reg::Pdpte2 => self.vmread(vmcs::GUEST_PDPTE2),
            Reg::Pdpte3 => self.vmread(vmcs::GUEST_PDPTE3),
            Reg::GdtrBase => self.vmread(vmcs::GUEST_GDTR_BASE),
            Reg::GdtrLimit => self.vmread(vmcs::GUEST_GDTR_LIMIT),
            Reg::IdtrBase => self.vmread(vmcs::GUEST_IDTR_BASE),
            Reg::IdtrLimit => self.vmread(vmcs::GUEST_IDTR_LIMIT),
        }
    }

    fn set_reg(&mut self, r: Reg, v: u64) {
        match r {
            Reg::Rip => {
                self.rip = v;
                self.work |= work::RIP;
            }
            Reg::Rflags => self.write(vmcs::GUEST_RFLAGS, v & RFLAGS_DEFINED | RFLAGS_FIXED),
            Reg::Cr0 => self.set_cr0(v),
            Reg::Cr2 => self.regs.cr2 = v,
            Reg::Cr3 => {
                self.write(vmcs::GUEST_CR3, v & !(1 << 63));
                self.flush_guest_tlb();
            }
            Reg::Cr4 => self.set_cr4(v),
            Reg::Efer => {
                let cr0 = self.reg(Reg::Cr0);
                self.set_efer(v, cr0);
            }
            Reg::Dr0 => self.set_dr(0, v),
            Reg::Dr1 => self.set_dr(1, v),
            Reg::Dr2 => self.set_dr(2, v),
            Reg::Dr3 => self.set_dr(3, v),
            Reg::Dr6 => self.dr6 = v & 0x1_e00f | 0xffff_0ff0,
            Reg::Dr7 => {
                let v = v & 0xffff_2fff | 0x400;
                self.dr7 = v;
                self.write(vmcs::GUEST_DR7, v);
                self.load_debug_registers();
            }
            Reg::Pdpte0 => self.write(vmcs::GUEST_PDPTE0, v),
            Reg::Pdpte1 => self.write(vmcs::GUEST_PDPTE1, v),
            Reg::Pdpte2 => self.write(vmcs::GUEST_PDPTE2, v),
            Reg::Pdpte3 => self.write(vmcs::GUEST_PDPTE3, v),
            Reg::GdtrBase => self.write(vmcs::GUEST_GDTR_BASE, v),
            Reg::GdtrLimit => self.write(vmcs::GUEST_GDTR_LIMIT, v & 0xffff),
            Reg::IdtrBase => self.write(vmcs::GUEST_IDTR_BASE, v),
            Reg::IdtrLimit => self.write(vmcs::GUEST_IDTR_LIMIT, v & 0xffff),
        }
    }

    fn seg(&self, s: Seg) -> SegDesc {
        SegDesc {
            base: self.vmread(segment(vmcs::GUEST_ES_BASE, s)),
            limit: self.vmread(segment(vmcs::GUEST_ES_LIMIT, s)) as u32,
            access: self.vmread(segment(vmcs::GUEST_ES_ACCESS, s)) as u32,
        }
    }

    fn set_seg(&mut self, s: Seg, d: SegDesc) {
        self.write(segment(vmcs::GUEST_ES_BASE, s), d.base);
        self.write(segment(vmcs::GUEST_ES_LIMIT, s), u64::from(d.limit));
        self.write(
            segment(vmcs::GUEST_ES_ACCESS, s),
            u64::from(d.access & ACCESS_DEFINED),
        );
    }

    fn selector(&self, s: Seg) -> u16 {
        self.vmread(segment(vmcs::GUEST_ES_SEL, s)) as u16
    }

    fn set_selector(&mut self, s: Seg, v: u16) {
        self.write(segment(vmcs::GUEST_ES_SEL, s), u64::from(v));
    }

    #[inline]
    fn inst_len(&self) -> u8 {
        self.inst_len
    }

    fn interrupt_shadow(&self) -> bool {
        const SHADOW: u64 = interruptibility::STI | interruptibility::MOV_SS;
        self.vmread(vmcs::GUEST_INTERRUPTIBILITY) & SHADOW != 0
    }

    #[inline]
    fn set_interrupt_shadow(&mut self, on: bool) {
        const SHADOW: u64 = interruptibility::STI | interruptibility::MOV_SS;
        let old = self.vmread(vmcs::GUEST_INTERRUPTIBILITY);
        let new = if on {
            old & !SHADOW | interruptibility::STI
        } else {
            old & !SHADOW
        };
        if new != old && (!on || old & SHADOW == 0) {
            self.write(vmcs::GUEST_INTERRUPTIBILITY, new);
        }
    }

    fn nmi_blocked(&self) -> bool {
        self.vmread(vmcs::GUEST_INTERRUPTIBILITY) & interruptibility::NMI != 0
    }

    #[inline]
    #[cfg_attr(target_os = "none", optimize(speed))]
    fn advance(&mut self, len: u8) {
        let old = self.rip;
        let mut new = old.wrapping_add(u64::from(len));
        // Only an instruction at the end of the first 4 GiB needs to know
        // whether RIP wraps there.
        if (old ^ new) >> 32 != 0 && !self.long_mode_code() {
            new &= 0xffff_ffff;
        }
        self.rip = new;
        self.work |= work::RIP;
        self.set_interrupt_shadow(false);
        if self.vmread(vmcs::GUEST_RFLAGS) & RFLAGS_TF != 0 {
            self.single_step_trap();
        }
    }

    fn long_mode_code(&self) -> bool {
        self.entry_ctl & entry_ctl::IA32E_GUEST != 0
            && self.vmread(vmcs::GUEST_CS_ACCESS) & (1 << 13) != 0
    }

    fn cpl(&self) -> u8 {
        (self.vmread(vmcs::GUEST_SS_ACCESS) >> 5 & 3) as u8
    }
}

impl<H: Host> Vcpu<H> {
    /// The trap that a single-stepped instruction owes, when it was emulated.
    #[cold]
    fn single_step_trap(&mut self) {
        let pending = self.vmread(vmcs::GUEST_PENDING_DEBUG);
        self.write(vmcs::GUEST_PENDING_DEBUG, pending | PENDING_BS);
    }
}
