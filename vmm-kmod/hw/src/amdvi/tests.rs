//! A unit of plain memory that obeys its commands, and DMA as it would be
//! translated.

use core::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::ept::{AmdviFormat, Ept, MemType, Options, Prot};
use crate::testhost::TestHost;

#[derive(Clone, Default)]
struct Fake(Rc<RefCell<State>>);

#[derive(Default)]
struct State {
    words: BTreeMap<usize, u64>,
    commands: Vec<(u64, u64)>,
    stuck: bool,
}

fn quad(pa: u64, n: u64) -> u64 {
    // SAFETY: tables of the test, whose physical addresses are virtual ones.
    unsafe { ((pa + n * 8) as *const u64).read_volatile() }
}

fn store(pa: u64, value: u64) {
    // SAFETY: as above.
    unsafe { (pa as *mut u64).write_volatile(value) }
}

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl Fake {
    fn word(&self, at: usize) -> u64 {
        *self.0.borrow().words.get(&at).unwrap_or(&0)
    }
    fn put(&self, at: usize, v: u64) {
        self.0.borrow_mut().words.insert(at, v);
    }
    fn on(&self) -> bool {
        self.word(CONTROL) & IOMMU_EN != 0
    }
    fn obey(&self) {
        let all = COMMANDS_EN | IOMMU_EN;
        if self.word(CONTROL) & all != all || self.0.borrow().stuck {
            return;
        }
        let ring = self.word(COMMANDS) & ADDRESS;
        while self.word(COMMAND_HEAD) != self.word(COMMAND_TAIL) {
            let head = self.word(COMMAND_HEAD);
            let (low, high) = (quad(ring + head, 0), quad(ring + head, 1));
            self.0.borrow_mut().commands.push((low, high));
            if low >> 60 == 1 && low & 1 != 0 {
                store(low & 0x000f_ffff_ffff_fff8, high);
            }
            self.put(COMMAND_HEAD, (head + 16) & 4095);
        }
    }
}

impl Registers for Fake {
    fn read32(&self, at: usize) -> u32 {
        self.word(at) as u32
    }
    fn read64(&self, at: usize) -> u64 {
        self.word(at)
    }
    fn write32(&self, at: usize, value: u32) {
        self.put(at, u64::from(value));
    }
    fn write64(&self, at: usize, value: u64) {
        match at {
            STATUS => self.put(at, self.word(at) & !(value & EVENT_OVERFLOW)),
            _ => self.put(at, value),
        }
        self.obey();
    }
}

/// What the hardware makes of an access (§2.2.2, §2.2.3).
fn translate(f: &Fake, rid: u16, at: u64, write: bool) -> Option<u64> {
    if !f.on() {
        return Some(at);
    }
    let need = if write { 1 << 62 } else { 1 << 61 };
    let table = f.word(DEVICE_TABLE);
    assert_eq!(table & 0x1ff, 511);
    let mut e = quad((table & ADDRESS) + u64::from(rid) * 32, 0);
    assert_eq!(e & 3, 3, "no entry may be without translation");
    let mut level = e >> 9 & 7;
    if level != 0 && at >> (12 + 9 * level) != 0 {
        return None;
    }
    if level == 0 {
        return (e & need != 0).then_some(at);
    }
    loop {
        if e & 1 == 0 || e & need == 0 {
            return None;
        }
        e = quad(e & ADDRESS, at >> (12 + 9 * (level - 1)) & 511);
        let next = e >> 9 & 7;
        if next == 0 {
            let mask = (1 << (12 + 9 * (level - 1))) - 1;
            return (e & 1 != 0 && e & need != 0).then_some(e & ADDRESS & !mask | at & mask);
        }
        assert_eq!(next, level - 1);
        level = next;
    }
}

#[test]
fn only_what_is_mapped_is_reached() {
    let before = TestHost::live();
    let f = Fake::default();
    let mut unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    let mut t = Ept::<TestHost, AmdviFormat>::new(Options {
        pages_2m: true,
        pages_1g: true,
        accessed_dirty: false,
    })
    .unwrap();
    let memory = Prot::READ | Prot::WRITE;
    for (gpa, hpa, len, prot) in [
        (0, 0x4000_0000, 0x4000_0000, memory),
        (0x1_0000_0000, 0x8020_0000, 0x20_1000, memory),
        (0x2_0000_0000, 0x9000_0000, 0x1000, Prot::READ),
    ] {
        let _ = t.map(gpa, hpa, len, prot, MemType::WriteBack).unwrap();
    }
    unit.attach(0x501, t.root_of(unit.levels()).unwrap(), 2, None)
        .unwrap();
    let dma = |at, write| translate(&f, 0x501, at, write);
    assert_eq!(dma(0x1234, true), Some(0x4000_1234));
    assert_eq!(dma(0x3fff_ffff, true), Some(0x7fff_ffff));
    assert_eq!(dma(0x4000_0000, false), None, "beyond memory");
    assert_eq!(dma(0x1_0020_0fff, true), Some(0x8040_0fff));
    assert_eq!(dma(0x1_0020_1000, true), None);
    assert_eq!(dma(0x2_0000_0010, false), Some(0x9000_0010));
    assert_eq!(dma(0x2_0000_0010, true), None, "read-only");
    assert_eq!(dma(1 << 50, false), None, "beyond the tables");
    assert_eq!(translate(&f, 0x500, 0x1234, true), Some(0x1234));
    // A large page in the middle of which a small one goes.
    let _ = t.unmap(0x20_0000, 0x1000).unwrap();
    assert_eq!(dma(0x20_0000, false), None);
    assert_eq!(dma(0x20_1000, true), Some(0x4020_1000));
    unit.block(0x501).unwrap();
    assert_eq!(dma(0x1234, false), None);
    unit.let_pass(0x501, true).unwrap();
    assert_eq!(dma(0x1234, true), Some(0x1234));
    drop(unit);
    drop(t);
    assert!(!f.on());
    assert_eq!(TestHost::live(), before, "all tables are freed");
}

/// What becomes of an interrupt message (§2.2.5): to whom, logical or not,
/// arbitrated or not, vector; or nothing.
#[derive(Debug, PartialEq)]
enum Sent {
    AsItIs,
    To(u32, bool, bool, u8),
    Nothing,
}

fn interrupt(f: &Fake, rid: u16, data: u32) -> Sent {
    let e = quad((f.word(DEVICE_TABLE) & ADDRESS) + u64::from(rid) * 32, 2);
    if e & 1 == 0 {
        return Sent::AsItIs;
    }
    let plain = data >> 8 & 7 <= 1;
    let pass = e >> 56 & 7 != 0 || e >> 62 != 0;
    assert!(!pass, "nothing else may pass");
    if !plain || e >> 60 & 3 == 0 {
        return Sent::Nothing;
    }
    assert_eq!(e >> 60 & 3, 2);
    let n = u64::from(data & 0x7ff);
    if n >= 1 << (e >> 1 & 0xf) {
        return Sent::Nothing;
    }
    let table = e & 0x000f_ffff_ffff_ffc0;
    let entry = (quad(table, n / 2) >> (32 * (n & 1))) as u32;
    if entry & 1 == 0 {
        return Sent::Nothing;
    }
    assert_eq!(entry >> 24 | entry & 0xb2, 0, "reserved, or for guests");
    Sent::To(
        entry >> 8 & 0xff,
        entry & 0x40 != 0,
        entry >> 2 & 7 == 1,
        (entry >> 16) as u8,
    )
}

#[test]
fn of_a_functions_interrupts_only_its_own_arrive() {
    let before = TestHost::live();
    let f = Fake::default();
    let mut unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    let table = interrupts::Interrupts::<TestHost>::new().unwrap();
    assert_eq!(interrupt(&f, 0x501, 0x41), Sent::AsItIs);
    unit.attach(0x501, 0x1000, 2, Some(table.pa())).unwrap();
    for data in 0..0x800 {
        assert_eq!(interrupt(&f, 0x501, data), Sent::Nothing, "{data:#x}");
    }
    assert_eq!(interrupt(&f, 0x500, 0x41), Sent::AsItIs, "the host's");
    // To CPU 3, physical; to two, logical, of which one takes it.
    let first = table.set(0, (0xfee0_3000, 0x4041)).unwrap();
    let last = table.set(511, (0xfeef_f00c, 0x52)).unwrap();
    assert_ne!(first, last);
    unit.invalidate_interrupts(0x501).unwrap();
    assert_eq!(
        f.0.borrow().commands.iter().rev().nth(1).unwrap().0,
        5 << 60 | 0x501
    );
    let sent = |data: u16| interrupt(&f, 0x501, data.into());
    assert_eq!(sent(first), Sent::To(3, false, false, 0x41));
    assert_eq!(sent(last), Sent::To(0xff, true, true, 0x52));
    let arrive = (0..0x800).filter(|data| sent(*data) != Sent::Nothing);
    assert_eq!(arrive.collect::<Vec<_>>(), [first, last]);
    // Masked by the host; SMI, NMI, INIT, external; no interrupt; nobody's.
    for message in [
        (0, 0),
        (0xfee0_0000, 0x241),
        (0xfee0_0000, 0x400),
        (0xfee0_0000, 0x500),
        (0xfee0_0000, 0x700),
        (0xfed0_0000, 0x41),
        (0xfee0_0020, 0x41),
        (0x1_fee0_0000, 0x41),
    ] {
        assert_eq!(table.set(0, message), None, "{message:x?}");
        assert_eq!(sent(first), Sent::Nothing);
    }
    assert_eq!(table.set(512, (0xfee0_0000, 0x41)), None);
    unit.block(0x501).unwrap();
    assert_eq!(sent(last), Sent::Nothing);
    unit.let_pass(0x501, true).unwrap();
    assert_eq!(sent(last), Sent::AsItIs);
    drop((unit, table));
    assert_eq!(TestHost::live(), before);
}

#[test]
fn an_interrupt_that_was_blocked_is_told_as_one() {
    let f = Fake::default();
    let unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    let log = f.word(EVENTS) & ADDRESS;
    store(log, 2 << 60 | 1 << 53 | 1 << 51 | 0x28);
    f.put(EVENT_TAIL, 16);
    let mut seen = vec![];
    unit.faults(|fault| seen.push(fault.access));
    assert_eq!(seen, [Access::Interrupt]);
}

#[test]
fn each_change_invalidates_entry_and_pages_and_waits() {
    let f = Fake::default();
    let unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    f.0.borrow_mut().commands.clear();
    unit.attach(0x28, 0x1000, 7, None).unwrap();
    let opcodes: Vec<(u64, u64)> =
        f.0.borrow()
            .commands
            .iter()
            .map(|(low, _)| {
                (
                    low >> 60,
                    if low >> 60 == 1 {
                        0
                    } else {
                        low & 0xffff_ffff_ffff
                    },
                )
            })
            .collect();
    let (entry, pages, wait) = ((2, 0x28), |d: u64| (3, d << 32), (1, 0));
    let interrupts = (5, 0x28);
    assert_eq!(
        opcodes,
        [
            entry,
            wait,
            entry,
            interrupts,
            pages(1),
            wait,
            pages(7),
            wait
        ]
    );
    // The ring goes round.
    for _ in 0..100 {
        unit.block(0x28).unwrap();
    }
}

#[test]
fn a_unit_in_use_or_stuck_is_refused() {
    let f = Fake::default();
    f.put(CONTROL, IOMMU_EN);
    assert_eq!(Unit::<TestHost, _>::new(f).err(), Some(Refusal::InUse));
    let f = Fake::default();
    f.0.borrow_mut().stuck = true;
    assert_eq!(Unit::<TestHost, _>::new(f).err(), Some(Refusal::Stuck));
}

#[test]
fn faults_are_told_once_with_their_source() {
    let f = Fake::default();
    let unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    let log = f.word(EVENTS) & ADDRESS;
    // Of another kind, and a write that was not allowed.
    store(log, 1 << 60);
    store(log + 16, 2 << 60 | 1 << 53 | 0x28);
    store(log + 24, 0x0400_0010);
    f.put(EVENT_TAIL, 32);
    let mut seen = vec![];
    unit.faults(|fault| seen.push(fault));
    assert_eq!(
        seen,
        [Fault {
            source: 0x28,
            access: Access::Write(0x0400_0000),
            reason: 2
        }]
    );
    unit.faults(|fault| panic!("{fault:?} again"));
}

#[test]
fn a_log_that_has_overflowed_starts_anew() {
    let f = Fake::default();
    let unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    let log = f.word(EVENTS) & ADDRESS;
    for at in (0..4096).step_by(16) {
        store(log + at, 2 << 60 | 0x28);
    }
    f.put(EVENT_HEAD, 16);
    f.put(EVENT_TAIL, 0);
    // Not before the unit has ended it.
    f.put(STATUS, EVENT_OVERFLOW | EVENT_LOG_RUN);
    let mut seen = 0;
    assert!(unit.faults(|_| seen += 1), "some are lost");
    assert_eq!(seen, 255);
    assert_eq!(f.word(STATUS), EVENT_OVERFLOW | EVENT_LOG_RUN);
    f.put(STATUS, EVENT_OVERFLOW);
    f.put(EVENT_HEAD, 32);
    f.put(EVENT_TAIL, 32);
    assert!(unit.faults(|_| panic!("none is left")));
    assert_eq!(f.word(STATUS), 0);
    assert_eq!((f.word(EVENT_HEAD), f.word(EVENT_TAIL)), (0, 0));
    assert_eq!(f.word(CONTROL) & EVENT_LOG_EN, EVENT_LOG_EN);
    f.put(EVENT_TAIL, 16);
    assert!(!unit.faults(|_| seen += 1));
    assert_eq!(seen, 256, "they are told again");
}

#[test]
fn a_unit_that_gets_stuck_is_not_left_with_tables() {
    let f = Fake::default();
    let mut unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    f.0.borrow_mut().stuck = true;
    let blocked = |f: &Fake| translate(f, 0x28, 0x1000, false).is_none();
    assert_eq!(unit.attach(0x28, 0x1000, 2, None), Err(Refusal::Stuck));
    assert!(blocked(&f));
    f.0.borrow_mut().stuck = false;
    unit.let_pass(0x28, true).unwrap();
    assert!(!blocked(&f));
    f.0.borrow_mut().stuck = true;
    assert_eq!(unit.block(0x28), Err(Refusal::Stuck));
    assert!(blocked(&f));
}

#[test]
fn ids_without_a_function_are_blocked_and_let_through_again() {
    let f = Fake::default();
    let mut unit = Unit::<TestHost, _>::new(f.clone()).unwrap();
    unit.attach(0x528, 0x1000, 2, None).unwrap();
    let before = f.0.borrow().commands.len();
    let blocked = [0x529, 0x52f];
    for id in blocked.into_iter().chain(blocked) {
        unit.let_pass(id, false).unwrap();
    }
    unit.forget_passed().unwrap();
    for id in (0x500..0x600).filter(|id| *id != 0x528) {
        let passes = (translate(&f, id, 0x1234, true), interrupt(&f, id, 0x41));
        if blocked.contains(&id) {
            assert_eq!(passes, (None, Sent::Nothing), "{id:#x}");
        } else {
            assert_eq!(passes, (Some(0x1234), Sent::AsItIs), "{id:#x}");
        }
    }
    let of = |n: u64| {
        let commands = &f.0.borrow().commands[before..];
        let told = |id: u64| commands.iter().filter(|c| c.0 == n << 60 | id).count();
        blocked.map(|id| told(id.into()))
    };
    assert_eq!((of(2), of(5)), ([1; 2], [1; 2]), "the unit is told once");
    for id in blocked {
        unit.let_pass(id, true).unwrap();
        assert_eq!(translate(&f, id, 0x1234, true), Some(0x1234));
        assert_eq!(interrupt(&f, id, 0x41), Sent::AsItIs);
    }
    // No answer: an error, and blocked.
    f.0.borrow_mut().stuck = true;
    assert_eq!(unit.let_pass(0x529, false), Err(Refusal::Stuck));
    assert_eq!(translate(&f, 0x529, 0x1234, true), None);
}
