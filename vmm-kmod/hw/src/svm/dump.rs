//! Explaining a refused VMRUN.

use super::vcpu::Vcpu;
use super::vmcb::{EFER_SVME, State};
use crate::cr::{CR0_CD, CR0_NW};
use crate::vmx::dump::line;
use core::fmt;
use vmm_core::cpu::{CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME};
use vmm_core::host::Host;

/// The consistency check of APM Vol. 2 §15.5.1 that the state fails, as far
/// as it can be told.
pub(super) fn inconsistency(s: &State, asid: u32) -> &'static str {
    let long = s.efer & EFER_LME != 0 && s.cr0 & CR0_PG != 0;
    if s.efer & EFER_SVME == 0 {
        "EFER.SVME is clear"
    } else if s.cr0 & CR0_NW != 0 && s.cr0 & CR0_CD == 0 {
        "CR0.NW is set and CR0.CD clear"
    } else if s.cr0 >> 32 != 0 {
        "CR0 has upper bits"
    } else if s.dr6 >> 32 != 0 || s.dr7 >> 32 != 0 {
        "DR6 or DR7 has upper bits"
    } else if long && s.cr4 & CR4_PAE == 0 {
        "long mode without CR4.PAE"
    } else if long && s.cr0 & CR0_PE == 0 {
        "long mode without CR0.PE"
    } else if long && s.cs.attrib & 0x600 == 0x600 {
        "CS has both L and D"
    } else if asid == 0 {
        "the ASID is 0"
    } else if s.efer & EFER_LMA != 0 && !long {
        "EFER.LMA without long mode"
    } else {
        "a reserved bit, an intercept or an injected event (APM Vol. 2 §15.5.1)"
    }
}

const NAMES: &str = "intercepts cr,dr,exceptions,misc,,,asid,tlb,virq,shadow,inject,nested,ncr3,clean,\
     cr0,cr2,cr3,cr4,efer,dr6,dr7,rip,rsp,rflags,rax,cpl";

impl<H: Host> Vcpu<H> {
    /// Everything that can explain a refused VMRUN.
    #[cfg_attr(target_os = "none", optimize(size))]
    pub fn dump(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        let v = self.vmcb();
        let (c, s) = (&v.control, &v.state);
        writeln!(
            f,
            "VMRUN refused: {}; exit {:#x}, info {:#x} {:#x}",
            inconsistency(s, c.asid),
            c.exit_code,
            c.exit_info1,
            c.exit_info2
        )?;
        let values = [
            c.intercept_cr.into(),
            c.intercept_dr.into(),
            c.intercept_exceptions.into(),
            c.intercept_misc1.into(),
            c.intercept_misc2.into(),
            c.intercept_misc3.into(),
            c.asid.into(),
            c.tlb_control.into(),
            c.virtual_interrupt,
            c.interrupt_shadow,
            c.event_inj,
            c.nested_control,
            c.n_cr3,
            c.clean.into(),
            s.cr0,
            s.cr2,
            s.cr3,
            s.cr4,
            s.efer,
            s.dr6,
            s.dr7,
            s.rip,
            s.rsp,
            s.rflags,
            s.rax,
            s.cpl.into(),
        ];
        line(f, NAMES, &|n| values.get(n).copied().unwrap_or(0))?;
        for (name, d) in [
            ("es", &s.es),
            ("cs", &s.cs),
            ("ss", &s.ss),
            ("ds", &s.ds),
            ("fs", &s.fs),
            ("gs", &s.gs),
            ("gdtr", &s.gdtr),
            ("ldtr", &s.ldtr),
            ("idtr", &s.idtr),
            ("tr", &s.tr),
        ] {
            writeln!(
                f,
                "{name}: {:#x} attributes {:#x} base {:#x} limit {:#x}",
                d.selector, d.attrib, d.base, d.limit
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_named() {
        // SAFETY: all zeroes are a valid state.
        let mut s: State = unsafe { core::mem::zeroed() };
        assert_eq!(inconsistency(&s, 1), "EFER.SVME is clear");
        s.efer = EFER_SVME;
        s.cr0 = CR0_NW;
        assert!(inconsistency(&s, 1).contains("NW"));
        s.cr0 = CR0_PE | CR0_PG;
        s.efer |= EFER_LME;
        assert!(inconsistency(&s, 1).contains("PAE"));
        s.cr4 = CR4_PAE;
        s.efer |= EFER_LMA;
        assert!(inconsistency(&s, 0).contains("ASID"));
    }
}
