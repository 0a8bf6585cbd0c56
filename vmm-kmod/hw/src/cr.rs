//! Rules of CR0, CR4 and EFER: what a MOV refuses (SDM Vol. 3A §2.5, Vol. 2B
//! "MOV—Move to/from Control Registers").

use vmm_core::cpu::{CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME};

/// CR0.MP.
pub const CR0_MP: u64 = 1 << 1;
/// CR0.EM.
pub const CR0_EM: u64 = 1 << 2;
/// CR0.TS.
pub const CR0_TS: u64 = 1 << 3;
/// CR0.ET, always 1.
pub const CR0_ET: u64 = 1 << 4;
/// CR0.NE.
pub const CR0_NE: u64 = 1 << 5;
/// CR0.WP.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.AM.
pub const CR0_AM: u64 = 1 << 18;
/// CR0.NW.
pub const CR0_NW: u64 = 1 << 29;
/// CR0.CD.
pub const CR0_CD: u64 = 1 << 30;
/// The bits that CR0 has.
pub const CR0_DEFINED: u64 = CR0_PE
    | CR0_MP
    | CR0_EM
    | CR0_TS
    | CR0_ET
    | CR0_NE
    | CR0_WP
    | CR0_AM
    | CR0_NW
    | CR0_CD
    | CR0_PG;
/// CR4.MCE.
pub const CR4_MCE: u64 = 1 << 6;
/// CR4.PGE.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4.LA57.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.VMXE.
pub const CR4_VMXE: u64 = 1 << 13;
/// CR4.PCIDE.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4.OSXSAVE.
pub const CR4_OSXSAVE: u64 = 1 << 18;

/// CR4 bits whose change flushes the TLB on a real CPU
/// (SDM Vol. 3A §4.10.4.1): PSE, PAE, PGE, PCIDE, SMEP, and those that change
/// what translations mean.
pub const CR4_FLUSHES: u64 = 0x10 | CR4_PAE | CR4_PGE | CR4_PCIDE | 1 << 20 | 1 << 21 | CR4_LA57;

/// What MOV CR looks at besides the new value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Controls {
    /// CR0 as the guest sees it.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4 as the guest sees it.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// CS.L.
    pub cs_long: bool,
}

/// Whether the guest may load `new` into CR0; #GP(0) otherwise.
pub const fn check_cr0(new: u64, now: &Controls) -> bool {
    if new >> 32 != 0 {
        return false;
    }
    if new & CR0_NW != 0 && new & CR0_CD == 0 {
        return false;
    }
    if new & CR0_PG != 0 && new & CR0_PE == 0 {
        return false;
    }
    let was = now.cr0 & CR0_PG != 0;
    let will = new & CR0_PG != 0;
    if !was && will && now.efer & EFER_LME != 0 && (now.cr4 & CR4_PAE == 0 || now.cs_long) {
        return false;
    }
    if was && !will && (now.cr4 & CR4_PCIDE != 0 || (now.efer & EFER_LMA != 0 && now.cs_long)) {
        return false;
    }
    true
}

/// Whether the guest may load `new` into CR4; #GP(0) otherwise. `allowed` are
/// the bits of the features that the guest's CPUID shows.
pub const fn check_cr4(new: u64, now: &Controls, allowed: u64) -> bool {
    if new & !allowed != 0 {
        return false;
    }
    let long = now.efer & EFER_LMA != 0;
    if long && (new & CR4_PAE == 0 || (new ^ now.cr4) & CR4_LA57 != 0) {
        return false;
    }
    if new & CR4_PCIDE != 0 && now.cr4 & CR4_PCIDE == 0 && (!long || now.cr3 & 0xfff != 0) {
        return false;
    }
    true
}

/// Whether a MOV to CR0 or CR4 that takes `now` to `new` reloads the PDPTEs:
/// PAE paging is on afterwards and one of CD, NW, PG, PAE, PGE, PSE, SMEP
/// changed (SDM Vol. 3A §4.4.1).
pub const fn reloads_pdptes(now: &Controls, new: &Controls) -> bool {
    let pae_paging = new.cr0 & CR0_PG != 0 && new.cr4 & CR4_PAE != 0 && new.efer & EFER_LMA == 0;
    let cr0 = (now.cr0 ^ new.cr0) & (CR0_CD | CR0_NW | CR0_PG) != 0;
    let cr4 = (now.cr4 ^ new.cr4) & (CR4_PAE | CR4_PGE | 0x10 | 1 << 20) != 0;
    pae_paging && (cr0 || cr4)
}

/// EFER with LMA as CR0.PG and LME make it.
pub const fn efer_lma(efer: u64, cr0: u64) -> u64 {
    if efer & EFER_LME != 0 && cr0 & CR0_PG != 0 {
        efer | EFER_LMA
    } else {
        efer & !EFER_LMA
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGED: u64 = CR0_PE | CR0_PG | CR0_ET | CR0_NE;

    #[test]
    fn long_mode_is_entered_only_with_pae_and_from_32_bit_code() {
        let now = Controls {
            cr0: CR0_PE,
            cr4: CR4_PAE,
            efer: EFER_LME,
            ..Controls::default()
        };
        assert!(check_cr0(PAGED, &now));
        assert!(!check_cr0(PAGED, &Controls { cr4: 0, ..now }));
        assert!(!check_cr0(
            PAGED,
            &Controls {
                cs_long: true,
                ..now
            }
        ));
        assert_eq!(efer_lma(EFER_LME, PAGED), EFER_LME | EFER_LMA);
        assert_eq!(efer_lma(EFER_LME | EFER_LMA, CR0_PE), EFER_LME);
    }

    #[test]
    fn paging_is_not_left_from_64_bit_code_or_with_pcid() {
        let now = Controls {
            cr0: PAGED,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            ..Controls::default()
        };
        assert!(check_cr0(CR0_PE, &now));
        assert!(!check_cr0(
            CR0_PE,
            &Controls {
                cs_long: true,
                ..now
            }
        ));
        assert!(!check_cr0(
            CR0_PE,
            &Controls {
                cr4: CR4_PAE | CR4_PCIDE,
                ..now
            }
        ));
    }

    #[test]
    fn meaningless_cr0_values_fault() {
        let now = Controls::default();
        assert!(!check_cr0(CR0_PG, &now));
        assert!(!check_cr0(CR0_NW, &now));
        assert!(!check_cr0(1 << 32, &now));
        assert!(check_cr0(CR0_NW | CR0_CD, &now));
    }

    #[test]
    fn cr4_keeps_long_mode_together() {
        let now = Controls {
            cr0: PAGED,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            ..Controls::default()
        };
        let all = 0x3f_ffff;
        assert!(!check_cr4(0, &now, all));
        assert!(!check_cr4(CR4_PAE | CR4_LA57, &now, all));
        assert!(!check_cr4(CR4_PAE | CR4_VMXE, &now, all & !CR4_VMXE));
        assert!(check_cr4(CR4_PAE | CR4_PCIDE, &now, all));
        assert!(!check_cr4(
            CR4_PAE | CR4_PCIDE,
            &Controls { cr3: 1, ..now },
            all
        ));
        assert!(!check_cr4(CR4_PCIDE, &Controls::default(), all));
    }

    #[test]
    fn pdptes_follow_pae_paging_only() {
        let off = Controls {
            cr0: CR0_PE,
            cr4: CR4_PAE,
            ..Controls::default()
        };
        let on = Controls { cr0: PAGED, ..off };
        assert!(reloads_pdptes(&off, &on));
        assert!(!reloads_pdptes(&on, &on));
        assert!(!reloads_pdptes(
            &off,
            &Controls {
                efer: EFER_LMA,
                ..on
            }
        ));
    }
}
