//! The guest's registers (APM Vol. 2 appendix B, table B-2).

use super::vcpu::Vcpu;
use super::vmcb::{EFER_SVME, Segment, State, clean, event};
use crate::cr::{self, CR4_FLUSHES, CR4_MCE, Controls};
use vmm_core::cpu::{CR0_PG, CpuState, EFER_LMA, Event, Gpr, Reg, Seg, SegDesc};
use vmm_core::host::Host;

/// RFLAGS bits that exist; bit 1 is always 1.
const RFLAGS_DEFINED: u64 = 0x003f_7fd5;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_FIXED: u64 = 2;
const DR6_BS: u64 = 1 << 14;
const UNUSABLE: u32 = 1 << 16;

/// Access rights as VT-x has them, from the VMCB's 12 bits.
pub(super) const fn access(attrib: u16) -> u32 {
    let a = attrib as u32;
    let unusable = if a & 0x80 == 0 { UNUSABLE } else { 0 };
    a & 0xff | (a & 0xf00) << 4 | unusable
}

/// And back. What is unusable is not present.
pub(super) const fn attrib(access: u32) -> u16 {
    if access & UNUSABLE != 0 {
        return 0;
    }
    (access & 0xff | (access & 0xf000) >> 4) as u16
}

fn segment(state: &State, s: Seg) -> &Segment {
    match s {
        Seg::Es => &state.es,
        Seg::Cs => &state.cs,
        Seg::Ss => &state.ss,
        Seg::Ds => &state.ds,
        Seg::Fs => &state.fs,
        Seg::Gs => &state.gs,
        Seg::Ldtr => &state.ldtr,
        Seg::Tr => &state.tr,
    }
}

fn segment_mut(state: &mut State, s: Seg) -> &mut Segment {
    match s {
        Seg::Es => &mut state.es,
        Seg::Cs => &mut state.cs,
        Seg::Ss => &mut state.ss,
        Seg::Ds => &mut state.ds,
        Seg::Fs => &mut state.fs,
        Seg::Gs => &mut state.gs,
        Seg::Ldtr => &mut state.ldtr,
        Seg::Tr => &mut state.tr,
    }
}

impl<H: Host> Vcpu<H> {
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

    /// Whether the guest may load `new` into CR4; #GP(0) otherwise. `allowed`
    /// are the bits of the features that the guest's CPUID shows.
    pub fn check_cr4(&self, new: u64, allowed: u64) -> bool {
        cr::check_cr4(new, &self.controls(), allowed & !cr::CR4_VMXE)
    }

    /// Drops the guest's translations with the next entry, as a change of
    /// address space by the hypervisor must.
    pub fn flush_guest_tlb(&mut self) {
        self.work |= super::vcpu::work::FLUSH;
    }

    fn set_efer(&mut self, efer: u64, cr0: u64) {
        let efer = cr::efer_lma(efer, cr0) | EFER_SVME;
        self.touch(clean::CRX).state.efer = efer;
    }

    /// The guest's CR0 is the CPU's: nothing in it has to be hidden.
    fn set_cr0(&mut self, value: u64) {
        let value = value & cr::CR0_DEFINED | cr::CR0_ET;
        let state = &mut self.touch(clean::CRX).state;
        let old = core::mem::replace(&mut state.cr0, value);
        let efer = state.efer;
        if (old ^ value) & CR0_PG != 0 {
            self.set_efer(efer & !EFER_SVME, value);
            self.flush_guest_tlb();
        } else if (old ^ value) & cr::CR0_WP != 0 {
            self.flush_guest_tlb();
        }
    }

    /// MCE stays on, or a machine check in the guest would shut the machine
    /// down; only a guest that has it off needs exits when it reads CR4.
    fn set_cr4(&mut self, value: u64) {
        const READ_CR4: u32 = 1 << 4;
        let old = core::mem::replace(&mut self.cr4, value);
        let vmcb = self.touch(clean::CRX | clean::INTERCEPTS);
        vmcb.state.cr4 = value | CR4_MCE;
        if value & CR4_MCE != 0 {
            vmcb.control.intercept_cr &= !READ_CR4;
        } else {
            vmcb.control.intercept_cr |= READ_CR4;
        }
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

    /// The trap that a single-stepped instruction owes, when it was emulated.
    #[cold]
    fn single_step_trap(&mut self) {
        if self.vmcb().control.event_inj & event::VALID == 0 {
            self.inject(Event::exception(1));
            let state = &mut self.touch(clean::DRX).state;
            state.dr6 |= DR6_BS;
        }
    }
}

impl<H: Host> CpuState for Vcpu<H> {
    #[inline]
    fn gpr(&self, r: Gpr) -> u64 {
        if r == Gpr::Rsp {
            return self.vmcb().state.rsp;
        }
        // An array of 16 and an enum of 16.
        #[allow(clippy::indexing_slicing)]
        self.regs.gpr[r as usize]
    }

    #[inline]
    fn set_gpr(&mut self, r: Gpr, v: u64) {
        if r == Gpr::Rsp {
            self.vmcb_mut().state.rsp = v;
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
        let s = &self.vmcb().state;
        match r {
            Reg::Rip => s.rip,
            Reg::Rflags => s.rflags,
            Reg::Cr0 => s.cr0,
            Reg::Cr2 => s.cr2,
            Reg::Cr3 => s.cr3,
            Reg::Cr4 => self.cr4,
            Reg::Efer => s.efer & !EFER_SVME,
            Reg::Dr0 => dr0,
            Reg::Dr1 => dr1,
            Reg::Dr2 => dr2,
            Reg::Dr3 => dr3,
            Reg::Dr6 => s.dr6,
            Reg::Dr7 => s.dr7,
            // The CPU reads them from memory when it needs them (§15.25.4).
            Reg::Pdpte0 | Reg::Pdpte1 | Reg::Pdpte2 | Reg::Pdpte3 => 0,
            Reg::GdtrBase => s.gdtr.base,
            Reg::GdtrLimit => u64::from(s.gdtr.limit),
            Reg::IdtrBase => s.idtr.base,
            Reg::IdtrLimit => u64::from(s.idtr.limit),
        }
    }

    fn set_reg(&mut self, r: Reg, v: u64) {
        match r {
            Reg::Rip => self.vmcb_mut().state.rip = v,
            Reg::Rflags => {
                self.vmcb_mut().state.rflags = v & RFLAGS_DEFINED | RFLAGS_FIXED;
            }
            Reg::Cr0 => self.set_cr0(v),
            Reg::Cr2 => self.touch(clean::CR2).state.cr2 = v,
            Reg::Cr3 => {
                self.touch(clean::CRX).state.cr3 = v & !(1 << 63);
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
            Reg::Dr6 => {
                self.touch(clean::DRX).state.dr6 = v & 0x1_e00f | 0xffff_0ff0;
            }
            Reg::Dr7 => {
                self.touch(clean::DRX).state.dr7 = v & 0xffff_2fff | 0x400;
                self.load_debug_registers();
            }
            Reg::Pdpte0 | Reg::Pdpte1 | Reg::Pdpte2 | Reg::Pdpte3 => {}
            Reg::GdtrBase => self.touch(clean::DT).state.gdtr.base = v,
            Reg::GdtrLimit => self.touch(clean::DT).state.gdtr.limit = v as u32 & 0xffff,
            Reg::IdtrBase => self.touch(clean::DT).state.idtr.base = v,
            Reg::IdtrLimit => self.touch(clean::DT).state.idtr.limit = v as u32 & 0xffff,
        }
    }

    fn seg(&self, s: Seg) -> SegDesc {
        let d = segment(&self.vmcb().state, s);
        let mut access = access(d.attrib);
        // Not every CPU keeps these: the granularity, of which the limit knows;
        // "accessed" of what is in use; "busy" of the task register.
        if s != Seg::Ldtr && access & UNUSABLE == 0 {
            access |= 1;
        }
        if s == Seg::Tr {
            access |= 2;
        }
        access &= !(1 << 15);
        if d.limit > 0xf_ffff {
            access |= 1 << 15;
        }
        SegDesc {
            base: d.base,
            limit: d.limit,
            access,
        }
    }

    fn set_seg(&mut self, s: Seg, d: SegDesc) {
        let state = &mut self.touch(clean::SEG).state;
        let to = segment_mut(state, s);
        to.base = d.base;
        to.limit = d.limit;
        to.attrib = attrib(d.access);
        if s == Seg::Ss {
            state.cpl = d.dpl();
        }
    }

    fn selector(&self, s: Seg) -> u16 {
        segment(&self.vmcb().state, s).selector
    }

    fn set_selector(&mut self, s: Seg, v: u16) {
        segment_mut(&mut self.touch(clean::SEG).state, s).selector = v;
    }

    #[inline]
    fn inst_len(&self) -> u8 {
        self.inst_len
    }

    fn interrupt_shadow(&self) -> bool {
        self.vmcb().control.interrupt_shadow & 1 != 0
    }

    #[inline]
    fn set_interrupt_shadow(&mut self, on: bool) {
        self.vmcb_mut().control.interrupt_shadow = u64::from(on);
    }

    fn nmi_blocked(&self) -> bool {
        self.in_nmi()
    }

    #[inline]
    fn advance(&mut self, len: u8) {
        let old = self.vmcb().state.rip;
        let mut new = old.wrapping_add(u64::from(len));
        // Only an instruction at the end of the first 4 GiB needs to know
        // whether RIP wraps there.
        if (old ^ new) >> 32 != 0 && !self.long_mode_code() {
            new &= 0xffff_ffff;
        }
        let vmcb = self.vmcb_mut();
        vmcb.state.rip = new;
        vmcb.control.interrupt_shadow = 0;
        if vmcb.state.rflags & RFLAGS_TF != 0 {
            self.single_step_trap();
        }
    }

    fn long_mode_code(&self) -> bool {
        let s = &self.vmcb().state;
        s.efer & EFER_LMA != 0 && s.cs.attrib & (1 << 9) != 0
    }

    fn cpl(&self) -> u8 {
        self.vmcb().state.cpl & 3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_rights_survive_both_ways() {
        // 64-bit code, 32-bit data, 16-bit data, busy TSS, LDT.
        for a in [0xa09b, 0xc093, 0x93, 0x8b, 0x82, 0xc0f3] {
            assert_eq!(access(attrib(a)), a);
        }
        assert_eq!(attrib(0xa09b), 0xa9b);
        assert_eq!(attrib(UNUSABLE | 0xc093), 0);
        assert_eq!(access(0), UNUSABLE);
    }
}
