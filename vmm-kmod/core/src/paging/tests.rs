use super::*;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Sparse memory of 32-bit words below 1 TiB; what was never written reads 0.
#[derive(Default)]
struct Mem(RefCell<BTreeMap<u64, u32>>);

impl Mem {
    fn put(&self, gpa: u64, v: u64) {
        self.0.borrow_mut().insert(gpa, v as u32);
        self.0.borrow_mut().insert(gpa + 4, (v >> 32) as u32);
    }
    fn put32(&self, gpa: u64, v: u32) {
        self.0.borrow_mut().insert(gpa, v);
    }
    fn get(&self, gpa: u64) -> u64 {
        self.read_u64(gpa).unwrap()
    }
}

impl GuestPhys for Mem {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> bool {
        if gpa + buf.len() as u64 > 1 << 40 {
            return false;
        }
        for (i, b) in buf.iter_mut().enumerate() {
            let a = gpa + i as u64;
            let w = self.0.borrow().get(&(a & !3)).copied().unwrap_or(0);
            *b = w.to_le_bytes()[(a & 3) as usize];
        }
        true
    }
    fn cmpxchg_u32(&self, gpa: u64, old: u32, new: u32) -> Option<bool> {
        if self.read_u32(gpa)? != old {
            return Some(false);
        }
        self.put32(gpa, new);
        Some(true)
    }
    fn cmpxchg_u64(&self, gpa: u64, old: u64, new: u64) -> Option<bool> {
        if self.read_u64(gpa)? != old {
            return Some(false);
        }
        self.put(gpa, new);
        Some(true)
    }
}

const LONG: Paging = Paging {
    cr0: CR0_PG | CR0_WP | 1,
    cr3: 0x1000,
    cr4: CR4_PAE,
    efer: EFER_LMA | EFER_NXE,
    cpl: 0,
    ac: false,
    implicit: false,
    phys_bits: 40,
    gib_pages: true,
};
const GLA: u64 = 0xffff_8123_4567_89ab;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;

fn index(gla: u64, level: u32) -> u64 {
    (gla >> (12 + 9 * (level - 1)) & 0x1ff) << 3
}

/// Four levels down to GLA with the given flags on every level.
fn four(flags: u64) -> Mem {
    let m = Mem::default();
    m.put(0x1000 | index(GLA, 4), PDPT | flags);
    m.put(PDPT | index(GLA, 3), PD | flags);
    m.put(PD | index(GLA, 2), PT | flags);
    m.put(PT | index(GLA, 1), 0xab_cdef_0000 | flags);
    m
}

fn code(m: &Mem, p: &Paging, access: Access) -> Option<u32> {
    match translate_nofault(m, p, GLA, access) {
        Ok(gpa) => {
            assert_eq!(gpa, 0xab_cdef_09ab);
            None
        }
        Err(WalkError::Fault(f)) => {
            assert_eq!(f.cr2, GLA);
            Some(f.error_code)
        }
        Err(e) => panic!("{e:?}"),
    }
}

const R: Access = Access::READ;
const W: Access = Access::WRITE;
const X: Access = Access::EXEC;

#[test]
fn rights_of_user_and_supervisor() {
    let user = Paging { cpl: 3, ..LONG };
    let nowp = Paging {
        cr0: LONG.cr0 & !CR0_WP,
        ..LONG
    };
    let m = four(PTE_P);
    assert_eq!(code(&m, &LONG, R), None);
    assert_eq!(code(&m, &LONG, W), Some(PF_P | PF_W));
    assert_eq!(code(&m, &nowp, W), None);
    assert_eq!(code(&m, &LONG, X), None);
    assert_eq!(code(&m, &user, R), Some(PF_P | PF_U));
    assert_eq!(code(&m, &user.implicit(), R), None);
    let m = four(PTE_P | PTE_U);
    assert_eq!(code(&m, &user, R), None);
    assert_eq!(code(&m, &user, W), Some(PF_P | PF_U | PF_W));
    let m = four(PTE_P | PTE_U | PTE_W | PTE_NX);
    assert_eq!(code(&m, &user, W), None);
    assert_eq!(code(&m, &user, X), Some(PF_P | PF_U | PF_ID));
    assert_eq!(code(&four(0), &user, W), Some(PF_U | PF_W));
}

#[test]
fn a_right_must_be_given_on_every_level() {
    for (table, level) in [(0x1000, 4), (PDPT, 3), (PD, 2), (PT, 1)] {
        let m = four(PTE_P | PTE_W | PTE_U);
        let at = table | index(GLA, level);
        let e = m.get(at);
        m.put(at, e & !PTE_W);
        assert_eq!(code(&m, &LONG, W), Some(PF_P | PF_W));
        m.put(at, e | PTE_NX);
        assert_eq!(code(&m, &LONG, X), Some(PF_P | PF_ID));
        m.put(at, e & !PTE_U);
        assert_eq!(code(&m, &Paging { cpl: 3, ..LONG }, R), Some(PF_P | PF_U));
        // Above the 40 bits of a physical address.
        m.put(at, e | 1 << 41);
        assert_eq!(code(&m, &LONG, R), Some(PF_P | PF_RSVD));
        // Without EFER.NXE bit 63 is reserved.
        m.put(at, e | PTE_NX);
        let nonx = Paging {
            efer: EFER_LMA,
            ..LONG
        };
        assert_eq!(code(&m, &nonx, R), Some(PF_P | PF_RSVD));
    }
}

#[test]
fn smep_and_smap() {
    let p = Paging {
        cr4: LONG.cr4 | CR4_SMEP | CR4_SMAP,
        ..LONG
    };
    let m = four(PTE_P | PTE_W | PTE_U);
    assert_eq!(code(&m, &p, X), Some(PF_P | PF_ID));
    assert_eq!(code(&m, &p, R), Some(PF_P));
    let ac = Paging { ac: true, ..p };
    assert_eq!(code(&m, &ac, R), None);
    assert_eq!(code(&m, &ac.implicit(), W), Some(PF_P | PF_W));
    assert_eq!(code(&m, &Paging { cpl: 3, ..p }, X), None);
    let kernel = four(PTE_P | PTE_W);
    assert_eq!(code(&kernel, &p, X), None);
    assert_eq!(code(&kernel, &p, W), None);
}

#[test]
fn accessed_and_dirty_flags() {
    let m = four(PTE_P | PTE_W);
    translate_nofault(&m, &LONG, GLA, W).unwrap();
    assert_eq!(m.get(PT | index(GLA, 1)) & (PTE_A | PTE_D), 0);
    translate(&m, &LONG, GLA, R).unwrap();
    for (table, level) in [(0x1000, 4), (PDPT, 3), (PD, 2), (PT, 1)] {
        assert_eq!(m.get(table | index(GLA, level)) & (PTE_A | PTE_D), PTE_A);
    }
    translate(&m, &LONG, GLA, W).unwrap();
    assert_eq!(m.get(PT | index(GLA, 1)) & PTE_D, PTE_D);
    assert_eq!(m.get(PD | index(GLA, 2)) & PTE_D, 0);
}

#[test]
fn large_pages() {
    let m = four(PTE_P);
    m.put(
        PD | index(GLA, 2),
        0x12_3460_0000 | PTE_P | PTE_PS | 1 << 12,
    );
    assert_eq!(
        translate(&m, &LONG, GLA, R),
        Ok(0x12_3460_0000 | GLA & 0x1f_ffff)
    );
    m.put(
        PD | index(GLA, 2),
        0x12_3460_0000 | PTE_P | PTE_PS | 1 << 13,
    );
    assert_eq!(code(&m, &LONG, R), Some(PF_P | PF_RSVD));
    m.put(PDPT | index(GLA, 3), 0x40_4000_0000 | PTE_P | PTE_PS);
    assert_eq!(
        translate(&m, &LONG, GLA, R),
        Ok(0x40_4000_0000 | GLA & 0x3fff_ffff)
    );
    assert_eq!(
        code(
            &m,
            &Paging {
                gib_pages: false,
                ..LONG
            },
            R
        ),
        Some(PF_P | PF_RSVD)
    );
    m.put(0x1000 | index(GLA, 4), PDPT | PTE_P | PTE_PS);
    assert_eq!(code(&m, &LONG, R), Some(PF_P | PF_RSVD));
}

#[test]
fn five_levels() {
    let gla = 0x00ab_8123_4567_89ab;
    let m = four(PTE_P);
    m.put(0x9000 | index(gla, 5), 0x1000 | PTE_P);
    let p = Paging {
        cr3: 0x9000,
        cr4: LONG.cr4 | CR4_LA57,
        ..LONG
    };
    assert_eq!(translate(&m, &p, gla, R), Ok(0xab_cdef_09ab));
}

#[test]
fn thirty_two_bit_paging() {
    let p = Paging {
        efer: 0,
        cr4: CR4_PSE,
        ..LONG
    };
    let m = Mem::default();
    let gla = 0xc012_3456;
    m.put32(0x1000 | (gla >> 22) << 2, 0x5000 | 3);
    m.put32(0x5000 | (gla >> 12 & 0x3ff) << 2, 0x89ab_c000 | 3);
    assert_eq!(translate(&m, &p, gla, W), Ok(0x89ab_c456));
    assert_eq!(
        m.read_u32(0x5000 | (gla >> 12 & 0x3ff) << 2),
        Some(0x89ab_c063)
    );
    // Bits above 31 of the address do not exist.
    assert_eq!(translate(&m, &p, gla | 1 << 40, W), Ok(0x89ab_c456));
    // 4 MiB, PSE-36: bits 20:13 are address bits 39:32.
    m.put32(0x1000 | (gla >> 22) << 2, 0x8000_0000 | 0x12 << 13 | 0x83);
    assert_eq!(
        translate(&m, &p, gla, R),
        Ok(0x12_8000_0000 | gla & 0x3f_ffff)
    );
    let narrow = Paging { phys_bits: 36, ..p };
    assert!(matches!(
        translate(&m, &narrow, gla, R),
        Err(WalkError::Fault(PageFault { error_code, .. })) if error_code == PF_P | PF_RSVD
    ));
    // No NX, no SMEP: a fetch is not told apart.
    assert!(matches!(
        translate(&m, &p, 0x1234, X),
        Err(WalkError::Fault(PageFault {
            error_code: 0,
            cr2: 0x1234
        }))
    ));
}

#[test]
fn pae_paging() {
    let p = Paging {
        efer: EFER_NXE,
        cr3: 0x1020,
        ..LONG
    };
    let m = Mem::default();
    let gla = 0xc012_3456;
    m.put(0x1020 | 3 << 3, 0x5000 | PTE_P);
    m.put(0x5000 | index(gla, 2), 0x6000 | PTE_P | PTE_W);
    m.put(
        0x6000 | index(gla, 1),
        0x7_89ab_c000 | PTE_P | PTE_W | PTE_NX,
    );
    assert_eq!(translate(&m, &p, gla, W), Ok(0x7_89ab_c456));
    // PDPTEs have no accessed flag.
    assert_eq!(m.get(0x1020 | 3 << 3), 0x5000 | PTE_P);
    assert!(matches!(
        translate(&m, &p, gla, X),
        Err(WalkError::Fault(PageFault { error_code, .. })) if error_code == PF_P | PF_ID
    ));
    m.put(0x6000 | index(gla, 1), 1 << 55 | PTE_P);
    assert!(matches!(
        translate(&m, &p, gla, R),
        Err(WalkError::Fault(PageFault { error_code, .. })) if error_code == PF_P | PF_RSVD
    ));
}

#[test]
fn tables_outside_of_memory_are_told_apart_from_faults() {
    let p = Paging {
        cr3: 1 << 41,
        ..LONG
    };
    assert_eq!(
        translate(&Mem::default(), &p, GLA, R),
        Err(WalkError::NoMemory(1 << 41 | index(GLA, 4)))
    );
}

#[test]
fn instruction_across_two_pages() {
    let m = four(PTE_P);
    let at = GLA & !0xfff | 0xffc;
    m.put32(0xab_cdef_0ffc, 0x0403_0201);
    let f = fetch_instruction(&m, &LONG, at);
    assert_eq!(f.bytes(), [1, 2, 3, 4]);
    let next = (GLA & !0xfff) + 0x1000;
    assert_eq!(
        f.stop,
        Some(WalkError::Fault(PageFault {
            error_code: PF_ID,
            cr2: next
        }))
    );
    m.put(PT | index(next, 1), 0x7000 | PTE_P);
    m.put(0x7000, 0x0c0b_0a09_0807_0605);
    let f = fetch_instruction(&m, &LONG, at);
    assert_eq!(f.bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0]);
    assert_eq!(f.stop, None);
}

#[test]
fn a_traced_fetch_names_every_entry_that_it_used() {
    let m = four(PTE_P | PTE_W);
    let mut trail = Trail::default();
    let gpa = trace(&m, &LONG, GLA, Access::EXEC, &mut trail).unwrap();
    assert_eq!(gpa, translate(&m, &LONG, GLA, Access::EXEC).unwrap());
    let wanted = [(0x1000, 4), (PDPT, 3), (PD, 2), (PT, 1)];
    let wanted = wanted.map(|(table, level)| table | index(GLA, level));
    assert!(trail.entries().map(|(gpa, _)| gpa).eq(wanted));
    // Each decides: with any of them changed, the translation is another one.
    for (at, entry) in trail.entries() {
        m.put(at, 0);
        assert!(trace(&m, &LONG, GLA, Access::EXEC, &mut Trail::default()).is_err());
        m.put(at, entry);
    }
    assert!(trace(&m, &LONG, GLA, Access::EXEC, &mut Trail::default()).is_ok());
}

#[test]
fn a_trail_is_marked_when_a_walk_would_mark_nothing_more() {
    let m = four(PTE_P | PTE_W);
    let marked = |access| {
        let mut trail = Trail::default();
        trace(&m, &LONG, GLA, access, &mut trail).unwrap();
        trail.is_marked(access)
    };
    let both = Access::READ | Access::WRITE;
    assert!(!marked(R) && !marked(both));
    translate(&m, &LONG, GLA, R).unwrap();
    assert!(marked(R) && !marked(both));
    translate(&m, &LONG, GLA, both).unwrap();
    assert!(marked(R) && marked(both));
}
