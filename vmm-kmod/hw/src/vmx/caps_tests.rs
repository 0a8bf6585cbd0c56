//! The judgement, on what real and emulated CPUs report.

use super::*;
use std::collections::BTreeMap;
use std::string::ToString;

struct Table {
    msrs: BTreeMap<u32, u64>,
    ecx1: u32,
    edx7: u32,
}

impl CpuInfo for Table {
    fn rdmsr(&self, msr: u32) -> u64 {
        *self
            .msrs
            .get(&msr)
            .unwrap_or_else(|| panic!("RDMSR {msr:#x} would fault"))
    }
    fn cpuid(&self, leaf: u32, _: u32) -> [u32; 4] {
        match leaf {
            0 => [0x16, 0, 0, 0],
            1 => [0, 0, self.ecx1, 0],
            7 => [0, 1 << 11, 0, self.edx7],
            _ => [0; 4],
        }
    }
}

/// A Skylake-X-like CPU: everything but posted interrupts.
fn skylake() -> Table {
    let all = |must: u32, may: u32| u64::from(may) << 32 | u64::from(must);
    Table {
        ecx1: 1 << 5,
        edx7: 0,
        msrs: BTreeMap::from([
            (msr::FEATURE_CONTROL, 5),
            (msr::VMX_BASIC, 0x00da_0400_0000_002b | 1 << 54),
            (msr::VMX_TRUE_PINBASED, all(0x16, 0x7f)),
            (msr::VMX_TRUE_PROCBASED, all(0x0400_6172, 0xfff9_fffe)),
            (msr::VMX_TRUE_EXIT, all(0x0003_6dfb, 0x007f_ffff)),
            (msr::VMX_TRUE_ENTRY, all(0x11fb, 0x0000_ffff)),
            (msr::VMX_PROCBASED2, all(0, 0x0213_7fff)),
            (msr::VMX_EPT_VPID_CAP, 0x0000_0f01_0673_4141),
            (msr::VMX_MISC, 0x7004_c1e7),
            (msr::VMX_CR0_FIXED0, 0x8000_0021),
            (msr::VMX_CR0_FIXED1, 0xffff_ffff),
            (msr::VMX_CR4_FIXED0, 0x2000),
            (msr::VMX_CR4_FIXED1, 0x3f_27ff),
        ]),
    }
}

#[test]
fn a_skylake_has_all_that_is_needed_and_most_of_what_is_nice() {
    let c = Capabilities::probe(&skylake(), 0x2e7).unwrap();
    assert_eq!(c.revision, 0x2b);
    assert_eq!(c.preemption_rate, 7);
    assert!(c.features.contains(
        Features::EPT_1G
            | Features::EPT_AD
            | Features::VPID
            | Features::VIRTUAL_INTERRUPTS
            | Features::X2APIC
            | Features::PREEMPTION_TIMER
            | Features::TSC_SCALING
    ));
    assert!(!c.features.contains(Features::POSTED_INTERRUPTS));
    assert_eq!(c.xcr0, 0xe7, "PKRU of the host is not offered");
    // Guest CR0 and CR4 as the CPU gets them.
    assert_eq!(
        c.real_cr0(0x6000_0010),
        0x30,
        "real mode: no PE, no PG, no CD, NE forced"
    );
    assert_eq!(c.real_cr4(0), 0x2040);
    assert_eq!(c.pin.adjust(9), 0x1f);
}

#[test]
fn without_vmx_no_msr_is_touched() {
    let t = Table {
        msrs: BTreeMap::new(),
        ecx1: 0,
        edx7: 0,
    };
    let e = Capabilities::probe(&t, 0).unwrap_err();
    assert_eq!(e, Missing::VMX);
    assert!(e.to_string().contains("nested virtualization"));
}

#[test]
fn a_locked_firmware_is_told_apart_from_an_unlocked_one() {
    let mut t = skylake();
    t.msrs.insert(msr::FEATURE_CONTROL, 1);
    let e = Capabilities::probe(&t, 7).unwrap_err();
    assert!(e.to_string().contains("BIOS setup"), "{e}");
    t.msrs.insert(msr::FEATURE_CONTROL, 0);
    assert!(
        Capabilities::probe(&t, 7).is_ok(),
        "unlocked: cpu_on locks it"
    );
}

#[test]
fn an_early_core_2_is_told_everything_that_it_lacks() {
    let mut t = skylake();
    // No TRUE MSRs, no secondary controls, default1 CR3 exits.
    t.msrs.retain(|m, _| !(0x48b..=0x490).contains(m));
    t.msrs.insert(
        msr::VMX_BASIC,
        0x005a_0800_0000_0007 & !(0x1fff << 32) | 1024 << 32,
    );
    t.msrs.insert(msr::VMX_PINBASED, 0x0000_003f_0000_0016);
    t.msrs.insert(msr::VMX_PROCBASED, 0x77f9_fffe_0401_e172);
    t.msrs.insert(msr::VMX_EXIT, 0x0003_efff_0003_6dff);
    t.msrs.insert(msr::VMX_ENTRY, 0x0000_1fff_0000_11ff);
    let e = Capabilities::probe(&t, 0).unwrap_err();
    assert_eq!(
        e,
        Missing::SECONDARY
            | Missing::EPT
            | Missing::UNRESTRICTED
            | Missing::TRUE_CONTROLS
            | Missing::EFER
            | Missing::PAT
    );
    assert!(e.to_string().contains("unrestricted guest"));
}

#[test]
fn ept_without_what_its_use_needs_is_refused() {
    for bit in [6, 14, 20] {
        let mut t = skylake();
        *t.msrs.get_mut(&msr::VMX_EPT_VPID_CAP).unwrap() &= !(1u64 << bit);
        assert_eq!(
            Capabilities::probe(&t, 7).unwrap_err(),
            Missing::EPT_KIND,
            "bit {bit}"
        );
    }
}

#[test]
fn every_missing_bit_has_its_own_words() {
    let mut seen = std::collections::BTreeSet::new();
    for one in Missing::all().iter() {
        assert!(seen.insert(one.to_string()), "{one:?}");
        assert!(!one.to_string().contains("several"), "{one:?}");
    }
}

#[test]
fn arch_capabilities_is_read_only_where_it_exists() {
    let mut t = skylake();
    t.edx7 =
        crate::mitigation::CPUID7_EDX_ARCH_CAPABILITIES | crate::mitigation::CPUID7_EDX_L1D_FLUSH;
    t.msrs
        .insert(msr::ARCH_CAPABILITIES, crate::mitigation::ARCH_CAP_RDCL_NO);
    assert!(!Capabilities::probe(&t, 7).unwrap().mitigations.flush_l1d);
    t.edx7 = crate::mitigation::CPUID7_EDX_L1D_FLUSH;
    assert!(Capabilities::probe(&t, 7).unwrap().mitigations.flush_l1d);
}
