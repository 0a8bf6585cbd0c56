use super::*;
use crate::cpuid::{CpuidCaps, CpuidConfig, Topology};

fn state(caps: CpuidCaps, vendor: Vendor) -> MsrState {
    let cfg = CpuidConfig {
        vendor,
        vcpu_id: 0,
        apic_id: 0,
        topology: Topology::default(),
        tsc_hz: 2_400_000_000,
        lapic_hz: 2_400_000_000,
        x2apic: true,
        hypervisor: true,
        kvm: None,
        phys_bits: 40,
        caps,
    };
    let host = |leaf, sub| match (leaf, sub) {
        (0, _) => [0x16, 0, 0, 0],
        (1, _) | (7, 0) | (0x8000_0001, _) => [0, !0, !0, !0],
        (0xd, 0) => [7, 832, 832, 0],
        (0xd, 1) => [0xf, 832, 0, 0],
        (0xd, 2) => [256, 576, 0, 0],
        (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
        (0x8000_0008, _) => [0x302e, 0, 0, 0],
        _ => [0; 4],
    };
    let t = CpuidTable::new(&cfg, host);
    let cfg = MsrConfig {
        vendor,
        microcode: 0x0200_0065,
        arch_capabilities: !0,
        tsc_hz: 2_400_000_000,
    };
    MsrState::new(&cfg, &t)
}

fn all() -> CpuidCaps {
    CpuidCaps {
        tsc_adjust: true,
        tsc_deadline: true,
        rdtscp: true,
        xcr0: 7,
        xsaves: true,
        spec_ctrl: true,
        ssbd: true,
        arch_capabilities: true,
        l1d_flush: true,
        ..CpuidCaps::default()
    }
}

fn intel() -> MsrState {
    state(all(), Vendor::Intel)
}

#[test]
fn msrs_of_features_that_cpuid_hides_do_not_exist() {
    let mut m = state(CpuidCaps::default(), Vendor::Intel);
    let hidden = [
        TSC_ADJUST,
        TSC_DEADLINE,
        TSC_AUX,
        SPEC_CTRL,
        ARCH_CAPABILITIES,
        XSS,
    ];
    for msr in hidden {
        assert_eq!(m.rdmsr(msr), MsrRead::Gp, "{msr:#x}");
    }
    for msr in hidden.into_iter().chain([PRED_CMD, FLUSH_CMD]) {
        assert_eq!(m.wrmsr(msr, 0), MsrWrite::Gp, "{msr:#x}");
    }
    let mut m = intel();
    assert_eq!(m.rdmsr(SPEC_CTRL), MsrRead::Backend);
    assert_eq!(m.wrmsr(SPEC_CTRL, 5), MsrWrite::Backend);
    assert_eq!(m.wrmsr(SPEC_CTRL, 8), MsrWrite::Gp);
    assert_eq!(m.rdmsr(PRED_CMD), MsrRead::Gp);
    assert_eq!(m.wrmsr(PRED_CMD, 1), MsrWrite::Backend);
    assert_eq!(m.wrmsr(FLUSH_CMD, 2), MsrWrite::Gp);
    assert_eq!(m.wrmsr(XSS, 1), MsrWrite::Gp);
}

#[test]
fn tsc_adjust_moves_with_the_tsc() {
    let mut m = intel();
    assert_eq!(m.wrmsr(TSC_ADJUST, 100), MsrWrite::TscAdjust(100));
    assert_eq!(
        m.wrmsr(TSC_ADJUST, 40),
        MsrWrite::TscAdjust(60u64.wrapping_neg())
    );
    assert_eq!(m.wrmsr(TSC, 12345), MsrWrite::Tsc);
    m.tsc_moved(2);
    assert_eq!(m.rdmsr(TSC_ADJUST), MsrRead::Value(42));
}

#[test]
fn pat_takes_only_memory_types() {
    for t in 0..=255u64 {
        let ok = matches!(t, 0 | 1 | 4 | 5 | 6 | 7);
        for i in 0..8 {
            assert_eq!(pat_valid(t << (8 * i)), ok, "{t} at {i}");
        }
    }
    assert!(pat_valid(0x0007_0406_0007_0406));
    assert_eq!(intel().wrmsr(PAT, 2), MsrWrite::Gp);
}

#[test]
fn mtrrs_read_back_and_refuse_reserved_bits() {
    let mut m = intel();
    assert_eq!(m.rdmsr(MTRR_CAP), MsrRead::Value(0x50a));
    assert_eq!(m.wrmsr(MTRR_CAP, 0x50a), MsrWrite::Gp);
    assert_eq!(m.rdmsr(MTRR_DEF_TYPE), MsrRead::Value(0xc06));
    assert_eq!(m.wrmsr(MTRR_DEF_TYPE, 0xc02), MsrWrite::Gp);
    assert_eq!(m.wrmsr(MTRR_DEF_TYPE, 0x1c06), MsrWrite::Gp);
    assert_eq!(m.wrmsr(MTRR_DEF_TYPE, 0x800), MsrWrite::Done);
    assert_eq!(m.rdmsr(MTRR_DEF_TYPE), MsrRead::Value(0x800));
    for (n, msr) in (MTRR_VAR_FIRST..=MTRR_VAR_LAST).enumerate() {
        let v = if n % 2 == 0 {
            0x12_3456_7006
        } else {
            0xff_ffff_f800
        };
        assert_eq!(m.wrmsr(msr, v), MsrWrite::Done);
        assert_eq!(m.rdmsr(msr), MsrRead::Value(v));
        // Beyond the 40 bits of the guest's physical addresses; reserved.
        assert_eq!(m.wrmsr(msr, v | 1 << 40), MsrWrite::Gp);
        assert_eq!(m.wrmsr(msr, v | 1 << 9), MsrWrite::Gp);
    }
    assert_eq!(m.rdmsr(0x259), MsrRead::Value(0));
    assert_eq!(m.wrmsr(0x26f, 0x0606_0606_0606_0606), MsrWrite::Done);
    assert_eq!(m.wrmsr(0x26f, 0x0606_0306_0606_0606), MsrWrite::Gp);
    assert_eq!(m.rdmsr(0x26f), MsrRead::Value(0x0606_0606_0606_0606));
}

#[test]
fn no_machine_check_bank_exists() {
    let mut m = intel();
    assert_eq!(m.rdmsr(MCG_CAP), MsrRead::Value(0));
    assert_eq!(m.wrmsr(MCG_STATUS, 0), MsrWrite::Done);
    for msr in MC_FIRST..=MC_LAST {
        assert_eq!(m.rdmsr(msr), MsrRead::Gp);
        assert_eq!(m.wrmsr(msr, 0), MsrWrite::Gp);
    }
}

#[test]
fn misc_enable_as_kvm_unit_tests_write_it() {
    let mut m = intel();
    let MsrRead::Value(old) = m.rdmsr(MISC_ENABLE) else {
        panic!()
    };
    let v = 0x4_00c5_0809 & !0x1880 | old & 0x1880;
    assert_eq!(m.wrmsr(MISC_ENABLE, v), MsrWrite::Done);
    assert_eq!(m.rdmsr(MISC_ENABLE), MsrRead::Value(v));
}

#[test]
fn addresses_must_be_canonical() {
    let mut m = intel();
    for msr in [
        LSTAR,
        CSTAR,
        FS_BASE,
        GS_BASE,
        KERNEL_GS_BASE,
        SYSENTER_ESP,
        SYSENTER_EIP,
    ] {
        assert_eq!(m.wrmsr(msr, 0xffff_8000_0000_0000), MsrWrite::Backend);
        assert_eq!(m.wrmsr(msr, 0x0000_8000_0000_0000), MsrWrite::Gp);
    }
    assert_eq!(m.wrmsr(SFMASK, 1 << 32), MsrWrite::Gp);
}

#[test]
fn efer() {
    let mut m = intel();
    assert_eq!(m.wrmsr(EFER, 0xd01), MsrWrite::Efer);
    assert_eq!(m.wrmsr(EFER, 1 << 12), MsrWrite::Gp);
    assert_eq!(m.wrmsr(EFER, 1 << 14), MsrWrite::Gp);
    assert_eq!(
        state(all(), Vendor::Amd).wrmsr(EFER, 1 << 14),
        MsrWrite::Efer
    );
    assert!(efer_change_allowed(0, 0x100, 0x11));
    assert!(!efer_change_allowed(0, 0x100, 0x8000_0011));
    assert!(efer_change_allowed(0x500, 0xd01, 0x8000_0011));
}

#[test]
fn what_nobody_knows_goes_to_userland_and_what_others_hold_goes_to_them() {
    let mut m = intel();
    for msr in [0x606, 0xc24, 0xdead_beef, K8_HWCR] {
        assert_eq!(m.rdmsr(msr), MsrRead::Unknown, "{msr:#x}");
        assert_eq!(m.wrmsr(msr, 0), MsrWrite::Unknown, "{msr:#x}");
    }
    assert_eq!(m.rdmsr(0x80b), MsrRead::X2Apic(0xb));
    assert_eq!(m.rdmsr(APIC_BASE), MsrRead::ApicBase);
    assert_eq!(m.wrmsr(TSC_DEADLINE, 1), MsrWrite::TscDeadline);
    assert_eq!(m.rdmsr(FEATURE_CONTROL), MsrRead::Value(1));
    assert_eq!(m.wrmsr(FEATURE_CONTROL, 5), MsrWrite::Gp);
    assert_eq!(m.rdmsr(BIOS_SIGN_ID), MsrRead::Value(0x0200_0065_0000_0000));
    let mut a = state(all(), Vendor::Amd);
    assert_eq!(a.rdmsr(K8_VM_CR), MsrRead::Value(0x18));
    assert_eq!(a.wrmsr(0xc001_001f, 1), MsrWrite::Done);
    assert_eq!(a.rdmsr(FEATURE_CONTROL), MsrRead::Unknown);
}

#[test]
fn arch_capabilities_promise_no_further_msr() {
    let MsrRead::Value(v) = intel().rdmsr(ARCH_CAPABILITIES) else {
        panic!()
    };
    assert_eq!(v & (1 << 7 | 1 << 10), 0);
    assert_eq!(v & 0x2b, 0x2b);
}
