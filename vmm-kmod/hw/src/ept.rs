//! Nested page tables: guest-physical to host-physical.
//!
//! The walker is generic over the entry [`Format`]; [`EptFormat`] is VT-x's
//! (SDM Vol. 3C §28.2.2), [`NptFormat`] AMD-V's, [`VtdFormat`] and [`AmdviFormat`] IOMMUs'. CPUs walk the tables while they change: every entry
//! is one atomic store, a new table is complete before it is linked, and a
//! table that was unlinked is kept until [`Ept::reclaim`].

mod format;
#[cfg(test)]
mod tests;

pub use format::{AmdviFormat, EptFormat, Format, MemType, NptFormat, Prot, VtdFormat};

use crate::error::Error;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU64, Ordering};
use vmm_core::host::{Gpa, Host, HostPage, Hpa};

/// Bytes that an entry of a level maps; level 1 has 4 KiB leaves.
const fn span(level: u8) -> u64 {
    1 << (12 + 9 * (level as u32 - 1))
}

const TOP: u8 = 4;
/// One more than the highest guest-physical address that 4 levels reach.
pub const GPA_LIMIT: Gpa = 1 << 48;
const PAGE: u64 = 4096;

/// What the CPU's tables can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// 2 MiB leaves.
    pub pages_2m: bool,
    /// 1 GiB leaves.
    pub pages_1g: bool,
    /// Accessed and dirty bits.
    pub accessed_dirty: bool,
}

/// Whether translations that a CPU may have cached became wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Invalidation {
    /// Nothing that was usable has changed.
    None,
    /// The generation has been raised: vCPUs invalidate before their next
    /// entry. Kick those in guest mode, wait until they left it, and only
    /// then reuse the memory and call [`Ept::reclaim`].
    Required,
}

/// Which address-space generation each CPU has seen. Shared between the
/// tables' owner and the vCPUs, without a lock.
pub struct Generation {
    current: AtomicU64,
    seen: Box<[AtomicU64]>,
}

impl Generation {
    fn new(cpus: u32) -> Result<Self, Error> {
        let mut seen = Vec::new();
        seen.try_reserve_exact(cpus as usize)
            .map_err(|_| Error::NoMemory)?;
        seen.resize_with(cpus as usize, || AtomicU64::new(0));
        // No CPU has seen generation 1: the first entry on each invalidates
        // what an earlier owner of the root page left.
        Ok(Generation {
            current: AtomicU64::new(1),
            seen: seen.into_boxed_slice(),
        })
    }

    /// The newest generation.
    #[inline]
    pub fn current(&self) -> u64 {
        self.current.load(Ordering::Acquire)
    }

    /// The generation that `cpu` has seen; 0 if none.
    pub fn seen(&self, cpu: u32) -> u64 {
        self.seen
            .get(cpu as usize)
            .map_or(0, |g| g.load(Ordering::Relaxed))
    }

    /// Notes that `cpu` has invalidated everything older than `generation`.
    pub fn set_seen(&self, cpu: u32, generation: u64) {
        if let Some(g) = self.seen.get(cpu as usize) {
            g.store(generation, Ordering::Relaxed);
        }
    }

    /// Raises the generation by hand.
    pub fn raise(&self) {
        self.current.fetch_add(1, Ordering::AcqRel);
    }
}

/// A translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Host-physical address of the byte asked for.
    pub hpa: Hpa,
    /// What is allowed.
    pub prot: Prot,
    /// Size of the leaf: 4 KiB, 2 MiB or 1 GiB, in bytes.
    pub page_size: u64,
    /// The leaf was used (always false without A/D bits).
    pub accessed: bool,
    /// The leaf was written to (always false without A/D bits).
    pub dirty: bool,
}

/// A guest-physical address space. The owner keeps it behind a lock.
pub struct Ept<H: Host, F: Format = EptFormat> {
    root: HostPage,
    options: Options,
    generation: Arc<Generation>,
    /// Unlinked tables, chained through their first entry.
    retired: Option<Hpa>,
    tables: u64,
    marker: PhantomData<fn() -> (H, F)>,
}

impl<H: Host, F: Format> Ept<H, F> {
    /// An empty address space.
    pub fn new(options: Options) -> Result<Self, Error> {
        let generation = Arc::new(Generation::new(H::max_cpus())?);
        let root = H::alloc_page().ok_or(Error::NoMemory)?;
        Ok(Ept {
            root,
            options,
            generation,
            retired: None,
            tables: 1,
            marker: PhantomData,
        })
    }

    /// Physical address of the root table.
    pub fn root_pa(&self) -> Hpa {
        self.root.pa
    }

    /// Physical address of the table that a walk of `levels` (3 or 4) begins
    /// with; with 3 it sees the lowest 512 GiB.
    pub fn root_of(&mut self, levels: u8) -> Result<Hpa, Error> {
        match levels {
            TOP => Ok(self.root.pa),
            3 => self.descend(0, 3),
            _ => Err(Error::Invalid),
        }
    }

    /// Calls `f` with the physical address of each table.
    pub fn each_table(&self, f: &mut impl FnMut(Hpa)) {
        self.tables_below(self.root.pa, TOP, f);
    }

    fn tables_below(&self, table: Hpa, level: u8, f: &mut impl FnMut(Hpa)) {
        f(table);
        if level == 1 {
            return;
        }
        for i in 0..512u64 {
            let e = self
                .entry(table, i * span(level), level)
                .load(Ordering::Acquire);
            if F::present(e) && !F::is_leaf(e, level) {
                self.tables_below(F::addr(e), level - 1, f);
            }
        }
    }

    /// An entry of a table above the root that leads to the root.
    pub fn link(&self) -> u64 {
        F::table(self.root.pa, TOP + 1)
    }

    /// The generation counters, for vCPUs.
    pub fn generation(&self) -> Arc<Generation> {
        self.generation.clone()
    }

    /// Table pages in use, retired ones not counted.
    pub fn table_pages(&self) -> u64 {
        self.tables
    }

    fn entry(&self, table: Hpa, gpa: Gpa, level: u8) -> &AtomicU64 {
        let index = (gpa >> (12 + 9 * (u32::from(level) - 1))) & 511;
        let va = H::phys_to_virt(table) + index as usize * 8;
        // SAFETY: `table` is a live page of this tree (or a retired one),
        // owned by self, and the masked index stays within its 512 entries.
        unsafe { &*(va as *const AtomicU64) }
    }

    fn leaf_levels(&self) -> u8 {
        match (self.options.pages_1g, self.options.pages_2m) {
            (true, true) => 3,
            (_, true) => 2,
            _ => 1,
        }
    }

    /// Largest leaf level for a chunk.
    fn fit(&self, gpa: Gpa, hpa: Hpa, len: u64) -> u8 {
        let mut level = self.leaf_levels();
        while level > 1 && ((gpa | hpa) & (span(level) - 1) != 0 || len < span(level)) {
            level -= 1;
        }
        level
    }

    fn alloc_table(&mut self) -> Result<HostPage, Error> {
        let page = H::alloc_page().ok_or(Error::NoMemory)?;
        self.tables += 1;
        Ok(page)
    }

    /// Splits the leaf in `e` (at `level` > 1) into a table of smaller leaves
    /// that translate the same.
    fn split(&mut self, table: Hpa, gpa: Gpa, level: u8) -> Result<Hpa, Error> {
        let old = self.entry(table, gpa, level).load(Ordering::Acquire);
        let page = self.alloc_table()?;
        let step = span(level - 1);
        for i in 0..512u64 {
            let part = F::shrink_leaf(old, level, i * step);
            self.entry(page.pa, i * step, level - 1)
                .store(part, Ordering::Relaxed);
        }
        // A CPU may set A/D bits in the old leaf until this store; they would
        // only be lost for a page that is about to change anyway.
        self.entry(table, gpa, level)
            .store(F::table(page.pa, level), Ordering::Release);
        Ok(page.pa)
    }

    /// The table of `level` that holds the entry for `gpa`, made at need.
    fn descend(&mut self, gpa: Gpa, level: u8) -> Result<Hpa, Error> {
        let mut table = self.root.pa;
        let mut at = TOP;
        while at > level {
            let e = self.entry(table, gpa, at).load(Ordering::Acquire);
            table = if !F::present(e) {
                let page = self.alloc_table()?;
                self.entry(table, gpa, at)
                    .store(F::table(page.pa, at), Ordering::Release);
                page.pa
            } else if F::is_leaf(e, at) {
                self.split(table, gpa, at)?
            } else {
                F::addr(e)
            };
            at -= 1;
        }
        Ok(table)
    }

    /// Unlinks a table and all below it; the pages wait for `reclaim`.
    fn retire(&mut self, table: Hpa, level: u8) {
        if level > 1 {
            for i in 0..512u64 {
                let e = self
                    .entry(table, i * span(level), level)
                    .load(Ordering::Acquire);
                if F::present(e) && !F::is_leaf(e, level) {
                    self.retire(F::addr(e), level - 1);
                }
            }
        }
        // A CPU that still walks here finds "not present" in the first entry.
        // The address is stored inverted, so that speculation past that
        // (L1TF) reaches no memory.
        let next = self.retired.map_or(0, |pa| !pa & F::ADDR_MASK);
        self.entry(table, 0, 1).store(next, Ordering::Release);
        self.retired = Some(table);
        self.tables = self.tables.saturating_sub(1);
    }

    /// Frees unlinked tables. Call after every CPU that could walk them has
    /// left the guest and invalidated (see [`Invalidation::Required`]).
    pub fn reclaim(&mut self) {
        while let Some(pa) = self.retired.take() {
            let next = self.entry(pa, 0, 1).load(Ordering::Relaxed);
            self.retired = (next != 0).then_some(!next & F::ADDR_MASK);
            H::free_pages(
                HostPage {
                    va: H::phys_to_virt(pa),
                    pa,
                },
                0,
            );
        }
    }

    fn finish(&self, changed: bool) -> Invalidation {
        if changed {
            self.generation.raise();
            Invalidation::Required
        } else {
            Invalidation::None
        }
    }

    fn check(gpa: Gpa, size: u64) -> Result<(), Error> {
        if size == 0 || (gpa | size) & (PAGE - 1) != 0 {
            return Err(Error::Invalid);
        }
        match gpa.checked_add(size) {
            Some(end) if end <= GPA_LIMIT => Ok(()),
            _ => Err(Error::OutOfRange),
        }
    }

    /// Maps `size` bytes at `gpa` to the host-physical range at `hpa`, in the
    /// largest pages that alignment allows, replacing what was there. All
    /// three are multiples of 4 KiB. On an error a part may be mapped.
    pub fn map(
        &mut self,
        gpa: Gpa,
        hpa: Hpa,
        size: u64,
        prot: Prot,
        memory: MemType,
    ) -> Result<Invalidation, Error> {
        Self::check(gpa, size)?;
        if hpa & (PAGE - 1) != 0
            || hpa
                .checked_add(size)
                .is_none_or(|e| e - 1 > F::ADDR_MASK | 0xfff)
        {
            return Err(Error::Invalid);
        }
        let mut changed = false;
        let mut done = 0;
        let result = loop {
            if done >= size {
                break Ok(());
            }
            let (g, h) = (gpa + done, hpa + done);
            let level = self.fit(g, h, size - done);
            let table = match self.descend(g, level) {
                Ok(t) => t,
                Err(e) => break Err(e),
            };
            let new = F::leaf(h, prot, memory, level, self.options.accessed_dirty);
            changed |= self.replace(table, g, level, new);
            done += span(level);
        };
        let invalidation = self.finish(changed);
        result.map(|()| invalidation)
    }

    /// Stores an entry; whether cached translations became wrong.
    fn replace(&mut self, table: Hpa, gpa: Gpa, level: u8, new: u64) -> bool {
        let old = self.entry(table, gpa, level).swap(new, Ordering::AcqRel);
        if !F::present(old) {
            return false;
        }
        if !F::is_leaf(old, level) {
            self.retire(F::addr(old), level - 1);
            return true;
        }
        // Rights that only grew need no invalidation: the CPU re-walks on an
        // EPT violation (SDM Vol. 3C §28.3.3.1).
        !F::same_but_more(old, new)
    }

    /// Calls `f` for each present leaf in the range, splitting those that
    /// reach over its ends; stores what `f` returns.
    fn update(
        &mut self,
        gpa: Gpa,
        size: u64,
        f: &mut impl FnMut(u64, u8) -> u64,
    ) -> Result<Invalidation, Error> {
        Self::check(gpa, size)?;
        let end = gpa + size;
        let mut at = gpa;
        let mut changed = false;
        let mut result = Ok(());
        while at < end {
            let mut table = self.root.pa;
            let mut level = TOP;
            let step = loop {
                let e = self.entry(table, at, level).load(Ordering::Acquire);
                let start = at & !(span(level) - 1);
                if !F::present(e) {
                    break start + span(level) - at;
                }
                if F::is_leaf(e, level) {
                    if start == at && end - at >= span(level) {
                        let new = f(e, level);
                        changed |= self.replace(table, at, level, new);
                        break span(level);
                    }
                    match self.split(table, at, level) {
                        Ok(t) => table = t,
                        Err(error) => {
                            result = Err(error);
                            break end - at;
                        }
                    }
                } else {
                    table = F::addr(e);
                }
                level -= 1;
            };
            at += step;
        }
        let invalidation = self.finish(changed);
        result.map(|()| invalidation)
    }

    /// Unmaps a range. Fails (ENOMEM) only where a large page has to be
    /// split.
    pub fn unmap(&mut self, gpa: Gpa, size: u64) -> Result<Invalidation, Error> {
        self.update(gpa, size, &mut |_, _| 0)
    }

    /// Changes what is allowed in the mapped parts of a range; no rights at
    /// all unmaps.
    pub fn protect(&mut self, gpa: Gpa, size: u64, prot: Prot) -> Result<Invalidation, Error> {
        self.update(gpa, size, &mut |e, _| F::with_prot(e, prot))
    }

    /// Calls `f` with gpa and size of each leaf in the range that was written
    /// to, and clears its dirty bit.
    pub fn harvest_dirty(
        &mut self,
        gpa: Gpa,
        size: u64,
        mut f: impl FnMut(Gpa, u64),
    ) -> Result<Invalidation, Error> {
        Self::check(gpa, size)?;
        let (mut at, end) = (gpa, gpa + size);
        let mut changed = false;
        while at < end {
            let (table, level) = self.find(at);
            let start = at & !(span(level) - 1);
            let entry = self.entry(table, at, level);
            let e = entry.load(Ordering::Acquire);
            if F::present(e) && F::dirty(e) {
                entry.fetch_and(!F::DIRTY, Ordering::AcqRel);
                f(start, span(level));
                changed = true;
            }
            at = start + span(level);
        }
        Ok(self.finish(changed))
    }

    /// Table and level of the last entry on the way to `gpa`.
    fn find(&self, gpa: Gpa) -> (Hpa, u8) {
        let mut table = self.root.pa;
        let mut level = TOP;
        loop {
            let e = self.entry(table, gpa, level).load(Ordering::Acquire);
            if !F::present(e) || F::is_leaf(e, level) {
                return (table, level);
            }
            table = F::addr(e);
            level -= 1;
        }
    }

    /// Where `gpa` goes, if anywhere.
    pub fn translate(&self, gpa: Gpa) -> Option<Translation> {
        if gpa >= GPA_LIMIT {
            return None;
        }
        let (table, level) = self.find(gpa);
        let e = self.entry(table, gpa, level).load(Ordering::Acquire);
        F::present(e).then(|| Translation {
            hpa: F::leaf_addr(e, level) | gpa & (span(level) - 1),
            prot: F::prot(e),
            page_size: span(level),
            accessed: F::accessed(e),
            dirty: F::dirty(e),
        })
    }

    /// The entries on the way to `gpa`, top first, and how many there are.
    pub fn walk(&self, gpa: Gpa) -> ([u64; 4], usize) {
        let mut ptes = [0; 4];
        let mut n = 0;
        let mut table = self.root.pa;
        let mut level = TOP;
        for slot in &mut ptes {
            let e = self
                .entry(table, gpa & (GPA_LIMIT - 1), level)
                .load(Ordering::Acquire);
            *slot = e;
            n += 1;
            if !F::present(e) || F::is_leaf(e, level) {
                break;
            }
            table = F::addr(e);
            level -= 1;
        }
        (ptes, n)
    }
}

impl<H: Host> Ept<H, EptFormat> {
    /// The EPT pointer for the VMCS (SDM Vol. 3C §24.6.11): write-back
    /// structures, 4 levels.
    pub fn eptp(&self) -> u64 {
        self.root.pa | 6 | 3 << 3 | u64::from(self.options.accessed_dirty) << 6
    }
}

impl<H: Host, F: Format> Drop for Ept<H, F> {
    fn drop(&mut self) {
        // Nothing runs in this address space any more.
        self.retire(self.root.pa, TOP);
        self.reclaim();
    }
}
