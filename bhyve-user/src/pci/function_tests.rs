use super::*;
use crate::machine::fake::{Event, Fake};

/// Answers every access with what and where it was.
struct Echo;
impl PciDevice for Echo {
    fn bar_read(&self, f: &PciFunction, bar: usize, offset: u64, size: u8) -> u64 {
        f.set_intx(offset == 4);
        (bar as u64) << 24 | offset << 8 | u64::from(size)
    }
    fn bar_write(&self, f: &PciFunction, _: usize, _: u64, _: u8, value: u64) {
        f.message(value as u16);
    }
}

struct Rig {
    f: Arc<PciFunction>,
    buses: Arc<Buses>,
    fake: Arc<Fake>,
}

fn rig() -> Rig {
    let fake = Fake::new();
    let machine: Arc<dyn Machine> = fake.clone();
    let buses = Arc::new(Buses::default());
    let router = Arc::new(Router::new(machine.clone(), 24));
    let route = router.allocate().unwrap();
    let mut plan = Blueprint::default();
    plan.config.identify(0x1af4, 0x1042, 1, 0);
    plan.bar(0, BarKind::Io, 32);
    plan.msix(2, 1);
    plan.bar(2, BarKind::Mem64, 0x1000);
    let at = Bdf {
        bus: 0,
        slot: 2,
        func: 0,
    };
    let wiring = Wiring {
        buses: &buses,
        machine: &machine,
        router: &router,
        windows: &mut Windows::new(0xc000_0000),
        intx: Some((0, route)),
    };
    let f = PciFunction::new(at, plan, Box::new(Echo), wiring).unwrap();
    fake.take();
    Rig { f, buses, fake }
}

fn mmio(r: &Rig, gpa: u64, size: u8) -> Option<u64> {
    r.buses.mmio.get(gpa, size).map(|d| d.mmio_read(gpa, size))
}

#[test]
fn bars_answer_where_their_registers_say() {
    let r = rig();
    assert_eq!(r.f.config_read(0x10, 4), 0x2001);
    assert_eq!(
        r.buses.ports.get(0x2008).unwrap().port_read(0x2008, 2),
        Some(0x802)
    );
    let mem = u64::from(r.f.config_read(0x18, 4) & !0xf);
    assert_eq!(mmio(&r, mem + 0x10, 4), Some(0x0200_1004));
    assert_eq!(mmio(&r, mem + 0x10, 8), Some(0x0200_1404_0200_1004));
}

#[test]
fn sizing_as_operating_systems_do_it() {
    let r = rig();
    r.f.config_write(0x04, 2, 0);
    assert!(r.buses.ports.get(0x2008).is_none(), "decoding is off");
    for (register, mask) in [
        (0x10, 0xffff_ffe1_u32 & 0xffff),
        (0x14, 0xffff_e000),
        (0x18, 0xffff_f004),
        (0x1c, u32::MAX),
        (0x20, 0),
    ] {
        let old = r.f.config_read(register, 4);
        r.f.config_write(register, 4, u32::MAX);
        assert_eq!(r.f.config_read(register, 4), mask, "BAR at {register:#x}");
        r.f.config_write(register, 4, old);
        assert_eq!(r.f.config_read(register, 4), old);
    }
    r.f.config_write(0x04, 2, 7);
    assert!(r.buses.ports.get(0x2008).is_some());
}

#[test]
fn a_bar_moves_and_cannot_take_anothers_place() {
    let r = rig();
    let mem = u64::from(r.f.config_read(0x18, 4) & !0xf);
    r.f.config_write(0x18, 4, 0xd000_0000);
    assert_eq!(mmio(&r, mem, 4), None);
    assert_eq!(mmio(&r, 0xd000_0008, 4), Some(0x0200_0804));
    let table = r.f.config_read(0x14, 4);
    r.f.config_write(0x18, 4, table);
    assert_eq!(
        mmio(&r, u64::from(table) + 12, 4),
        Some(1),
        "the MSI-X table is still there"
    );
    r.f.config_write(0x18, 4, mem as u32);
    assert!(mmio(&r, mem, 4).is_some());
}

#[test]
fn identity_and_capabilities_are_read_only() {
    let r = rig();
    for offset in (0..256).step_by(4) {
        r.f.config_write(offset, 4, u32::MAX);
        r.f.config_write(offset, 4, 0);
    }
    assert_eq!(r.f.config_read(0, 4), 0x1042_1af4);
    assert_eq!(r.f.config_read(8, 4), 0x0100_0000);
    assert_eq!(r.f.config_read(0x34, 1), 0x40);
    assert_eq!(r.f.config_read(0x40, 2), 0x0011);
    assert_eq!(r.f.config_read(0x100, 4), 0);
    assert_eq!(r.f.config_read(0x200, 4), u32::MAX);
}

#[test]
fn intx_is_held_back_while_the_guest_uses_msix_or_masks_it() {
    let r = rig();
    r.f.config_write(0x04, 2, 0x0407);
    r.f.set_intx(true);
    assert_eq!(r.fake.take(), []);
    r.f.config_write(0x04, 2, 0x0007);
    assert_eq!(r.fake.take(), [Event::IsaAssert(3, Some(16))]);
    r.f.config_write(0x42, 2, 0x8000);
    assert_eq!(r.fake.take(), [Event::IsaDeassert(3, Some(16))]);
    r.f.set_intx(false);
    r.f.config_write(0x42, 2, 0);
    assert_eq!(r.fake.take(), []);
}

#[test]
fn msix_vectors_reach_the_machine_when_unmasked() {
    let r = rig();
    let table = u64::from(r.f.config_read(0x14, 4) & !0xf);
    assert!(!r.f.message(1), "INTx is due");
    r.f.config_write(0x42, 2, 0xc000);
    let d = r.buses.mmio.get(table + 16, 4).unwrap();
    d.mmio_write(table + 16, 4, 0xfee0_0000);
    d.mmio_write(table + 24, 4, 0x41);
    d.mmio_write(table + 28, 4, 0);
    assert!(r.f.message(1));
    assert_eq!(r.fake.take(), [], "masked as a whole");
    r.f.config_write(0x42, 2, 0x8000);
    assert_eq!(r.fake.take(), [Event::Msi(0xfee0_0000, 0x41)]);
}
