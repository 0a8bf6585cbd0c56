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
}

/// How a kind of nested page table writes its entries. Levels are 4 (root) to
/// 1 (4 KiB leaves).
pub trait Format: 'static {
    /// Bits of an entry that hold an address.
    const ADDR_MASK: u64;
    /// Dirty bit of a leaf.
    const DIRTY: u64;
    /// An entry that points to a table, with all rights.
    fn table(pa: Hpa) -> u64;
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

    fn table(pa: Hpa) -> u64 {
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

/// Writable or executable without readable is a misconfiguration, or needs a
/// capability that not every CPU has.
fn readable(prot: Prot) -> Prot {
    prot | Prot::READ
}
