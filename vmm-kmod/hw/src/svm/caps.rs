//! What the CPU's AMD-V can do (APM Vol. 3 §E.4.9, CPUID 8000_000AH).

use super::vmcb::{VM_CR_SVMDIS, msr};
use crate::backend::{ApicVirt, Offer};
use crate::cr::{CR4_LA57, CR4_OSXSAVE};
use crate::ept::Options;
use crate::instr;
use crate::mitigation::Mitigations;
use bitflags::bitflags;
use core::fmt;

bitflags! {
    /// CPUID 8000_000AH:EDX, as far as it is used, and what other leaves say.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Nested paging.
        const NESTED_PAGING = 1 << 0;
        /// Next RIP is stored on exits.
        const NRIP_SAVE = 1 << 3;
        /// TSC_RATIO.
        const TSC_RATIO = 1 << 4;
        /// VMCB clean bits.
        const CLEAN_BITS = 1 << 5;
        /// TLB flush by ASID.
        const FLUSH_BY_ASID = 1 << 6;
        /// Operands of MOV CR and MOV DR, segments of OUTS are stored.
        const DECODE_ASSISTS = 1 << 7;
        /// PAUSE filter.
        const PAUSE_FILTER = 1 << 10;
        /// Its threshold: only loops of PAUSEs count.
        const PAUSE_THRESHOLD = 1 << 12;
        /// AVIC.
        const AVIC = 1 << 13;
        /// AVIC for x2APIC mode, too; of the CPUs with AVIC those that came later.
        const X2AVIC = 1 << 18;
        /// RDTSCP.
        const RDTSCP = 1 << 32;
        /// INVPCID, and its intercept.
        const INVPCID = 1 << 33;
        /// PCID.
        const PCID = 1 << 34;
        /// RDPRU.
        const RDPRU = 1 << 35;
        /// XSAVE, turned on by the host.
        const XSAVE = 1 << 36;
        /// XSAVES.
        const XSAVES = 1 << 37;
        /// AVIC's IPIs can be relied on: not a CPU with erratum 1235 (Zen, Zen 2).
        const AVIC_IPI = 1 << 38;
    }
}

/// What AVIC does of what VT-x calls APIC virtualization.
pub(super) const AVIC: ApicVirt = ApicVirt::TPR_SHADOW
    .union(ApicVirt::ACCESS_PAGE)
    .union(ApicVirt::REGISTERS)
    .union(ApicVirt::INTERRUPTS);

/// Why AMD-V is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// CPUID does not know it.
    Svm,
    /// The firmware has turned it off.
    Firmware,
    /// No nested paging.
    NestedPaging,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Missing::Svm => "the CPU does not have it",
            Missing::Firmware => {
                "the firmware has turned it off (VM_CR.SVMDIS); look for \"SVM\" in its setup"
            }
            Missing::NestedPaging => "the CPU has no nested paging",
        })
    }
}

/// What is known of the machine's CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Features.
    pub features: Features,
    /// Number of ASIDs, the host's included.
    pub asids: u32,
    /// XCR0 as the host has it; 0 without XSAVE.
    pub xcr0: u64,
    /// The host's page tables have five levels, and so have nested ones.
    pub la57: bool,
    /// 1 GiB pages.
    pub pages_1g: bool,
    /// What the CPU's weaknesses ask for.
    pub mitigations: Mitigations,
}

impl Capabilities {
    /// Decides from CPUID (`leaf(leaf, sub-leaf)`), VM_CR, and the host's CR4
    /// and XCR0.
    pub fn new(
        leaf: impl Fn(u32, u32) -> [u32; 4],
        vm_cr: u64,
        cr4: u64,
        xcr0: u64,
    ) -> Result<Self, Missing> {
        let [max, ..] = leaf(0x8000_0000, 0);
        let [_, _, c1, d1] = leaf(0x8000_0001, 0);
        if max < 0x8000_000a || c1 & (1 << 2) == 0 {
            return Err(Missing::Svm);
        }
        if vm_cr & VM_CR_SVMDIS != 0 {
            return Err(Missing::Firmware);
        }
        let [_, asids, _, svm] = leaf(0x8000_000a, 0);
        let mut features = Features::from_bits_truncate(u64::from(svm));
        if !features.contains(Features::NESTED_PAGING) {
            return Err(Missing::NestedPaging);
        }
        let [basic, ..] = leaf(0, 0);
        let [signature, _, c, _] = leaf(1, 0);
        // Base family 15 and extended family.
        let family = (signature >> 8 & 15) + (signature >> 20 & 0xff);
        let b7 = if basic >= 7 { leaf(7, 0)[1] } else { 0 };
        let b8 = leaf(0x8000_0008, 0)[1];
        let xsave = c & (1 << 26) != 0 && cr4 & CR4_OSXSAVE != 0;
        for (feature, on) in [
            (Features::RDTSCP, d1 & (1 << 27) != 0),
            (Features::INVPCID, b7 & (1 << 10) != 0),
            (Features::PCID, c & (1 << 17) != 0),
            (Features::RDPRU, b8 & (1 << 4) != 0),
            (Features::AVIC_IPI, !matches!(family, 0x17 | 0x18)),
            (Features::XSAVE, xsave),
            (
                Features::XSAVES,
                xsave && basic >= 0xd && leaf(0xd, 1)[0] & (1 << 3) != 0,
            ),
        ] {
            features.set(feature, on);
        }
        Ok(Capabilities {
            features,
            asids,
            xcr0: if xsave { xcr0 } else { 0 },
            la57: cr4 & CR4_LA57 != 0,
            pages_1g: d1 & (1 << 26) != 0,
            mitigations: Mitigations::amd(b8),
        })
    }

    /// Those of this machine.
    ///
    /// # Safety
    /// CPL 0 on a CPU whose CPUID knows AMD-V.
    pub unsafe fn probe() -> Result<Self, Missing> {
        // SAFETY: VM_CR exists where AMD-V does; XCR0 is read where CR4 says
        // that it is on.
        let (vm_cr, cr4, xcr0) = unsafe {
            let cr4 = instr::read_cr4();
            let on = cr4 & CR4_OSXSAVE != 0;
            (
                instr::rdmsr(msr::VM_CR),
                cr4,
                if on { instr::xgetbv0() } else { 0 },
            )
        };
        Self::new(instr::cpuid, vm_cr, cr4, xcr0)
    }

    /// What nested page tables can have.
    pub fn npt_options(&self) -> Options {
        Options {
            pages_2m: true,
            pages_1g: self.pages_1g,
            accessed_dirty: true,
        }
    }

    /// Whether AVIC is to be used: as said, and if that is left to the CPU on those that
    /// have it for x2APIC mode as well (Zen 4 and later).
    pub fn use_avic(&self, wanted: Option<bool>) -> bool {
        let f = self.features;
        f.contains(Features::AVIC) && wanted.unwrap_or(f.contains(Features::X2AVIC))
    }

    /// What guests can be offered.
    pub fn offer(&self) -> Offer {
        let f = self.features;
        Offer {
            invpcid: f.contains(Features::INVPCID),
            pcid: f.contains(Features::PCID),
            rdtscp: f.contains(Features::RDTSCP),
            xcr0: self.xcr0,
            xsaves: f.contains(Features::XSAVES),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An EPYC as QEMU's TCG has it, with `edx` in leaf 8000_000AH.
    fn epyc(edx: u32) -> impl Fn(u32, u32) -> [u32; 4] {
        move |leaf, sub| match (leaf, sub) {
            (0, _) => [0xd, 0, 0, 0],
            (1, _) => [0, 0, 1 << 26, 0],
            (0x8000_0000, _) => [0x8000_001e, 0, 0, 0],
            (0x8000_0001, _) => [0, 0, 1 << 2, 1 << 26 | 1 << 27],
            (0x8000_0008, _) => [0, 1 << 12, 0, 0],
            (0x8000_000a, _) => [1, 16, 0, edx],
            _ => [0; 4],
        }
    }

    #[test]
    fn bare_nested_paging_is_enough() {
        let caps = Capabilities::new(epyc(1), 0, CR4_OSXSAVE, 7).unwrap();
        assert!(!caps.features.contains(Features::NRIP_SAVE));
        assert!(caps.features.contains(Features::RDTSCP | Features::XSAVE));
        assert_eq!((caps.asids, caps.xcr0, caps.la57), (16, 7, false));
        assert!(caps.mitigations.ibpb && !caps.mitigations.spec_ctrl);
    }

    #[test]
    fn refusals_say_why() {
        let e = |edx, vm_cr| Capabilities::new(epyc(edx), vm_cr, 0, 0).unwrap_err();
        assert_eq!(e(0, 0), Missing::NestedPaging);
        assert_eq!(e(1, VM_CR_SVMDIS), Missing::Firmware);
        let none = |_: u32, _: u32| [0; 4];
        assert_eq!(Capabilities::new(none, 0, 0, 0), Err(Missing::Svm));
    }

    #[test]
    fn avic_is_used_where_it_is_asked_for_or_new_enough() {
        let of = |edx| Capabilities::new(epyc(edx), 0, 0, 0).unwrap();
        let (none, old, new) = (of(1), of(1 | 1 << 13), of(1 | 1 << 13 | 1 << 18));
        assert!(!none.use_avic(None) && !none.use_avic(Some(true)));
        assert!(!old.use_avic(None) && old.use_avic(Some(true)));
        assert!(new.use_avic(None) && !new.use_avic(Some(false)));
    }

    #[test]
    fn erratum_1235_is_of_family_17h() {
        let family = |eax| {
            let leaf = move |leaf, sub| match leaf {
                1 => [eax, 0, 1 << 26, 0],
                _ => epyc(1 | 1 << 13)(leaf, sub),
            };
            let caps = Capabilities::new(leaf, 0, 0, 0).unwrap();
            caps.features.contains(Features::AVIC_IPI)
        };
        // Zen and Zen 2, then Zen 3, Zen 4, Zen 5.
        assert!(!family(0x0080_0f12) && !family(0x0083_0f10));
        assert!(family(0x00a0_0f11) && family(0x00a1_0f11) && family(0x00b0_0f21));
    }

    #[test]
    fn a_host_without_osxsave_gives_its_guests_no_xsave() {
        let caps = Capabilities::new(epyc(1), 0, 0, 7).unwrap();
        assert_eq!(caps.offer().xcr0, 0);
    }
}
