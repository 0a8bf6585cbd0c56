use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::AtomicU32;

use super::*;
use crate::apicbus::{ApicMessage, DeliveryMode, Destination, MsiError, deliver};

type L<'a> = Lapic<&'a Mailbox>;

fn config(bsp: bool) -> LapicConfig {
    LapicConfig {
        to_apic: Ratio::new(1, 1),
        from_apic: Ratio::new(1, 1),
        min_interval: 0,
        phys_bits: 46,
        x2apic: true,
        bsp,
    }
}

fn boxes(n: u32) -> Vec<Mailbox> {
    (0..n).map(Mailbox::new).collect()
}

fn lapics(boxes: &[Mailbox]) -> Vec<L<'_>> {
    boxes
        .iter()
        .map(|m| {
            let mut l = Lapic::new(Box::default(), m, config(m.id() == 0));
            assert_eq!(l.write(reg::SVR, 0x1ff, 0), Effect::TimerChanged);
            l
        })
        .collect()
}

fn one(mailbox: &Mailbox) -> L<'_> {
    let mut l = Lapic::new(Box::default(), mailbox, config(true));
    let _ = l.write(reg::SVR, 0x1ff, 0);
    l
}

fn x2(l: &mut L<'_>) {
    let _ = l.set_apic_base(l.apic_base() | APIC_BASE_X2APIC).unwrap();
}

/// Routes and reports who received and who was kicked.
fn route(boxes: &[Mailbox], message: ApicMessage) -> (usize, Vec<usize>) {
    let mut kicked = Vec::new();
    let n = deliver(boxes, &message, &AtomicU32::new(u32::MAX), |i| {
        kicked.push(i)
    });
    (n, kicked)
}

fn ipi(effect: Effect) -> ApicMessage {
    match effect {
        Effect::Ipi(m) => m,
        other => panic!("no IPI but {other:?}"),
    }
}

#[test]
fn power_up_state_is_the_manuals() {
    let m = Mailbox::new(3);
    let mut l: L<'_> = Lapic::new(Box::default(), &m, config(false));
    assert_eq!(l.apic_base(), 0xfee0_0800);
    assert_eq!(l.read(reg::ID, 0), 3 << 24);
    assert_eq!(l.read(reg::SVR, 0), 0xff);
    assert_eq!(l.read(reg::DFR, 0), u32::MAX);
    assert_eq!(l.read(reg::VERSION, 0) & 0xff, 0x15);
    for lvt in [0x2f0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370] {
        assert_eq!(l.read(lvt, 0), 0x1_0000);
    }
    // Software-disabled: an LVT entry cannot be unmasked, fixed IPIs vanish.
    let _ = l.write(reg::LVT_LINT0, 0x700, 0);
    assert_eq!(l.read(reg::LVT_LINT0, 0), 0x1_0700);
    let b = [m];
    let msg = ApicMessage {
        dest: Destination::Physical(3),
        mode: DeliveryMode::Fixed,
        vector: 0x40,
        level: false,
    };
    assert_eq!(route(&b, msg), (0, Vec::new()));
    assert!(!b[0].pending());
}

#[test]
fn priorities_nest_and_eoi_ends_the_highest() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    assert!(m.post(0x31, false));
    assert!(!m.post(0x52, false), "one kick is enough");
    assert_eq!(l.pending(), None, "not taken over yet");
    assert!(l.sync());
    assert!(!l.sync());
    assert_eq!(l.pending(), Some(0x52));
    l.accept(0x52);
    assert_eq!(l.read(reg::PPR, 0), 0x50);
    assert_eq!(l.pending(), None, "0x31 is of a lower class");
    assert!(m.post(0x61, false));
    l.sync();
    assert_eq!(l.pending(), Some(0x61));
    l.accept(0x61);
    assert_eq!(l.write(reg::EOI, 0, 0), Effect::None);
    assert_eq!(l.read(reg::ISR + 0x20, 0), 1 << (0x52 - 0x40));
    assert_eq!(l.write(reg::EOI, 0, 0), Effect::None);
    assert_eq!(l.pending(), Some(0x31));
    // TPR of the same class blocks it, and says when to look again.
    l.set_cr8(3);
    assert_eq!(l.read(reg::TPR, 0), 0x30);
    assert_eq!(l.pending(), None);
    assert_eq!(l.tpr_threshold(), 3);
    let _ = l.write(reg::TPR, 0x2f, 0);
    assert_eq!(l.cr8(), 2);
    assert_eq!(l.tpr_threshold(), 0);
    assert_eq!(l.pending(), Some(0x31));
    assert_eq!(
        l.write(reg::EOI, 0, 0),
        Effect::None,
        "an EOI without an interrupt"
    );
}

#[test]
fn trigger_mode_follows_each_delivery_and_level_ends_are_told() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    for level in [false, true, true, false] {
        m.post(0x79, level);
        l.sync();
        assert_eq!(l.read(reg::TMR + 0x30, 0) & (1 << 25) != 0, level);
        assert_eq!(l.eoi_exit_bitmap()[1] & (1 << (0x79 - 64)) != 0, level);
        let v = l.pending().unwrap();
        l.accept(v);
        let expect = if level {
            Effect::Eoi(0x79)
        } else {
            Effect::None
        };
        assert_eq!(l.eoi_virtualized(0x79), expect);
        assert_eq!(l.write(reg::EOI, 0, 0), expect);
    }
}

#[test]
fn virtual_interrupt_delivery_is_told_what_changed() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    let _ = l.take_changes();
    assert_eq!((l.rvi(), l.svi()), (0, 0));
    m.post(0x45, true);
    l.sync();
    assert_eq!(l.take_changes(), Changes::IRR | Changes::TMR);
    assert_eq!(l.rvi(), 0x45);
    m.post(0x46, false);
    l.sync();
    assert_eq!(l.take_changes(), Changes::IRR);
    l.accept(0x46);
    assert_eq!((l.rvi(), l.svi()), (0x45, 0x46));
    // A self-IPI that the CPU virtualized: nobody told us.
    let _ = l.write(reg::EOI, 0, 0);
    l.accept(0x45);
    let _ = l.write(reg::EOI, 0, 0);
    l.use_virtual_delivery(true);
    assert_eq!(l.pending(), None);
    l.page().set_bit(reg::IRR, 0x91, true);
    assert_eq!(l.pending(), Some(0x91));
}

#[test]
fn one_shot_timer_counts_down_and_fires_once() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    let _ = l.write(reg::LVT_TIMER, 0xee, 100);
    let _ = l.write(reg::TIMER_DCR, 0xb, 100);
    assert_eq!(l.write(reg::TIMER_ICR, 0x10000, 1000), Effect::TimerChanged);
    assert_eq!(l.timer_deadline(), Some(1000 + 0x10000));
    assert_eq!(l.read(reg::TIMER_CCR, 1000 + 0x8000), 0x8000);
    assert!(!l.timer_tick(1000 + 0xffff));
    assert_eq!(l.read(reg::TIMER_CCR, 1000 + 0xffff), 1);
    assert!(l.timer_tick(1000 + 0x10000));
    assert_eq!(l.pending(), Some(0xee));
    assert_eq!(l.read(reg::TIMER_CCR, 1000 + 0x10000), 0);
    assert_eq!(l.timer_deadline(), None);
    // The count stays at zero when the mode becomes periodic.
    let _ = l.write(reg::LVT_TIMER, 0x2_00ee, 0x20000);
    assert_eq!(l.read(reg::TIMER_CCR, 0x20001), 0);
    assert_eq!(l.read(reg::TIMER_ICR, 0x20001), 0x10000);
}

#[test]
fn divider_is_powers_of_two() {
    for (dcr, divisor) in [
        (0u32, 2u64),
        (1, 4),
        (2, 8),
        (3, 16),
        (8, 32),
        (9, 64),
        (10, 128),
        (11, 1),
    ] {
        let m = Mailbox::new(0);
        let mut l = one(&m);
        let _ = l.write(reg::LVT_TIMER, 0x40, 0);
        let _ = l.write(reg::TIMER_DCR, dcr, 0);
        let _ = l.write(reg::TIMER_ICR, 1000, 0);
        assert_eq!(l.timer_deadline(), Some(1000 * divisor));
        assert_eq!(l.read(reg::TIMER_CCR, 250 * divisor), 750);
    }
}

#[test]
fn periodic_timer_neither_drifts_nor_storms() {
    let m = Mailbox::new(0);
    let mut l: L<'_> = Lapic::new(
        Box::default(),
        &m,
        LapicConfig {
            to_apic: Ratio::new(1, 3),
            from_apic: Ratio::new(3, 1),
            ..config(true)
        },
    );
    let _ = l.write(reg::SVR, 0x1ff, 0);
    let _ = l.write(reg::TIMER_DCR, 0xb, 0);
    let _ = l.write(reg::LVT_TIMER, 0x2_0040, 0);
    let _ = l.write(reg::TIMER_ICR, 1000, 7);
    for n in 1..=1000u64 {
        let due = l.timer_deadline().unwrap();
        assert!(due.abs_diff(7 + 3000 * n) <= 2, "{n}: {due}");
        assert!(!l.timer_tick(due - 1));
        assert!(l.timer_tick(due));
    }
    // After a long sleep: one interrupt, then on the old grid.
    let late = 7 + 3000 * 5000 + 10;
    assert!(l.timer_tick(late));
    assert!(!l.timer_tick(late));
    assert!(l.timer_deadline().unwrap().abs_diff(7 + 3000 * 5001) <= 2);
    // Counting goes on across a switch to one-shot.
    let half = 7 + 3000 * 5000 + 1500;
    let _ = l.write(reg::LVT_TIMER, 0x40, half);
    assert!(l.read(reg::TIMER_CCR, half).abs_diff(500) <= 1);
    assert!(l.timer_tick(7 + 3000 * 5001 + 2));
    assert_eq!(l.timer_deadline(), None);
}

#[test]
fn a_masked_timer_counts_but_wakes_nobody() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    let _ = l.write(reg::TIMER_DCR, 0xb, 0);
    let _ = l.write(reg::LVT_TIMER, 0x3_0040, 0);
    let _ = l.write(reg::TIMER_ICR, 100, 0);
    assert_eq!(l.timer_deadline(), None);
    assert_eq!(l.read(reg::TIMER_CCR, 250), 50);
    assert_eq!(l.pending(), None);
    let _ = l.write(reg::LVT_TIMER, 0x2_0040, 260);
    assert_eq!(l.pending(), None, "what ran out while masked is lost");
    assert_eq!(l.timer_deadline(), Some(300));
}

#[test]
fn a_tiny_period_is_stretched() {
    let m = Mailbox::new(0);
    let mut l: L<'_> = Lapic::new(
        Box::default(),
        &m,
        LapicConfig {
            min_interval: 50_000,
            ..config(true)
        },
    );
    let _ = l.write(reg::SVR, 0x1ff, 0);
    let _ = l.write(reg::LVT_TIMER, 0x2_0040, 0);
    let _ = l.write(reg::TIMER_ICR, 1, 0);
    assert!(l.timer_tick(10));
    assert_eq!(l.timer_deadline(), Some(50_010));
}

#[test]
fn tsc_deadline_fires_at_once_if_past_and_reads_zero() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    assert_eq!(l.set_tsc_deadline(500, 500, 400), Effect::TimerChanged);
    assert_eq!(l.tsc_deadline(400), 0, "not in this mode");
    let _ = l.write(reg::LVT_TIMER, 0x4_00ef, 400);
    let _ = l.set_tsc_deadline(0x1_0500, 500, 400);
    assert_eq!(l.tsc_deadline(400), 0x1_0500);
    assert_eq!(l.timer_deadline(), Some(500));
    assert_eq!(l.write(reg::TIMER_ICR, 77, 400), Effect::TimerChanged);
    assert_eq!(l.read(reg::TIMER_ICR, 400), 0);
    assert_eq!(l.tsc_deadline(500), 0);
    assert_eq!(l.pending(), Some(0xef));
    l.accept(0xef);
    let _ = l.write(reg::EOI, 0, 500);
    let _ = l.set_tsc_deadline(0x1_0600, 600, 700);
    assert_eq!(l.pending(), Some(0xef));
    // Leaving the mode disarms.
    let _ = l.set_tsc_deadline(0x1_0900, 900, 700);
    let _ = l.write(reg::LVT_TIMER, 0xef, 700);
    assert_eq!(l.timer_deadline(), None);
}

#[test]
fn apic_base_walks_only_along_the_legal_edges() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    let base = 0xfee0_0000 | APIC_BASE_BSP;
    let (en, ext) = (APIC_BASE_ENABLE, APIC_BASE_X2APIC);
    l.set_cr8(5);
    assert_eq!(l.set_apic_base(base | ext), Err(Gp0));
    assert_eq!(l.set_apic_base(base | en | ext), Ok(Effect::ModeChanged));
    assert_eq!(l.set_apic_base(base | ext), Err(Gp0));
    assert_eq!(l.set_apic_base(base | en), Err(Gp0));
    assert_eq!(l.read(reg::VERSION, 0), u32::MAX, "no MMIO in x2APIC mode");
    assert_eq!(l.set_apic_base(base), Ok(Effect::ModeChanged));
    assert!(!l.present());
    assert_eq!(l.read(reg::VERSION, 0), u32::MAX);
    let _ = l.write(reg::TPR, 0xff, 0);
    assert_eq!(l.cr8(), 5, "CR8 outlives the APIC");
    l.set_cr8(7);
    assert_eq!(l.cr8(), 7);
    l.set_cr8(5);
    assert_eq!(l.set_apic_base(base | ext), Err(Gp0));
    assert_eq!(l.set_apic_base(base | en | ext), Err(Gp0));
    assert_eq!(l.set_apic_base(base | en), Ok(Effect::ModeChanged));
    assert_eq!(l.read(reg::TPR, 0), 0x50);
    assert_eq!(l.read(reg::SVR, 0), 0xff, "reset by disabling");
    assert_eq!(l.set_apic_base(base | en | 1), Err(Gp0));
    assert_eq!(l.set_apic_base(base | en | 1 << 46), Err(Gp0));
    assert_eq!(
        l.set_apic_base(0xfed4_0000 | APIC_BASE_BSP | en),
        Ok(Effect::ModeChanged)
    );
    assert_eq!(l.base_gpa(), 0xfed4_0000);
}

#[test]
fn x2apic_msrs_fault_where_the_manual_says() {
    let m = Mailbox::new(0x123);
    let mut l = one(&m);
    assert_eq!(l.rdmsr(0x802, 0), Err(Gp0), "xAPIC mode");
    x2(&mut l);
    assert_eq!(l.rdmsr(0x802, 0), Ok(0x123));
    assert_eq!(l.rdmsr(0x80d, 0), Ok(0x12 << 16 | 1 << 3));
    for absent in [
        0x800, 0x80e, 0x831, 0x80b, 0x83f, 0x809, 0x80c, 0x840, 0x8ff,
    ] {
        assert_eq!(l.rdmsr(absent, 0), Err(Gp0), "{absent:#x}");
    }
    for read_only in [
        0x802, 0x803, 0x80a, 0x80d, 0x80e, 0x810, 0x818, 0x820, 0x831, 0x839, 0x840,
    ] {
        assert_eq!(l.wrmsr(read_only, 0, 0), Err(Gp0), "{read_only:#x}");
    }
    for (msr, bad) in [
        (0x808, 0x100),
        (0x80b, 1),
        (0x828, 1),
        (0x80f, 0x1_0000),
        (0x832, 0x8_0000),
        (0x835, 0x2_0000),
        (0x837, 0x100),
        (0x83e, 4),
        (0x83f, 0x100),
        (0x830, 0x10_0000),
        (0x808, 1 << 32),
    ] {
        assert_eq!(l.wrmsr(msr, bad, 0), Err(Gp0), "{msr:#x} {bad:#x}");
    }
    assert_eq!(l.wrmsr(0x83f, 0xf1, 0), Ok(Effect::None));
    assert_eq!(l.pending(), Some(0xf1));
    let msg = ipi(l.wrmsr(0x830, 0x0000_1234_0000_0051, 0).unwrap());
    assert_eq!(msg.dest, Destination::Physical(0x1234));
    assert_eq!(l.rdmsr(0x830, 0), Ok(0x0000_1234_0000_0051));
    l.offer_x2apic(false);
    assert_eq!(l.read(reg::ID, 0), 0x2300_0000);
    assert_eq!(l.set_apic_base(l.apic_base() | APIC_BASE_X2APIC), Err(Gp0));
}

#[test]
fn errors_show_after_a_write_of_esr() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    let _ = l.write(reg::LVT_ERROR, 0xfe, 0);
    assert_eq!(
        l.write(reg::ICR_LOW, 0x4005, 0),
        Effect::None,
        "vector 5 is not sent"
    );
    assert_eq!(l.pending(), Some(0xfe));
    assert_eq!(l.read(reg::ESR, 0), 0);
    let _ = l.write(reg::ESR, 0, 0);
    assert_eq!(l.read(reg::ESR, 0), 0x20);
    m.post(9, false);
    l.sync();
    assert_eq!(l.read(reg::ESR, 0), 0x20);
    let _ = l.write(reg::ESR, 0, 0);
    assert_eq!(l.read(reg::ESR, 0), 0x40);
    let _ = l.write(reg::ESR, 0, 0);
    assert_eq!(l.read(reg::ESR, 0), 0);
}

#[test]
fn local_interrupts_go_by_their_lvt_or_past_a_disabled_apic() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    m.post_local(Lvt::Lint0);
    l.sync();
    assert!(!l.extint_pending(), "masked");
    assert_eq!(l.write(reg::LVT_LINT0, 0x700, 0), Effect::ExtintUnmasked);
    m.post_local(Lvt::Lint0);
    l.sync();
    assert!(l.extint_pending());
    l.extint_done(false);
    let _ = l.write(reg::LVT_LINT1, 0x400, 0);
    m.post_local(Lvt::Lint1);
    l.sync();
    assert!(l.take_nmi(false));
    let _ = l.write(reg::LVT_PERF, 0x55, 0);
    m.post_local(Lvt::Perf);
    l.sync();
    assert_eq!(l.pending(), Some(0x55));
    let _ = l.write(reg::SVR, 0xff, 0);
    assert_eq!(l.read(reg::LVT_LINT1, 0), 0x1_0400);
    m.post_local(Lvt::Lint0);
    m.post_local(Lvt::Lint1);
    l.sync();
    assert!(l.extint_pending() && l.take_nmi(false));
}

#[test]
fn two_nmis_are_two_but_only_one_waits_behind_a_handler() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    m.post_nmi();
    m.post_nmi();
    m.post_nmi();
    l.sync();
    assert!(l.take_nmi(false));
    assert!(l.take_nmi(false));
    assert!(!l.take_nmi(false));
    for _ in 0..10 {
        m.post_nmi();
        l.sync();
        assert!(!l.take_nmi(true));
    }
    assert!(l.take_nmi(false));
    assert!(!l.nmi_pending());
}

#[test]
fn init_and_sipi_start_a_processor() {
    let b = boxes(2);
    let mut l = lapics(&b);
    let init = {
        let _ = l[0].write(reg::ICR_HIGH, 1 << 24, 0);
        ipi(l[0].write(reg::ICR_LOW, 0xc500, 0))
    };
    b[1].post_sipi(0x11); // Nobody waits for this one.
    let (_, kicked) = route(&b, init);
    assert!(kicked.is_empty(), "still to look at the first");
    assert_eq!(
        l[0].write(reg::ICR_LOW, 0x8500, 0),
        Effect::None,
        "de-assert"
    );
    let sipi = ipi(l[0].write(reg::ICR_LOW, 0x4699, 0));
    route(&b, sipi);
    route(
        &b,
        ApicMessage {
            vector: 0x9a,
            ..sipi
        },
    );
    l[1].sync();
    assert!(l[1].take_init());
    l[1].init();
    assert_eq!(l[1].read(reg::SVR, 0), 0xff);
    assert_eq!(l[1].take_sipi(), Some(0x99));
    assert!(!l[1].take_init());
    assert_eq!(l[1].take_sipi(), None);
}

fn received(l: &mut [L<'_>], vector: u8) -> Vec<usize> {
    let mut who = Vec::new();
    for (i, l) in l.iter_mut().enumerate() {
        l.sync();
        if l.pending() == Some(vector) {
            l.accept(vector);
            let _ = l.write(reg::EOI, 0, 0);
            let _ = l.wrmsr(0x80b, 0, 0);
            who.push(i);
        }
    }
    who
}

#[test]
fn xapic_destinations() {
    let b = boxes(4);
    let mut l = lapics(&b);
    let send = |l: &mut Vec<L<'_>>, high: u32, low: u32| {
        let _ = l[1].write(reg::ICR_HIGH, high << 24, 0);
        let msg = ipi(l[1].write(reg::ICR_LOW, low | 0x40f1, 0));
        route(&b, msg);
        received(l, 0xf1)
    };
    assert_eq!(send(&mut l, 2, 0), [2]);
    assert_eq!(send(&mut l, 9, 0), [0usize; 0]);
    assert_eq!(send(&mut l, 0xff, 0), [0, 1, 2, 3]);
    assert_eq!(send(&mut l, 0, 1 << 18), [1]);
    assert_eq!(send(&mut l, 0, 2 << 18), [0, 1, 2, 3]);
    assert_eq!(send(&mut l, 0, 3 << 18), [0, 2, 3]);
    // Flat: one bit each for 0 to 2, none for 3.
    for (i, l) in l.iter_mut().take(3).enumerate() {
        let _ = l.write(reg::LDR, 1 << (24 + i), 0);
    }
    assert_eq!(send(&mut l, 0b101, 0x800), [0, 2]);
    assert_eq!(send(&mut l, 0xf8, 0x800), [0usize; 0]);
    assert_eq!(send(&mut l, 0xff, 0x800), [0, 1, 2, 3]);
    // Cluster: 0 and 1 in cluster 3, 2 in cluster 4.
    for (i, ldr) in [0x31, 0x32, 0x42, 0x48].into_iter().enumerate() {
        let _ = l[i].write(reg::DFR, 0x0fff_ffff, 0);
        let _ = l[i].write(reg::LDR, ldr << 24, 0);
    }
    assert_eq!(send(&mut l, 0x33, 0x800), [0, 1]);
    assert_eq!(send(&mut l, 0x42, 0x800), [2]);
    assert_eq!(send(&mut l, 0x4e, 0x800), [2, 3]);
    assert_eq!(send(&mut l, 0x52, 0x800), [0usize; 0]);
}

#[test]
fn x2apic_reaches_beyond_255() {
    let b = boxes(300);
    let mut l = lapics(&b);
    l.iter_mut().for_each(x2);
    let send = |l: &mut Vec<L<'_>>, high: u64, low: u64| {
        let msg = ipi(l[0].wrmsr(0x830, high << 32 | low | 0xf1, 0).unwrap());
        route(&b, msg);
        received(l, 0xf1)
    };
    assert_eq!(send(&mut l, 299, 0), [299]);
    assert_eq!(send(&mut l, 255, 0), [255]);
    assert_eq!(send(&mut l, 300, 0), [0usize; 0]);
    assert_eq!(send(&mut l, 0xffff_ffff, 0).len(), 300);
    assert_eq!(send(&mut l, 0x0012_0802, 0x800), [0x121, 0x12b]);
    assert_eq!(send(&mut l, 0, 0xc_0000).len(), 299);
    // An MSI reaches only eight bits' worth, and its 0xff is everyone.
    route(&b, ApicMessage::from_msi(0xfeef_f000, 0x40f1).unwrap());
    assert_eq!(received(&mut l, 0xf1).len(), 300);
}

#[test]
fn lowest_priority_picks_one_and_takes_turns() {
    let b = boxes(3);
    let mut l = lapics(&b);
    let turn = AtomicU32::new(0);
    let msg = ApicMessage {
        dest: Destination::All,
        mode: DeliveryMode::LowestPriority,
        vector: 0x51,
        level: false,
    };
    let next = |l: &mut Vec<L<'_>>| {
        assert_eq!(deliver(&b, &msg, &turn, |_| ()), 1);
        received(l, 0x51)
    };
    let mut order = Vec::new();
    for _ in 0..6 {
        order.extend(next(&mut l));
    }
    assert_eq!(order, [1, 2, 0, 1, 2, 0]);
    l[1].set_cr8(8);
    l[2].set_cr8(1);
    l[0].set_cr8(2);
    assert_eq!(next(&mut l), [2]);
    assert_eq!(next(&mut l), [2]);
    let _ = l[2].write(reg::SVR, 0xff, 0);
    assert_eq!(next(&mut l), [0]);
}

#[test]
fn msi_decoding() {
    let m = ApicMessage::from_msi(0xfee0_3000, 0x0041).unwrap();
    assert_eq!(m.dest, Destination::Physical(3));
    assert_eq!(
        (m.mode, m.vector, m.level),
        (DeliveryMode::Fixed, 0x41, false)
    );
    let m = ApicMessage::from_msi(0xfee0_300c, 0xc041).unwrap();
    assert_eq!(
        (m.dest, m.mode, m.level),
        (Destination::Logical(3), DeliveryMode::LowestPriority, true)
    );
    assert_eq!(
        ApicMessage::from_msi(0xfed0_0000, 0),
        Err(MsiError::Address)
    );
    assert_eq!(
        ApicMessage::from_msi(0x1_fee0_0000, 0),
        Err(MsiError::Address)
    );
    assert_eq!(
        ApicMessage::from_msi(0xfee0_0000, 0x541),
        Err(MsiError::DeliveryMode)
    );
    assert_eq!(
        ApicMessage::from_msi(0xfee0_0000, 0x341),
        Err(MsiError::DeliveryMode)
    );
}

#[test]
fn an_apic_write_exit_does_what_the_mmio_write_does() {
    let m = Mailbox::new(2);
    let mut l = one(&m);
    let write = |l: &mut L<'_>, offset: u16, value: u32| {
        l.page().set(offset, value);
        l.apic_write_done(offset, 0)
    };
    let _ = write(&mut l, reg::ID, 0x0700_0000);
    assert_eq!(l.read(reg::ID, 0), 2 << 24);
    let _ = write(&mut l, reg::LVT_LINT0, u32::MAX);
    assert_eq!(l.read(reg::LVT_LINT0, 0), 0x1_a7ff);
    let _ = write(&mut l, reg::SVR, 0xff);
    assert_eq!(m.mode() & Mode::ENABLED, Mode::empty());
    assert_eq!(l.read(reg::LVT_ERROR, 0), 0x1_0000);
    let _ = write(&mut l, reg::SVR, 0x1ff);
    assert_eq!(
        ipi(write(&mut l, reg::ICR_LOW, 0x4_0044)).dest,
        Destination::Myself(2)
    );
    let _ = write(&mut l, reg::LDR, 0x0123_4567);
    assert_eq!(m.ldr(), 0x0100_0000);
    let _ = write(&mut l, reg::ESR, 0xdead);
    assert_eq!(l.read(reg::ESR, 0), 0);
}

#[test]
fn a_cpu_that_takes_posted_vectors_by_itself_hides_nothing_else() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    assert_eq!(core::mem::align_of_val(&m), 64, "as a descriptor is");
    // Each comes while a notification is outstanding that ends no stay.
    type Post = fn(&Mailbox) -> bool;
    type Seen = fn(&mut L<'_>) -> bool;
    let others: [(Post, Seen); 6] = [
        (|m| m.post(0x62, true), |l| l.page().bit(reg::IRR, 0x62)),
        (Mailbox::post_nmi, |l| l.take_nmi(false)),
        (Mailbox::post_init, |l| l.take_init()),
        (|m| m.post_sipi(7), |l| l.take_sipi() == Some(7)),
        (Mailbox::post_extint, |l| l.extint_pending()),
        (Mailbox::poke, |_| true),
    ];
    for (post, seen) in others {
        assert!(m.post(0x41, false));
        assert!(post(&m), "the vCPU has to leave the guest");
        assert!(m.signalled());
        assert_eq!(m.process_posted(), [0, 0, 2, 0, 0, 0, 0, 0]);
        assert!(m.pending(), "still there");
        assert!(l.sync());
        assert!(seen(&mut l));
        assert!(!m.pending() && !m.signalled());
    }
    assert!(m.post(0x41, false));
    assert!(!m.post(0x43, false), "the notification is on its way");
    assert!(!m.signalled());
    assert_eq!(m.process_posted()[2], 0b1010);
    assert!(!m.pending());
}

#[test]
fn a_vector_that_is_no_longer_level_triggered_is_posted_after_tmr_has_followed() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    m.post(0x62, true);
    l.sync();
    assert!(l.page().bit(reg::TMR, 0x62));
    m.post(0x62, false);
    assert_eq!(m.process_posted(), [0; 8], "a CPU would leave TMR as it is");
    l.sync();
    assert!(l.page().bit(reg::IRR, 0x62) && !l.page().bit(reg::TMR, 0x62));
    m.post(0x62, false);
    assert_eq!(m.process_posted()[3], 1 << 2);
}

#[test]
fn nothing_is_left_behind_when_posters_race_with_a_cpu_that_takes_vectors_by_itself() {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
    use std::thread;

    for round in 0..50 {
        let m = Mailbox::new(0);
        let (notified, kicked, posters) = (
            AtomicBool::new(false),
            AtomicBool::new(false),
            AtomicU32::new(3),
        );
        // As a vCPU's kick does it.
        let deliver = |first: bool| {
            if first && m.signalled() {
                kicked.store(true, SeqCst);
            } else if first {
                notified.store(true, SeqCst);
            }
        };
        let (m, posters, deliver) = (&m, &posters, &deliver);
        // Before the posters: a reset drops what is on its way.
        let mut l = one(m);
        thread::scope(|scope| {
            for poster in 0..3u8 {
                scope.spawn(move || {
                    for n in 0..60 {
                        let vector = 32 + n * 3 + poster;
                        deliver(m.post(vector, poster == 2));
                        if n % 16 == round % 16 {
                            deliver(m.poke());
                        }
                    }
                    posters.fetch_sub(1, SeqCst);
                });
            }
            let mut seen = [0u32; 8];
            loop {
                let last = posters.load(SeqCst) == 0;
                let mut idle = true;
                if notified.swap(false, SeqCst) {
                    idle = false;
                    for (to, word) in seen.iter_mut().zip(m.process_posted()) {
                        *to |= word;
                    }
                }
                if kicked.swap(false, SeqCst) {
                    idle = false;
                    l.sync();
                }
                if last && idle {
                    break;
                }
                thread::yield_now();
            }
            assert!(!m.pending() && !m.signalled(), "round {round}");
            for vector in 32..212u16 {
                let (word, bit) = (vector / 32, 1 << (vector % 32));
                let all = seen[usize::from(word)] | l.page().get(reg::IRR + word * 16);
                assert!(all & bit != 0, "vector {vector} in round {round}");
            }
        });
    }
}

#[test]
fn avic_hears_of_what_decides_whether_it_can_be_used() {
    let boxes = boxes(2);
    let mut bsp = Lapic::new(Box::default(), &boxes[0], config(true));
    let mut ap = Lapic::new(Box::default(), &boxes[1], config(false));
    assert!(bsp.take_routes_changed() && !bsp.take_routes_changed());
    // The 8259 reaches a bootstrap processor whose APIC is off; nobody else's.
    assert!(bsp.virtual_wire() && !ap.virtual_wire());
    let changes = |l: &mut L<'_>, offset, value| {
        let _ = l.write(offset, value, 0);
        l.take_routes_changed()
    };
    assert!(changes(&mut bsp, reg::SVR, 0x1ff));
    assert!(!bsp.virtual_wire());
    assert!(changes(&mut bsp, reg::LDR, 1 << 24));
    assert!(changes(&mut bsp, reg::DFR, 0x0fff_ffff));
    assert!(!changes(&mut bsp, reg::LVT_LINT1, 0x400));
    assert!(!changes(&mut bsp, reg::TPR, 0x20));
    assert!(changes(&mut bsp, reg::LVT_LINT0, 0x700));
    assert!(bsp.virtual_wire());
    assert!(changes(&mut bsp, reg::LVT_LINT0, 0x1_0700));
    assert!(!bsp.virtual_wire());
    // An ExtINT by a message is one, too, until it is acknowledged.
    let _ = ap.take_routes_changed();
    boxes[1].post_extint();
    ap.sync();
    assert!(ap.take_routes_changed() && ap.virtual_wire());
    ap.extint_done(false);
    assert!(!ap.virtual_wire());
}

#[test]
fn an_ipi_that_the_cpu_has_sent_wakes_whom_it_addresses() {
    let boxes = boxes(4);
    let mut l = lapics(&boxes);
    for (i, l) in l.iter_mut().enumerate() {
        let _ = l.write(reg::LDR, 1 << (24 + i), 0);
    }
    let _ = l[3].write(reg::SVR, 0xff, 0);
    let mut addressed = |low: u32, high: u32| {
        let page = l[0].page();
        page.set(reg::ICR_HIGH, high << 24);
        // With the delivery status as CPUs may leave it.
        page.set(reg::ICR_LOW, low | 1 << 12);
        let message = l[0].ipi_sent()?;
        assert_eq!(l[0].read(reg::ICR_LOW, 0), low);
        let mut found = Vec::new();
        crate::apicbus::addressed(&boxes, message.dest, &mut |i| found.push(i));
        Some(found)
    };
    assert_eq!(addressed(0x4040, 1), Some([1].into()));
    assert_eq!(addressed(0x4840, 0b0110), Some([1, 2].into()));
    // All, and all but the sender; but one that is off takes none.
    assert_eq!(addressed(0x8_4040, 0), Some([0, 1, 2].into()));
    assert_eq!(addressed(0xc_4040, 0), Some([1, 2].into()));
    assert_eq!(addressed(0x4040, 3), Some([].into()));
    // Nothing was posted: the CPU has done that.
    assert!(l.iter().all(|l| !l.mailbox().pending()));
}

#[test]
fn only_edge_triggered_interrupts_are_handed_to_a_cpu_with_avic() {
    let m = Mailbox::new(0);
    let mut l = one(&m);
    m.post(0x41, false);
    m.post(0xf0, false);
    assert!(m.hand_over(l.page()));
    assert!(!m.pending());
    assert_eq!(l.rvi(), 0xf0);
    assert!(l.page().bit(reg::IRR, 0x41) && !l.page().bit(reg::IRR, 0x42));
    // The next one is told of again.
    assert!(m.post(0x42, false));
    // A level-triggered one changes TMR, which is the thread's.
    m.post(0x51, true);
    assert!(!m.hand_over(l.page()));
    assert!(l.page().bit(reg::IRR, 0x42) && !l.page().bit(reg::IRR, 0x51));
    assert!(m.poke());
    assert!(l.sync());
    assert!(l.page().bit(reg::IRR, 0x51) && l.page().bit(reg::TMR, 0x51));
    // So does an edge on a vector that was level-triggered.
    m.post(0x51, false);
    assert!(!m.hand_over(l.page()));
    assert!(m.poke() && l.sync());
    assert!(!l.page().bit(reg::TMR, 0x51));
    // Everything else is left to the thread, a mere request to look included.
    m.post_nmi();
    assert!(!m.hand_over(l.page()));
    assert!(l.sync() && l.nmi_pending());
    m.poke();
    assert!(!m.hand_over(l.page()));
    assert!(l.sync() && !l.sync());
}
