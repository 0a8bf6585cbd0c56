//! A unit of plain memory, and DMA as it would be translated.

use core::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use super::queue::{IQA, IQH, IQT};
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
    queue: Queued,
}

/// What has been seen of the queue.
#[derive(Default)]
struct Queued {
    /// First quarters of the descriptors executed, waits left out.
    done: Vec<u64>,
    waits: usize,
    /// The one before, of all.
    last: u64,
    /// Reads of the head until it goes on by one descriptor.
    lag: u32,
    reads: u32,
    /// It does not do descriptors of this kind.
    refused: Option<u64>,
    /// It stops after so many.
    stops: Option<usize>,
}

/// GSTS: it has a table for interrupts.
const IRTP: u32 = 1 << 24;

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
    fn put64(&self, at: usize, v: u64) {
        self.put(at, v as u32);
        self.put(at + 4, (v >> 32) as u32);
    }
    /// Does the next descriptor, if there is one (§6.5.2).
    fn step(&self) {
        let (iqa, head) = (self.both(IQA), self.both(IQH));
        let len = 4096 << (iqa & 7);
        let size = if iqa & 1 << 11 != 0 { 32 } else { 16 };
        if head == self.both(IQT) || self.word(FSTS) & (1 << 4) != 0 {
            return;
        }
        let at = (iqa & !0xfff) + head;
        let (low, high) = (quad(at, 0), quad(at, 1));
        let mut state = self.0.borrow_mut();
        let q = &mut state.queue;
        if q.stops == Some(q.done.len() + q.waits) {
            return;
        }
        if size == 32 {
            assert_eq!((quad(at, 2), quad(at, 3)), (0, 0), "reserved");
        }
        if q.refused == Some(low & 0xf) {
            drop(state);
            return self.put(FSTS, self.word(FSTS) | 1 << 4);
        }
        match low & 0xf {
            5 => {
                assert_eq!(low & 0x20, 0x20, "nothing tells that it is over");
                assert_eq!(low & 0xffff_ff90 | high & 3, 0, "reserved, or an interrupt");
                // SAFETY: the test's own memory, as the unit's descriptor says.
                unsafe { *(high as *mut u32) = (low >> 32) as u32 };
                q.waits += 1;
            }
            2 => {
                assert_eq!(q.last & 0x4f, 0x45, "contexts may not be gone yet");
                q.done.push(low);
            }
            _ => q.done.push(low),
        }
        q.last = low;
        drop(state);
        self.put64(IQH, (head + size) & (len - 1));
    }
    fn both(&self, at: usize) -> u64 {
        u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32
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
        if at == IQH {
            let due = {
                let q = &mut self.0.borrow_mut().queue;
                q.reads += 1;
                q.reads > q.lag
            };
            if due {
                self.0.borrow_mut().queue.reads = 0;
                self.step();
            }
        }
        self.both(at)
    }
    fn write32(&self, at: usize, value: u32) {
        if self.0.borrow().stuck {
            return;
        }
        match at {
            GCMD => self.put(GSTS, self.word(GSTS) & (SRTP | IRTP) | value & !WBF),
            // Write one to clear.
            FSTS => self.put(FSTS, self.word(FSTS) & !value),
            _ if value == 1 << 31 => self.put(at, self.word(at) & !value),
            _ => self.put(at, value),
        }
    }
    fn write64(&self, at: usize, value: u64) {
        let by_register = at == CCMD || value >> 63 != 0;
        assert!(
            !by_register || self.word(GSTS) & QIE == 0,
            "not while the queue is on (§6.5)"
        );
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

/// A unit that is on.
fn on(f: &Fake) -> Result<Unit<TestHost, Fake>, Refusal> {
    let unit = Unit::new(f.clone(), true)?;
    unit.resume()?;
    Ok(unit)
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
        let mut unit = on(&f).unwrap();
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
    let mut unit = on(&f).unwrap();
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
    let refusal = |cap, ecap, status| {
        let f = Fake::new(cap, ecap);
        f.put(GSTS, status);
        on(&f).err()
    };
    assert_eq!(refusal(QEMU_CAP, QEMU_ECAP, TE), Some(Refusal::InUse));
    let (f, before) = (Fake::new(QEMU_CAP, QEMU_ECAP), TestHost::live());
    for status in [TE, QIE, IRE, TE | QIE | IRE] {
        f.put(GSTS, status);
        let unit = Unit::<TestHost, _>::new(f.clone(), false);
        assert_eq!(unit.err(), Some(Refusal::InUse), "{status:#x}");
        assert_eq!((f.word(GSTS), TestHost::live()), (status, before));
    }
    let no_levels = QEMU_CAP & !(0x1f << 8);
    assert_eq!(refusal(no_levels, QEMU_ECAP, 0), Some(Refusal::Levels));
    let no_pass = QEMU_ECAP & !(1 << 6);
    assert_eq!(refusal(QEMU_CAP, no_pass, 0), Some(Refusal::PassThrough));
    let f = Fake::new(QEMU_CAP, QEMU_ECAP);
    f.0.borrow_mut().stuck = true;
    assert_eq!(on(&f).err(), Some(Refusal::Stuck));
    let before = TestHost::live();
    TestHost::set_limit(before + 100);
    assert_eq!(refusal(QEMU_CAP, QEMU_ECAP, 0), Some(Refusal::NoMemory));
    TestHost::set_limit(i64::MAX);
    assert_eq!(TestHost::live(), before);
}

#[test]
fn faults_are_told_once_with_their_source() {
    let f = Fake::new(QEMU_CAP, QEMU_ECAP);
    let unit = on(&f).unwrap();
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
    let unit = on(&f).unwrap();
    f.put(FSTS, FSTS_PFO);
    assert!(unit.faults(|fault| panic!("{fault:?}")));
    assert_eq!(f.word(FSTS) & FSTS_PFO, 0);
    assert!(!unit.faults(|fault| panic!("{fault:?}")));
}

#[test]
fn ids_without_a_function_are_blocked_and_let_through_again() {
    let f = Fake::new(QEMU_CAP, QEMU_ECAP);
    let mut unit = on(&f).unwrap();
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

/// The host's queue: pages, what is in them, and the unit that has it.
struct Hosts {
    ring: Pages<TestHost>,
    before: Vec<u8>,
    unit: Fake,
}

/// GSTS where the host remaps interrupts.
const HOSTS: u32 = QIE | IRE | IRTP;

impl Hosts {
    /// A ring of `4096 << order` bytes, in which the host goes on at `at`. All of it is
    /// invalidations of interrupts that were done long ago.
    fn new(order: u32, wide: bool, at: u64) -> Self {
        let mut ring = Pages::<TestHost>::new(order).unwrap();
        let size = if wide { 32 } else { 16 };
        for (n, d) in ring.bytes_mut().chunks_exact_mut(size).enumerate() {
            d[..16].copy_from_slice(&(4 | (n as u128) << 32).to_le_bytes());
        }
        let unit = Fake::new(QEMU_CAP, QEMU_ECAP);
        unit.put(GSTS, HOSTS);
        unit.put64(
            IQA,
            ring.pa() | u64::from(order) | if wide { 1 << 11 } else { 0 },
        );
        unit.put64(IQH, at);
        unit.put64(IQT, at);
        let before = ring.bytes_mut().to_vec();
        Hosts { ring, before, unit }
    }
    fn done(&self) -> Vec<u64> {
        core::mem::take(&mut self.unit.0.borrow_mut().queue.done)
    }
    /// As the host left it.
    fn unchanged(&mut self, at: u64) {
        assert_eq!(self.unit.both(IQT), at, "where the host goes on");
        assert_eq!(self.unit.both(IQH), at);
        assert!(self.ring.bytes_mut() == &self.before[..], "the ring");
    }
}

/// All contexts, then all translations with both drains.
const ALL: [u64; 2] = [0x11, 0xd2];

#[test]
fn a_queue_of_the_hosts_is_used_and_left_as_it_was() {
    let before = TestHost::live();
    for (order, wide) in [(0, false), (1, true), (3, false), (0, true)] {
        let size = if wide { 32 } else { 16 };
        let len = 4096 << order;
        for at in [0, size, len / 2 - size, len / 2, len - 2 * size, len - size] {
            for lag in [0, 3] {
                let mut host = Hosts::new(order, wide, at);
                host.unit.0.borrow_mut().queue.lag = lag;
                let mut unit = on(&host.unit).unwrap();
                assert!(unit.shared());
                let on = HOSTS | TE | SRTP;
                assert_eq!(host.unit.word(GSTS), on, "interrupts go on");
                assert_eq!(host.done(), ALL);
                host.unchanged(at);
                unit.attach(0x28, 0x1000, 2).unwrap();
                assert_eq!(translate(&host.unit, 0x29, 0x1234, true), Some(0x1234));
                assert_eq!(host.done(), ALL);
                unit.block(0x28).unwrap();
                assert_eq!(host.done(), ALL);
                assert_eq!(translate(&host.unit, 0x28, 0x1234, true), None);
                host.unchanged(at);
                let waits = host.unit.0.borrow().queue.waits as u64;
                assert_eq!(waits, 3 * (len / size - 2), "each time once round");
                drop(unit);
                assert_eq!(host.unit.word(GSTS), on & !TE);
                host.unchanged(at);
            }
        }
    }
    assert_eq!(TestHost::live(), before);
}

#[test]
fn faults_of_a_unit_that_the_host_has_too_are_left_to_its_handler() {
    let host = Hosts::new(0, false, 0);
    let (unit, f) = (on(&host.unit).unwrap(), &host.unit);
    let at = unit.capabilities().faults;
    f.put(at + 12, 1 << 31 | 5);
    f.put(FSTS, FSTS_PPF | FSTS_PFO);
    assert!(!unit.faults(|fault| panic!("{fault:?}")));
    assert_eq!(
        (f.word(at + 12), f.word(FSTS)),
        (1 << 31 | 5, FSTS_PPF | FSTS_PFO)
    );
}

#[test]
fn what_the_host_has_under_way_is_waited_for() {
    let mut host = Hosts::new(0, false, 0x100);
    host.unit.put64(IQT, 0x120);
    host.unit.0.borrow_mut().queue.lag = 5;
    let unit = on(&host.unit).unwrap();
    assert_eq!(host.done().len(), 4, "two of the host's, two of ours");
    host.unchanged(0x120);
    drop(unit);
    // One that does not end.
    let mut host = Hosts::new(0, false, 0x100);
    host.unit.put64(IQT, 0x120);
    host.unit.0.borrow_mut().queue.stops = Some(1);
    assert_eq!(on(&host.unit).err(), Some(Refusal::Stuck));
    assert_eq!(host.unit.word(GSTS) & (TE | QIE | IRE), QIE | IRE);
    assert!(host.ring.bytes_mut() == &host.before[..]);
}

#[test]
fn after_a_refused_descriptor_the_hosts_go_on() {
    for refused in [1, 2] {
        let mut host = Hosts::new(0, false, 0xff0);
        host.unit.0.borrow_mut().queue.refused = Some(refused);
        assert_eq!(on(&host.unit).err(), Some(Refusal::Stuck));
        assert_eq!(host.unit.word(FSTS), 0, "the error is cleared");
        assert_eq!(host.unit.word(GSTS) & (TE | QIE | IRE), QIE | IRE);
        host.unchanged(0xff0);
    }
}

#[test]
fn a_queue_that_does_not_come_round_keeps_its_memory() {
    let mut host = Hosts::new(0, false, 0);
    let before = TestHost::live();
    let mut unit = on(&host.unit).unwrap();
    let done = {
        let q = &host.unit.0.borrow().queue;
        q.done.len() + q.waits
    };
    host.unit.0.borrow_mut().queue.stops = Some(done + 100);
    assert_eq!(unit.attach(0x28, 0x1000, 2), Err(Refusal::Stuck));
    assert_eq!(translate(&host.unit, 0x28, 0x1234, true), None);
    // It is not asked again.
    let tail = host.unit.both(IQT);
    assert_eq!(unit.block(0x28), Err(Refusal::Stuck));
    assert_eq!(host.unit.both(IQT), tail);
    drop(unit);
    assert_eq!(TestHost::live(), before + 2, "waits may write there still");
    // Nothing but waits is left.
    host.unit.0.borrow_mut().queue.stops = None;
    let _ = host.done();
    while host.unit.both(IQH) != tail {
        host.unit.step();
    }
    assert_eq!(host.done(), []);
    let left = host.ring.bytes_mut();
    assert!(left.chunks_exact(16).skip(3).all(|d| d[0] == 0x65));
}

#[test]
fn after_the_hosts_sleep_a_queue_that_is_new_is_used() {
    let mut host = Hosts::new(0, false, 0x230);
    let unit = on(&host.unit).unwrap();
    // Linux has set it up again, and knows nothing of TE.
    for at in [IQT, IQH] {
        host.unit.put64(at, 0);
    }
    host.unit.put(GSTS, HOSTS);
    let _ = host.done();
    unit.resume().unwrap();
    assert_eq!(host.done(), ALL);
    assert_eq!(host.unit.word(GSTS), HOSTS | TE | SRTP);
    host.unchanged(0);
    unit.resume().unwrap();
    assert_eq!(host.done(), [], "once is enough");
    // Before it sleeps again, only translation goes off.
    unit.suspend().unwrap();
    assert_eq!(host.unit.word(GSTS), HOSTS | SRTP);
    unit.resume().unwrap();
    assert_eq!(host.unit.word(GSTS), HOSTS | TE | SRTP);
    host.unit.0.borrow_mut().stuck = true;
    assert_eq!(unit.suspend(), Err(Refusal::Stuck));
}

#[test]
fn interrupts_are_remapped_where_no_others_pass() {
    let f = Fake::new(QEMU_CAP, QEMU_ECAP);
    for (status, yes) in [(0, false), (IRE, true), (IRE | CFI, false), (QIE, false)] {
        f.put(GSTS, status);
        assert_eq!(remaps(&f), yes, "{status:#x}");
    }
}
