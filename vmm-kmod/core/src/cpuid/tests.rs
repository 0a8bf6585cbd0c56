use super::*;

/// A Skylake-X as Bochs and Linux know it, every optional bit set.
fn host(leaf: u32, sub: u32) -> Regs {
    match (leaf, sub) {
        (0, _) => [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
        (1, _) => [0x0005_0654, 0x0720_0800, 0xffff_ffff, 0xffff_ffff],
        (2, _) => [0x7603_6301, 0x00f0_b5ff, 0, 0x00c3_0000],
        (4, 0) => [0x1c00_4121, 0x01c0_003f, 0x3f, 0],
        (4, 1) => [0x1c00_4122, 0x01c0_003f, 0x3f, 0],
        (4, 2) => [0x1c00_4143, 0x03c0_003f, 0x3ff, 0],
        (4, 3) => [0x1c03_c163, 0x0280_003f, 0x4fff, 4],
        (7, 0) => [0, 0xffff_ffff, 0xffff_ffff, 0xffff_ffff],
        (0xa, _) => [0x0730_0404, 0, 0, 0x603],
        (0xd, 0) => [0xffff_ffff, 2696, 2696, 0],
        (0xd, 1) => [0xf, 2568, 0x100, 0],
        (0xd, 2) => [256, 576, 0, 0],
        (0xd, 5) => [64, 1088, 0, 0],
        (0xd, 6) => [512, 1152, 2, 0],
        (0xd, 7) => [1024, 1664, 2, 0],
        (0xd, 9) => [8, 2688, 0, 0],
        (0xd, 18) => [8192, 2752, 0, 0],
        (0x14, _) => [1, 0xf, 7, 0],
        (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
        (0x8000_0001, _) => [0, 0, 0xffff_ffff, 0xffff_ffff],
        (0x8000_0007, _) => [0, 0, 0, 0],
        (0x8000_0008, _) => [0x3930, 0, 0, 0],
        _ => ZERO,
    }
}

fn config() -> CpuidConfig {
    CpuidConfig {
        vendor: Vendor::Intel,
        vcpu_id: 0,
        apic_id: 0,
        topology: Topology::default(),
        tsc_hz: 2_399_999_871,
        lapic_hz: lapic_timer_hz(2_399_999_871),
        x2apic: true,
        hypervisor: true,
        kvm: None,
        phys_bits: 0,
        caps: CpuidCaps {
            invpcid: true,
            pcid: true,
            rdtscp: true,
            tsc_deadline: true,
            tsc_adjust: true,
            invariant_tsc: true,
            gib_pages: true,
            xcr0: !0,
            ..CpuidCaps::default()
        },
    }
}

const NOW: DynState = DynState {
    osxsave: false,
    xcr0: 1,
    xss: 0,
    apic_enabled: true,
};

#[test]
fn features_that_nothing_stands_behind_are_hidden() {
    let t = CpuidTable::new(&config(), host);
    let [_, _, c, d] = t.get(1, 0, &NOW);
    for bit in [2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 18, 27] {
        assert_eq!(c >> bit & 1, 0, "leaf 1 ECX bit {bit}");
    }
    for bit in [18, 21, 22, 29, 31] {
        assert_eq!(d >> bit & 1, 0, "leaf 1 EDX bit {bit}");
    }
    let [_, b, c, d] = t.get(7, 0, &NOW);
    for bit in [2, 12, 14, 15, 25] {
        assert_eq!(b >> bit & 1, 0, "leaf 7 EBX bit {bit}");
    }
    for bit in [3, 4, 5, 7, 16, 23, 31] {
        assert_eq!(c >> bit & 1, 0, "leaf 7 ECX bit {bit}");
    }
    for bit in [5, 15, 18, 20, 22, 24, 25, 26, 27, 28, 29, 31] {
        assert_eq!(d >> bit & 1, 0, "leaf 7 EDX bit {bit}");
    }
    assert_eq!(t.get(5, 0, &NOW), ZERO);
    assert_eq!(t.get(0xa, 0, &NOW), ZERO);
    assert_eq!(t.get(0x14, 0, &NOW), ZERO);
    let [_, _, c, _] = t.get(0x8000_0001, 0, &NOW);
    assert_eq!(c & (1 << 2), 0);
}

#[test]
fn what_the_monitor_emulates_is_there() {
    let t = CpuidTable::new(&config(), host);
    let [_, _, c, d] = t.get(1, 0, &NOW);
    for bit in [17, 21, 24, 26, 28, 31] {
        assert_eq!(c >> bit & 1, 1, "leaf 1 ECX bit {bit}");
    }
    for bit in [7, 9, 12, 14, 16] {
        assert_eq!(d >> bit & 1, 1, "leaf 1 EDX bit {bit}");
    }
    let [_, b, _, d] = t.get(7, 0, &NOW);
    assert_eq!(b >> 1 & 1, 1);
    assert_eq!(d >> 10 & 1, 1);
    assert_eq!(t.get(6, 0, &NOW), [4, 0, 0, 0]);
    assert_eq!(t.get(0x8000_0007, 0, &NOW), [0, 0, 0, 0x100]);
}

#[test]
fn osxsave_and_apic_follow_the_guest() {
    let t = CpuidTable::new(&config(), host);
    let on = DynState {
        osxsave: true,
        apic_enabled: false,
        ..NOW
    };
    let [_, _, c, d] = t.get(1, 0, &on);
    assert_eq!((c >> 27 & 1, d >> 9 & 1), (1, 0));
}

#[test]
fn leaf_0x15_states_the_frequency_exactly_as_freebsd_and_linux_compute_it() {
    for tsc in [
        50_000_000,
        1_000_000_000,
        2_399_999_871,
        3_700_000_000,
        4_300_000_000,
        5_000_000_001,
    ] {
        let cfg = CpuidConfig {
            tsc_hz: tsc,
            lapic_hz: lapic_timer_hz(tsc),
            ..config()
        };
        let t = CpuidTable::new(&cfg, host);
        let [den, num, crystal, _] = t.get(0x15, 0, &NOW);
        assert_eq!(u64::from(crystal), cfg.lapic_hz);
        let freebsd = u64::from(crystal) * u64::from(num) / u64::from(den);
        assert!(freebsd.abs_diff(tsc) <= 1, "{freebsd} {tsc}");
        let linux = (crystal / 1000).checked_mul(num).unwrap() / den;
        // Linux rounds the crystal to kHz first.
        assert!(u64::from(linux).abs_diff(tsc / 1000) <= 2, "{linux} {tsc}");
        assert!(t.max_basic() >= 0x16);
    }
}

#[test]
fn a_lapic_clock_that_leaf_0x15_cannot_relate_exactly_hides_the_leaf() {
    let cfg = CpuidConfig {
        lapic_hz: 25_000_000,
        ..config()
    };
    assert_eq!(CpuidTable::new(&cfg, host).get(0x15, 0, &NOW), ZERO);
    let cfg = CpuidConfig {
        tsc_hz: 2_400_000_000,
        lapic_hz: 25_000_000,
        ..config()
    };
    assert_eq!(
        CpuidTable::new(&cfg, host).get(0x15, 0, &NOW),
        [1, 96, 25_000_000, 0]
    );
}

#[test]
fn hypervisor_leaves() {
    let t = CpuidTable::new(&config(), host);
    let [max, b, c, d] = t.get(0x4000_0000, 0, &NOW);
    let mut s = std::vec::Vec::new();
    for r in [b, c, d] {
        s.extend_from_slice(&r.to_le_bytes());
    }
    assert_eq!(s, b"bhyve bhyve ");
    assert_eq!(max, 0x4000_0010);
    assert_eq!(t.get(0x4000_0010, 0, &NOW)[0], 2_400_000);
    assert_eq!(t.get(0x4000_0100, 0, &NOW), ZERO);
    let pv = CpuidConfig {
        kvm: Some(Features::EOI | Features::CLOCK),
        ..config()
    };
    let pv = CpuidTable::new(&pv, host);
    assert_eq!(pv.get(0x4000_0000, 0, &NOW), [max, b, c, d]);
    let [_, b, c, d] = pv.get(0x4000_0100, 0, &NOW);
    assert_eq!([b, c, d], [0x4b4d_564b, 0x564b_4d56, 0x4d]);
    assert_eq!(pv.get(0x4000_0101, 0, &NOW), [0x48, 0, 0, 0]);
    assert_eq!(pv.get(0x4000_0102, 0, &NOW), ZERO);
    let [_, b, _, _] = t.get(0x4000_0000, 0, &NOW);
    let hidden = CpuidConfig {
        hypervisor: false,
        ..config()
    };
    let t = CpuidTable::new(&hidden, host);
    assert_eq!(t.get(1, 0, &NOW)[2] >> 31, 0);
    assert_ne!(t.get(0x4000_0000, 0, &NOW)[1], b);
}

#[test]
fn topology_of_two_sockets_four_cores_two_threads() {
    let cfg = CpuidConfig {
        apic_id: 13,
        vcpu_id: 13,
        topology: Topology {
            sockets: 2,
            cores: 4,
            threads: 2,
        },
        ..config()
    };
    let t = CpuidTable::new(&cfg, host);
    let [_, b, _, d] = t.get(1, 0, &NOW);
    assert_eq!((b >> 24, b >> 16 & 0xff, d >> 28 & 1), (13, 8, 1));
    assert_eq!(t.get(0xb, 0, &NOW), [1, 2, 0x100, 13]);
    assert_eq!(t.get(0xb, 1, &NOW), [3, 8, 0x201, 13]);
    assert_eq!(t.get(0xb, 2, &NOW), [0, 0, 2, 13]);
    let l1 = t.get(4, 0, &NOW)[0];
    assert_eq!((l1 >> 14 & 0xfff, l1 >> 26), (1, 3));
    let l3 = t.get(4, 3, &NOW)[0];
    assert_eq!((l3 >> 14 & 0xfff, l3 >> 26), (7, 3));
    assert_eq!(t.get(4, 4, &NOW), ZERO);
}

#[test]
fn xsave_sizes_follow_xcr0() {
    let t = CpuidTable::new(&config(), host);
    assert_eq!(t.xcr0_allowed(), 0xe7);
    let at = |xcr0| DynState { xcr0, ..NOW };
    assert_eq!(t.get(0xd, 0, &at(3)), [0xe7, 576, 2688, 0]);
    assert_eq!(t.get(0xd, 0, &at(7))[1], 832);
    assert_eq!(t.get(0xd, 0, &at(0xe7))[1], 2688);
    let sub1 = t.get(0xd, 1, &at(0xe7));
    // 576 + 256 + 64, aligned to 896, + 512 + 1024.
    assert_eq!((sub1[0], sub1[1]), (7, 2432));
    assert_eq!(t.get(0xd, 9, &NOW), ZERO);
    assert_eq!(t.get(0xd, 18, &NOW), ZERO);
}

#[test]
fn without_avx_512_state_no_avx_512_feature() {
    let caps = CpuidCaps {
        xcr0: 7,
        ..config().caps
    };
    let t = CpuidTable::new(&CpuidConfig { caps, ..config() }, host);
    let b = t.get(7, 0, &NOW)[1];
    assert_eq!(b & 0xd023_0000 & !(1 << 20), 0);
    assert_eq!(b >> 5 & 1, 1);
    let caps = CpuidCaps {
        xcr0: 0,
        ..config().caps
    };
    let t = CpuidTable::new(&CpuidConfig { caps, ..config() }, host);
    assert_eq!(t.get(1, 0, &NOW)[2] & (1 << 26 | 1 << 28 | 1 << 12), 0);
    assert_eq!(t.get(7, 0, &NOW)[1] >> 5 & 1, 0);
    assert_eq!(t.get(0xd, 0, &NOW), ZERO);
}

#[test]
fn leaves_beyond_the_highest() {
    let t = CpuidTable::new(&config(), host);
    assert_eq!(t.get(0x17, 0, &NOW), t.get(0x16, 0, &NOW));
    assert_eq!(t.get(0x8000_0009, 0, &NOW), t.get(0x16, 0, &NOW));
    assert_eq!(t.get(0xffff_ffff, 0, &NOW), t.get(0x16, 0, &NOW));
    let amd = CpuidConfig {
        vendor: Vendor::Amd,
        ..config()
    };
    let t = CpuidTable::new(&amd, host);
    assert_eq!(t.get(0x2000_0000, 0, &NOW), ZERO);
}
