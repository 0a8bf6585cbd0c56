//! A unit of plain memory, and DMA as it would be translated.

use core::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::ept::{Ept, MemType, Options, Prot, VtdFormat};
use crate::testhost::TestHost;

/// Registers that obey commands at once.
#[derive(Clone, Default)]
struct Fake(Rc<RefCell<State>>);

#[derive(Default)]
struct State {
    words: BTreeMap<usize, u32>,
    invalidations: u32,
    stuck: bool,
}

/// QEMU's: 3 levels, 2 MiB and 1 GiB leaves, pass-through, not coherent.
const QEMU_CAP: u64 = 0x00d2_008c_2226_0206;
const QEMU_ECAP: u64 = 0x00f0_0f4a;

impl Fake {
    fn new(cap: u64, ecap: u64) -> Self {
        let f = Fake::default();
        for (at, v) in [(CAP, cap), (ECAP, ecap)] {
            f.put(at, v as u32);
            f.put(at + 4, (v >> 32) as u32);
        }
        f
    }
    fn put(&self, at: usize, v: u32) {
        self.0.borrow_mut().words.insert(at, v);
    }
    fn word(&self, at: usize) -> u32 {
        *self.0.borrow().words.get(&at).unwrap_or(&0)
    }
}

impl Registers for Fake {
    fn read32(&self, at: usize) -> u32 {
        self.word(at)
    }
    fn read64(&self, at: usize) -> u64 {
        u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32
    }
    fn write32(&self, at: usize, value: u32) {
        if self.0.borrow().stuck {
            return;
        }
        match at {
            GCMD => self.put(GSTS, self.word(GSTS) & SRTP | value & !WBF),
            // Write one to clear.
            FSTS => self.put(FSTS, self.word(FSTS) & !value),
            _ if value == 1 << 31 => self.put(at, self.word(at) & !value),
            _ => self.put(at, value),
        }
    }
    fn write64(&self, at: usize, value: u64) {
        let done = value & !(1 << 63);
        self.0.borrow_mut().invalidations += u32::from(done != value);
        self.put(at, done as u32);
        self.put(at + 4, (done >> 32) as u32);
    }
}

fn quad(pa: u64, n: u64) -> u64 {
    // SAFETY: tables of the test, whose physical addresses are virtual ones.
    unsafe { *((pa + n * 8) as *const u64) }
}

/// What the hardware makes of an access (§3.4.3, §3.7): an address, or no.
fn translate(f: &Fake, rid: u16, at: u64, write: bool) -> Option<u64> {
    if f.word(GSTS) & TE == 0 {
        return Some(at);
    }
    let root = quad(f.read64(RTADDR), u64::from(rid >> 8) * 2);
    let context = root & !0xfff;
    let n = u64::from(rid & 0xff) * 2;
    let (low, high) = (quad(context, n), quad(context, n + 1));
    if root & low & 1 == 0 {
        return None;
    }
    if low >> 2 & 3 == 2 {
        return Some(at);
    }
    let mut level = (high & 7) + 2;
    let mut table = low & !0xfff;
    if at >> (12 + 9 * level) != 0 {
        return None;
    }
    loop {
        let e = quad(table, at >> (12 + 9 * (level - 1)) & 511);
        if e & if write { 2 } else { 1 } == 0 {
            return None;
        }
        let mask = (1 << (12 + 9 * (level - 1))) - 1;
        if level == 1 || e & 0x80 != 0 {
            return Some(e & 0x000f_ffff_ffff_f000 & !mask | at & mask);
        }
        table = e & 0x000f_ffff_ffff_f000;
        level -= 1;
    }
}

type Tables = Ept<TestHost, VtdFormat>;

fn tables(c: &Capabilities) -> Tables {
    let mut t = Tables::new(Options {
        pages_2m: c.pages_2m,
        pages_1g: c.pages_1g,
        accessed_dirty: false,
    })
    .unwrap();
    let memory = Prot::READ | Prot::WRITE;
    let _ = t
        .map(0, 0x4000_0000, 0x4000_0000, memory, MemType::WriteBack)
        .unwrap();
    let _ = t
        .map(
            0x1_0000_0000,
            0x8020_0000,
            0x20_1000,
            memory,
            MemType::WriteBack,
        )
        .unwrap();
    let _ = t
        .map(
            0x2_0000_0000,
            0x9000_0000,
            0x1000,
            Prot::READ,
            MemType::WriteBack,
        )
        .unwrap();
    t
}

#[test]
fn only_what_is_mapped_is_reached_with_three_and_with_four_levels() {
    let before = TestHost::live();
    for (cap, levels) in [(QEMU_CAP, 3), (QEMU_CAP | 1 << 10, 4)] {
        let f = Fake::new(cap, QEMU_ECAP);
        let mut unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
        assert_eq!(unit.capabilities().levels, levels);
        let mut t = tables(unit.capabilities());
        let root = t.root_of(levels).unwrap();
        t.each_table(&mut |pa| unit.publish(pa));
        unit.attach(0x501, root, 2).unwrap();
        let dma = |at, write| translate(&f, 0x501, at, write);
        assert_eq!(dma(0x1234, true), Some(0x4000_1234));
        assert_eq!(dma(0x3fff_ffff, true), Some(0x7fff_ffff));
        assert_eq!(dma(0x4000_0000, false), None, "beyond memory");
        assert_eq!(dma(0x1_0020_0fff, true), Some(0x8040_0fff));
        assert_eq!(dma(0x1_0020_1000, true), None);
        assert_eq!(dma(0x2_0000_0010, false), Some(0x9000_0010));
        assert_eq!(dma(0x2_0000_0010, true), None, "read-only");
        assert_eq!(dma(1 << 40, false), None, "beyond the tables");
        // The host's own, and the next function.
        assert_eq!(translate(&f, 0x500, 0x1234, true), Some(0x1234));
        unit.block(0x501).unwrap();
        assert_eq!(translate(&f, 0x501, 0x1234, false), None);
        unit.let_pass(0x501, true).unwrap();
        assert_eq!(translate(&f, 0x501, 0x1234, true), Some(0x1234));
        drop(unit);
        assert_eq!(f.word(GSTS) & TE, 0, "off again");
    }
    assert_eq!(TestHost::live(), before, "all tables are freed");
}

#[test]
fn each_change_is_followed_by_invalidations() {
    let f = Fake::new(QEMU_CAP, QEMU_ECAP);
    let mut unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    // Context cache and IOTLB.
    assert_eq!(f.0.borrow().invalidations, 2);
    unit.attach(8, 0x1000, 2).unwrap();
    assert_eq!(f.0.borrow().invalidations, 4);
    unit.block(8).unwrap();
    assert_eq!(f.0.borrow().invalidations, 6);
}

#[test]
fn large_pages_only_where_the_unit_has_them() {
    let counts: Vec<u64> = [QEMU_CAP, QEMU_CAP & !(3 << 34)]
        .iter()
        .map(|cap| tables(&Capabilities::new(*cap, QEMU_ECAP).unwrap()).table_pages())
        .collect();
    assert!(counts[0] < 10, "{counts:?}");
    assert!(counts[1] > 512, "{counts:?}");
}

#[test]
fn a_unit_in_use_or_without_what_is_needed_is_refused() {
    let refusal = |cap, ecap, on| {
        let f = Fake::new(cap, ecap);
        f.put(GSTS, on);
        Unit::<TestHost, _>::new(f).err()
    };
    for on in [TE, QIE, IRE] {
        assert_eq!(refusal(QEMU_CAP, QEMU_ECAP, on), Some(Refusal::InUse));
    }
    let no_levels = QEMU_CAP & !(0x1f << 8);
    assert_eq!(refusal(no_levels, QEMU_ECAP, 0), Some(Refusal::Levels));
    let no_pass = QEMU_ECAP & !(1 << 6);
    assert_eq!(refusal(QEMU_CAP, no_pass, 0), Some(Refusal::PassThrough));
    let f = Fake::new(QEMU_CAP, QEMU_ECAP);
    f.0.borrow_mut().stuck = true;
    assert_eq!(Unit::<TestHost, _>::new(f).err(), Some(Refusal::Stuck));
    let before = TestHost::live();
    TestHost::set_limit(before + 100);
    assert_eq!(refusal(QEMU_CAP, QEMU_ECAP, 0), Some(Refusal::NoMemory));
    TestHost::set_limit(i64::MAX);
    assert_eq!(TestHost::live(), before);
}

#[test]
fn faults_are_told_once_with_their_source() {
    let f = Fake::new(QEMU_CAP, QEMU_ECAP);
    let unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    let at = unit.capabilities().faults;
    f.put(at, 0x0400_0000);
    f.put(at + 8, 0x28);
    f.put(at + 12, 1 << 31 | 5);
    f.put(FSTS, FSTS_PPF);
    let mut seen = vec![];
    unit.faults(|fault| seen.push(fault));
    assert_eq!(
        seen,
        [Fault {
            source: 0x28,
            access: Access::Write(0x0400_0000),
            reason: 5
        }]
    );
    unit.faults(|fault| panic!("{fault:?} again"));
}

#[test]
fn an_overflow_is_told_and_cleared_even_by_itself() {
    let f = Fake::new(QEMU_CAP, QEMU_ECAP);
    let unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    f.put(FSTS, FSTS_PFO);
    assert!(unit.faults(|fault| panic!("{fault:?}")));
    assert_eq!(f.word(FSTS) & FSTS_PFO, 0);
    assert!(!unit.faults(|fault| panic!("{fault:?}")));
}

#[test]
fn ids_without_a_function_are_blocked_and_let_through_again() {
    let f = Fake::new(QEMU_CAP, QEMU_ECAP);
    let mut unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    let dma = |id| translate(&f, id, 0x1234, true);
    unit.let_pass(0x529, false).unwrap();
    unit.forget_passed().unwrap();
    assert_eq!(f.0.borrow().invalidations, 4);
    for id in 0x500..0x600 {
        let passed = (id != 0x529).then_some(0x1234);
        assert_eq!(dma(id), passed, "{id:#x}");
    }
    unit.let_pass(0x529, true).unwrap();
    assert_eq!(dma(0x529), Some(0x1234));
}
