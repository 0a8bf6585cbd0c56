//! Behaviour that a guest or an owner of the tables can see.
#![allow(unused_must_use)] // what `map` returns is looked at where it matters

use super::*;
use crate::testhost::TestHost;

type E = Ept<TestHost>;

const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
const ALL: Options = Options {
    pages_2m: true,
    pages_1g: true,
    accessed_dirty: true,
};

fn ept(options: Options) -> E {
    E::new(options).unwrap()
}

fn map(e: &mut E, gpa: u64, hpa: u64, size: u64) -> Invalidation {
    e.map(gpa, hpa, size, Prot::RWX, MemType::WriteBack)
        .unwrap()
}

#[test]
fn alignment_decides_the_page_size() {
    let mut e = ept(ALL);
    assert_eq!(
        map(&mut e, 0, 4 * G1, 2 * G1 + M2 + 4096),
        Invalidation::None
    );
    assert_eq!(e.translate(G1 + 5).unwrap().page_size, G1);
    assert_eq!(e.translate(2 * G1).unwrap().page_size, M2);
    let last = e.translate(2 * G1 + M2 + 4095).unwrap();
    assert_eq!((last.page_size, last.hpa), (4096, 6 * G1 + M2 + 4095));
    assert_eq!(e.translate(2 * G1 + M2 + 4096), None);
    // A host address that is off by a page forces small pages.
    map(&mut e, 8 * G1, G1 + 4096, M2);
    assert_eq!(e.translate(8 * G1).unwrap().page_size, 4096);
    let mut small = ept(Options::default());
    map(&mut small, 0, 0, M2);
    assert_eq!(small.translate(0).unwrap().page_size, 4096);
}

#[test]
fn unmapping_in_the_middle_splits_and_keeps_the_rest() {
    let mut e = ept(ALL);
    map(&mut e, 0, 4 * G1, G1);
    assert_eq!(e.unmap(M2 + 4096, 4096).unwrap(), Invalidation::Required);
    assert_eq!(e.translate(M2 + 4096), None);
    assert_eq!(e.translate(M2 + 8192).unwrap().hpa, 4 * G1 + M2 + 8192);
    assert_eq!(e.translate(M2 + 8192).unwrap().page_size, 4096);
    assert_eq!(e.translate(0).unwrap().page_size, M2);
    assert_eq!(e.translate(G1 - 1).unwrap().hpa, 5 * G1 - 1);
    assert_eq!(e.translate(G1 - 1).unwrap().prot, Prot::RWX);
}

#[test]
fn a_large_page_replaces_small_ones_and_their_table_waits() {
    let mut e = ept(ALL);
    for i in 0..4 {
        map(&mut e, i * 4096, G1 + i * 4096, 4096);
    }
    let live = TestHost::live();
    let before = e.generation().current();
    assert_eq!(map(&mut e, 0, G1, M2), Invalidation::Required);
    assert_eq!(e.generation().current(), before + 1);
    assert_eq!(TestHost::live(), live, "a CPU may still walk the old table");
    assert_eq!(
        e.translate(4096).unwrap(),
        Translation {
            hpa: G1 + 4096,
            prot: Prot::RWX,
            page_size: M2,
            accessed: false,
            dirty: false
        }
    );
    e.reclaim();
    assert_eq!(TestHost::live(), live - 1);
}

#[test]
fn only_changes_that_cpus_may_have_cached_raise_the_generation() {
    let mut e = ept(ALL);
    assert_eq!(
        e.map(0, G1, 4096, Prot::RX, MemType::WriteBack).unwrap(),
        Invalidation::None
    );
    assert_eq!(map(&mut e, 0, G1, 4096), Invalidation::None, "more rights");
    assert_eq!(
        map(&mut e, 0, G1 + 4096, 4096),
        Invalidation::Required,
        "another page"
    );
    assert_eq!(
        e.protect(0, 4096, Prot::READ).unwrap(),
        Invalidation::Required
    );
    assert_eq!(e.translate(0).unwrap().prot, Prot::READ);
    assert_eq!(
        e.protect(4096, 4096, Prot::READ).unwrap(),
        Invalidation::None,
        "nothing there"
    );
    assert_eq!(
        e.protect(0, 4096, Prot::empty()).unwrap(),
        Invalidation::Required
    );
    assert_eq!(e.translate(0), None);
    assert_eq!(e.unmap(0, GPA_LIMIT).unwrap(), Invalidation::None);
}

#[test]
fn entries_are_what_the_cpu_expects() {
    let mut e = ept(ALL);
    assert_eq!(e.eptp(), e.root_pa() | 0x5e);
    map(&mut e, 0, G1, 4096);
    e.map(M2, G1 + M2, M2, Prot::RX, MemType::WriteCombining)
        .unwrap();
    let (ptes, n) = e.walk(0);
    assert_eq!(n, 4);
    assert_eq!(ptes[0] & 0xfff, 7);
    assert_eq!(ptes[3], G1 | 7 | 6 << 3 | 1 << 6);
    let (ptes, n) = e.walk(M2 + 12345);
    assert_eq!((n, ptes[2]), (3, (G1 + M2) | 5 | 1 << 3 | 1 << 7));
    assert_eq!(e.walk(G1).1, 2);
}

#[test]
fn dirty_pages_are_told_once() {
    let mut e = ept(ALL);
    map(&mut e, 0, G1, M2);
    map(&mut e, M2, G1 + M2 + 4096, 8192);
    let (table, level) = e.find(M2 + 4096);
    e.entry(table, M2 + 4096, level)
        .fetch_or(0x300, Ordering::Relaxed);
    assert!(e.translate(M2 + 4096).unwrap().dirty);
    let mut seen = std::vec::Vec::new();
    let first = e
        .harvest_dirty(0, G1, |gpa, size| seen.push((gpa, size)))
        .unwrap();
    assert_eq!(first, Invalidation::Required);
    let again = e
        .harvest_dirty(0, G1, |gpa, size| seen.push((gpa, size)))
        .unwrap();
    assert_eq!(again, Invalidation::None);
    assert_eq!(seen, [(M2 + 4096, 4096)]);
}

#[test]
fn nonsense_is_refused() {
    let mut e = ept(ALL);
    let rw = Prot::RWX;
    let wb = MemType::WriteBack;
    assert_eq!(e.map(1, 0, 4096, rw, wb), Err(Error::Invalid));
    assert_eq!(e.map(0, 1, 4096, rw, wb), Err(Error::Invalid));
    assert_eq!(e.map(0, 0, 0, rw, wb), Err(Error::Invalid));
    assert_eq!(e.map(0, u64::MAX - 4095, 8192, rw, wb), Err(Error::Invalid));
    assert_eq!(e.map(0, 1 << 52, 4096, rw, wb), Err(Error::Invalid));
    assert_eq!(
        e.map(GPA_LIMIT - 4096, 0, 8192, rw, wb),
        Err(Error::OutOfRange)
    );
    assert_eq!(e.unmap(u64::MAX - 4095, 4096), Err(Error::OutOfRange));
    assert_eq!(e.translate(u64::MAX), None);
}

#[test]
fn running_out_of_memory_is_an_error_and_leaks_nothing() {
    assert_eq!(TestHost::live(), 0);
    {
        let mut e = ept(ALL);
        TestHost::set_limit(3);
        assert_eq!(
            e.map(0, 0, 4096, Prot::RWX, MemType::WriteBack),
            Err(Error::NoMemory)
        );
        TestHost::set_limit(i64::MAX);
        map(&mut e, 0, 0, 4096);
        map(&mut e, 0, 0, G1);
        TestHost::set_limit(TestHost::live());
        assert_eq!(
            e.unmap(0, 4096),
            Err(Error::NoMemory),
            "the split needs a page"
        );
        assert!(e.translate(0).is_some());
        TestHost::set_limit(i64::MAX);
    }
    assert_eq!(TestHost::live(), 0);
}

#[test]
fn each_cpu_invalidates_once_per_generation() {
    let e = ept(ALL);
    let g = e.generation();
    assert!(g.seen(0) < g.current(), "a new address space starts unseen");
    g.set_seen(0, g.current());
    assert_eq!(g.seen(0), g.current());
    assert!(g.seen(1) < g.current());
    g.raise();
    assert!(g.seen(0) < g.current());
}

#[test]
fn amd_entries_are_those_of_the_hosts_own_tables() {
    let mut e = Ept::<TestHost, NptFormat>::new(ALL).unwrap();
    let wb = MemType::WriteBack;
    e.map(0, 4 * G1, M2, Prot::RWX, wb).unwrap();
    e.map(M2, 5 * G1, 4096, Prot::READ, MemType::Uncacheable)
        .unwrap();
    let (path, n) = e.walk(0);
    // Present, writable, user's (APM Vol. 2 §15.25.5); PS in the leaf.
    assert_eq!(n, 3);
    assert!(path[..2].iter().all(|x| x & 0xfff == 7));
    assert_eq!(path[2], (4 * G1) | 0x87);
    let (path, n) = e.walk(M2);
    assert_eq!((n, path[3]), (4, (1 << 63) | (5 * G1) | 0x1d));
    assert_eq!(e.translate(M2).unwrap().prot, Prot::READ);
    // Rights that grow need no flush, rights that shrink do.
    let protect = |e: &mut Ept<TestHost, NptFormat>, p| e.protect(M2, 4096, p).unwrap();
    assert_eq!(protect(&mut e, Prot::RWX), Invalidation::None);
    assert_eq!(protect(&mut e, Prot::RX), Invalidation::Required);
    assert_eq!(e.unmap(4096, 4096).unwrap(), Invalidation::Required);
    assert_eq!(e.translate(4096), None);
    assert_eq!(e.translate(8192).unwrap().hpa, 4 * G1 + 8192);
}

#[test]
fn a_host_with_five_levels_gets_a_table_on_top() {
    use crate::nested::NestedTables;
    let mut t = NestedTables::<TestHost>::npt(ALL, true).unwrap();
    t.map(0, G1, 4096, Prot::RWX, MemType::WriteBack).unwrap();
    let top = TestHost::phys_to_virt(t.root()) as *const u64;
    // SAFETY: the root is a page of the tables'.
    let entries = unsafe { core::slice::from_raw_parts(top, 512) };
    let NestedTables::Npt { tables, .. } = &t else {
        unreachable!();
    };
    assert_eq!(entries[0], tables.root_pa() | 7);
    assert!(entries[1..].iter().all(|e| *e == 0));
}
