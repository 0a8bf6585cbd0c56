//! Formats of nested page-table entries.

use bitflags::bitflags;
use vmm_core::host::Hpa;

bitflags! {
    /// What a guest may do with a page.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Prot: u8 {
        /// Data reads.
        const READ = 1;
        /// Data writes.
        const WRITE = 2;
        /// Instruction fetches.
        const EXEC = 4;
    }
}

impl Prot {
    /// Everything.
    pub const RWX: Prot = Prot::all();
    /// Reads and fetches.
    pub const RX: Prot = Prot::READ.union(Prot::EXEC);
}

/// Memory type of a leaf (SDM Vol. 3A §11.3, encodings of table 11-12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MemType {
    /// UC.
    Uncacheable = 0,
    /// WC.
    WriteCombining = 1,
    /// WT.
    WriteThrough = 4,
    /// WP.
    WriteProtected = 5,
    /// WB.
    WriteBack = 6,
    /// UC-: uncacheable, but WC where the guest's own PAT says so.
    UncacheableMinus = 7,
}

/// How a kind of nested page table writes its entries. Levels are 4 (root) to
/// 1 (4 KiB leaves).
pub trait Format: 'static {
    /// Bits of an entry that hold an address.
    const ADDR_MASK: u64;
    /// Dirty bit of a leaf.
    const DIRTY: u64;
    /// An entry of this level that points to a table, with all rights.
    fn table(pa: Hpa, level: u8) -> u64;
    /// A leaf. Without rights it is "not present".
    fn leaf(pa: Hpa, prot: Prot, memory: MemType, level: u8, accessed_dirty: bool) -> u64;
    /// Whether the entry leads anywhere.
    fn present(e: u64) -> bool;
    /// Whether a present entry of this level is a leaf.
    fn is_leaf(e: u64, level: u8) -> bool;
    /// Address of the table that an entry points to.
    fn addr(e: u64) -> Hpa {
        e & Self::ADDR_MASK
    }
    /// Address of the page that a leaf maps.
    fn leaf_addr(e: u64, level: u8) -> Hpa;
    /// The leaf of the level below at `offset` in this leaf.
    fn shrink_leaf(e: u64, level: u8, offset: u64) -> u64;
    /// Rights of a leaf.
    fn prot(e: u64) -> Prot;
    /// The same leaf with other rights; without any it is "not present".
    fn with_prot(e: u64, prot: Prot) -> u64;
    /// Whether `new` translates as `old` does and allows at least as much.
    fn same_but_more(old: u64, new: u64) -> bool;
    /// Accessed bit.
    fn accessed(e: u64) -> bool;
    /// Dirty bit.
    fn dirty(e: u64) -> bool;
}

/// VT-x extended page tables (SDM Vol. 3C tables 28-1 to 28-6).
pub struct EptFormat;

const RIGHTS: u64 = 7;
const TYPE_SHIFT: u32 = 3;
const IGNORE_PAT: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;

impl Format for EptFormat {
    const ADDR_MASK: u64 = 0x000f_ffff_ffff_f000;
    const DIRTY: u64 = DIRTY;

    fn table(pa: Hpa, _level: u8) -> u64 {
        pa & Self::ADDR_MASK | RIGHTS
    }

    fn leaf(pa: Hpa, prot: Prot, memory: MemType, level: u8, _accessed_dirty: bool) -> u64 {
        if prot.is_empty() {
            return 0;
        }
        // Ordinary memory is coherent, whatever the guest's PAT says; device
        // memory stays uncached.
        let ipat = match memory {
            MemType::WriteBack | MemType::Uncacheable => IGNORE_PAT,
            _ => 0,
        };
        let large = if level > 1 { LARGE } else { 0 };
        // The table knows no UC-: it is UC without "ignore PAT" (SDM Vol. 3C
        // §28.3.7.2 and Vol. 3A table 11-7).
        let memory = match memory {
            MemType::UncacheableMinus => MemType::Uncacheable,
            other => other,
        };
        pa & Self::ADDR_MASK
            | u64::from(readable(prot).bits())
            | (memory as u64) << TYPE_SHIFT
            | ipat
            | large
    }

    fn present(e: u64) -> bool {
        e & RIGHTS != 0
    }

    fn is_leaf(e: u64, level: u8) -> bool {
        level == 1 || e & LARGE != 0
    }

    fn leaf_addr(e: u64, level: u8) -> Hpa {
        e & Self::ADDR_MASK & !(super::span(level) - 1)
    }

    fn shrink_leaf(e: u64, level: u8, offset: u64) -> u64 {
        let large = if level > 2 { LARGE } else { 0 };
        (Self::leaf_addr(e, level) + offset) | e & !(Self::ADDR_MASK | LARGE) | large
    }

    fn prot(e: u64) -> Prot {
        Prot::from_bits_truncate((e & RIGHTS) as u8)
    }

    fn with_prot(e: u64, prot: Prot) -> u64 {
        if prot.is_empty() {
            0
        } else {
            e & !RIGHTS | u64::from(readable(prot).bits())
        }
    }

    fn same_but_more(old: u64, new: u64) -> bool {
        let ignored = RIGHTS | ACCESSED | DIRTY;
        (old ^ new) & !ignored == 0 && old & RIGHTS & !new == 0
    }

    fn accessed(e: u64) -> bool {
        e & ACCESSED != 0
    }

    fn dirty(e: u64) -> bool {
        e & DIRTY != 0
    }
}

/// AMD-V nested page tables: long-mode entries as the host's own (APM Vol. 2
/// §15.25, §5.3.3). Every access counts as a user's.
pub struct NptFormat;

const NPT_PRESENT: u64 = 1;
const NPT_WRITE: u64 = 2;
const NPT_USER: u64 = 4;
const NPT_PWT: u64 = 8;
const NPT_PCD: u64 = 0x10;
const NPT_ACCESSED: u64 = 0x20;
const NPT_DIRTY: u64 = 0x40;
const NPT_NX: u64 = 1 << 63;

impl NptFormat {
    fn rights(prot: Prot) -> u64 {
        let mut e = NPT_PRESENT | NPT_USER;
        if prot.contains(Prot::WRITE) {
            e |= NPT_WRITE;
        }
        if !prot.contains(Prot::EXEC) {
            e |= NPT_NX;
        }
        e
    }
}

impl Format for NptFormat {
    const ADDR_MASK: u64 = 0x000f_ffff_ffff_f000;
    const DIRTY: u64 = NPT_DIRTY;

    fn table(pa: Hpa, _level: u8) -> u64 {
        pa & Self::ADDR_MASK | NPT_PRESENT | NPT_WRITE | NPT_USER
    }

    fn leaf(pa: Hpa, prot: Prot, memory: MemType, level: u8, _accessed_dirty: bool) -> u64 {
        if prot.is_empty() {
            return 0;
        }
        // The host's PAT says what the bits select. Linux and FreeBSD agree on
        // WB for 0, UC- for PCD (a guest's own PAT may make it WC) and UC for
        // both.
        let kind = match memory {
            MemType::WriteBack => 0,
            MemType::WriteCombining | MemType::UncacheableMinus => NPT_PCD,
            _ => NPT_PCD | NPT_PWT,
        };
        let large = if level > 1 { LARGE } else { 0 };
        pa & Self::ADDR_MASK | Self::rights(prot) | kind | large
    }

    fn present(e: u64) -> bool {
        e & NPT_PRESENT != 0
    }

    fn is_leaf(e: u64, level: u8) -> bool {
        level == 1 || e & LARGE != 0
    }

    fn leaf_addr(e: u64, level: u8) -> Hpa {
        e & Self::ADDR_MASK & !(super::span(level) - 1)
    }

    fn shrink_leaf(e: u64, level: u8, offset: u64) -> u64 {
        let large = if level > 2 { LARGE } else { 0 };
        (Self::leaf_addr(e, level) + offset) | e & !(Self::ADDR_MASK | LARGE) | large
    }

    fn prot(e: u64) -> Prot {
        let mut prot = Prot::READ;
        prot.set(Prot::WRITE, e & NPT_WRITE != 0);
        prot.set(Prot::EXEC, e & NPT_NX == 0);
        prot
    }

    fn with_prot(e: u64, prot: Prot) -> u64 {
        if prot.is_empty() {
            0
        } else {
            e & !(NPT_WRITE | NPT_NX) | Self::rights(prot)
        }
    }

    fn same_but_more(old: u64, new: u64) -> bool {
        let ignored = NPT_WRITE | NPT_NX | NPT_ACCESSED | NPT_DIRTY;
        (old ^ new) & !ignored == 0 && old & NPT_WRITE & !new == 0 && new & NPT_NX & !old == 0
    }

    fn accessed(e: u64) -> bool {
        e & NPT_ACCESSED != 0
    }

    fn dirty(e: u64) -> bool {
        e & NPT_DIRTY != 0
    }
}

/// VT-d second-level tables as legacy-mode translation walks them (VT-d 4.1
/// §3.7, §9.8). There are no memory types, accessed or dirty bits.
pub struct VtdFormat;

const VTD_RIGHTS: u64 = 3;

impl Format for VtdFormat {
    const ADDR_MASK: u64 = 0x000f_ffff_ffff_f000;
    const DIRTY: u64 = 0;

    fn table(pa: Hpa, _level: u8) -> u64 {
        pa & Self::ADDR_MASK | VTD_RIGHTS
    }

    fn leaf(pa: Hpa, prot: Prot, _memory: MemType, level: u8, _accessed_dirty: bool) -> u64 {
        let rights = u64::from(prot.bits()) & VTD_RIGHTS;
        if rights == 0 {
            return 0;
        }
        let large = if level > 1 { LARGE } else { 0 };
        pa & Self::ADDR_MASK | rights | large
    }

    fn present(e: u64) -> bool {
        e & VTD_RIGHTS != 0
    }

    fn is_leaf(e: u64, level: u8) -> bool {
        level == 1 || e & LARGE != 0
    }

    fn leaf_addr(e: u64, level: u8) -> Hpa {
        e & Self::ADDR_MASK & !(super::span(level) - 1)
    }

    fn shrink_leaf(e: u64, level: u8, offset: u64) -> u64 {
        EptFormat::shrink_leaf(e, level, offset)
    }

    fn prot(e: u64) -> Prot {
        Prot::from_bits_truncate((e & VTD_RIGHTS) as u8)
    }

    fn with_prot(e: u64, prot: Prot) -> u64 {
        match u64::from(prot.bits()) & VTD_RIGHTS {
            0 => 0,
            rights => e & !VTD_RIGHTS | rights,
        }
    }

    fn same_but_more(old: u64, new: u64) -> bool {
        (old ^ new) & !VTD_RIGHTS == 0 && old & VTD_RIGHTS & !new == 0
    }

    fn accessed(_: u64) -> bool {
        false
    }

    fn dirty(_: u64) -> bool {
        false
    }
}

/// AMD-Vi I/O page tables, version 1 (AMD I/O Virtualization Technology
/// Specification §2.2.3). Accessed and dirty bits are not used.
pub struct AmdviFormat;

const AMDVI_PRESENT: u64 = 1;
const AMDVI_NEXT_SHIFT: u32 = 9;
const AMDVI_NEXT: u64 = 7 << AMDVI_NEXT_SHIFT;
const AMDVI_COHERENT: u64 = 1 << 60;
const AMDVI_READ: u64 = 1 << 61;
const AMDVI_WRITE: u64 = 1 << 62;

impl AmdviFormat {
    fn rights(prot: Prot) -> u64 {
        let mut e = 0;
        if prot.contains(Prot::READ) {
            e |= AMDVI_READ;
        }
        if prot.contains(Prot::WRITE) {
            e |= AMDVI_WRITE;
        }
        e
    }
}

impl Format for AmdviFormat {
    const ADDR_MASK: u64 = 0x000f_ffff_ffff_f000;
    const DIRTY: u64 = 0;

    fn table(pa: Hpa, level: u8) -> u64 {
        let next = u64::from(level - 1) << AMDVI_NEXT_SHIFT;
        pa & Self::ADDR_MASK | next | AMDVI_PRESENT | AMDVI_READ | AMDVI_WRITE
    }

    fn leaf(pa: Hpa, prot: Prot, _memory: MemType, _level: u8, _accessed_dirty: bool) -> u64 {
        match Self::rights(prot) {
            0 => 0,
            rights => pa & Self::ADDR_MASK | rights | AMDVI_PRESENT | AMDVI_COHERENT,
        }
    }

    fn present(e: u64) -> bool {
        e & AMDVI_PRESENT != 0
    }

    fn is_leaf(e: u64, _level: u8) -> bool {
        e & AMDVI_NEXT == 0
    }

    fn leaf_addr(e: u64, level: u8) -> Hpa {
        e & Self::ADDR_MASK & !(super::span(level) - 1)
    }

    fn shrink_leaf(e: u64, level: u8, offset: u64) -> u64 {
        (Self::leaf_addr(e, level) + offset) | e & !Self::ADDR_MASK
    }

    fn prot(e: u64) -> Prot {
        let mut prot = Prot::empty();
        prot.set(Prot::READ, e & AMDVI_READ != 0);
        prot.set(Prot::WRITE, e & AMDVI_WRITE != 0);
        prot
    }

    fn with_prot(e: u64, prot: Prot) -> u64 {
        match Self::rights(prot) {
            0 => 0,
            rights => e & !(AMDVI_READ | AMDVI_WRITE) | rights,
        }
    }

    fn same_but_more(old: u64, new: u64) -> bool {
        let rights = AMDVI_READ | AMDVI_WRITE;
        (old ^ new) & !rights == 0 && old & rights & !new == 0
    }

    fn accessed(_: u64) -> bool {
        false
    }

    fn dirty(_: u64) -> bool {
        false
    }
}

/// Writable or executable without readable is a misconfiguration, or needs a
/// capability that not every CPU has.
fn readable(prot: Prot) -> Prot {
    prot | Prot::READ
}
