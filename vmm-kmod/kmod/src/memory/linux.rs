//! The memory of a segment, in pages that the kernel keeps no books of: in
//! chunks of the size of a second-level page, or where the host has no such
//! left, in single pages.

use alloc::boxed::Box;
use core::cell::Cell;

use vmm_core::host::{Host, HostPage, Hpa};

use super::{CHUNK, CHUNK_ORDER, PAGE};
use crate::errno;
use crate::os::{Os, yield_now};
use crate::sync::{NoMemory, try_slice, try_slice_zeroed};

/// Host memory that is allocated at first use.
pub struct Store {
    chunks: Box<[Cell<Chunk>]>,
    /// Bytes.
    len: u64,
    resident: Cell<u64>,
}

/// A chunk's memory, which goes back to the host when this is dropped.
#[derive(Default)]
pub enum Chunk {
    /// None so far.
    #[default]
    Empty,
    /// In one piece.
    Whole(Hpa),
    /// In pages, 0 for those that were not needed yet; and how many were.
    Pages(Box<[Hpa]>, u64),
}

impl Chunk {
    /// As [`Store::page`]; `whole`: all of the chunk is the segment's.
    fn page(&mut self, index: usize, whole: bool) -> Result<(Hpa, u32), i32> {
        if whole
            && matches!(self, Chunk::Empty)
            && let Some(page) = Os::alloc_pages(CHUNK_ORDER)
        {
            *self = Chunk::Whole(page.pa);
        }
        if let Chunk::Empty = self {
            // SAFETY: zero is a number.
            let pages = unsafe { try_slice_zeroed((CHUNK / PAGE) as usize) };
            *self = Chunk::Pages(pages.map_err(|_| errno::ENOMEM)?, 0);
        }
        match self {
            Chunk::Empty => Err(errno::ENOMEM),
            Chunk::Whole(pa) => Ok((*pa + index as u64 * PAGE, CHUNK_ORDER)),
            Chunk::Pages(pages, count) => {
                let slot = pages.get_mut(index).ok_or(errno::EFAULT)?;
                if *slot == 0 {
                    *slot = Os::alloc_page().ok_or(errno::ENOMEM)?.pa;
                    *count += 1;
                }
                Ok((*slot, 0))
            }
        }
    }

    /// Bytes of the host's.
    pub fn resident(&self) -> u64 {
        match self {
            Chunk::Empty => 0,
            Chunk::Whole(_) => CHUNK,
            Chunk::Pages(_, count) => count * PAGE,
        }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let free = |pa: Hpa, order| {
            let va = Os::phys_to_virt(pa);
            Os::free_pages(HostPage { va, pa }, order);
        };
        match self {
            Chunk::Empty => {}
            Chunk::Whole(pa) => free(*pa, CHUNK_ORDER),
            Chunk::Pages(pages, _) => pages
                .iter()
                .filter(|p| **p != 0)
                .for_each(|pa| free(*pa, 0)),
        }
    }
}

impl Store {
    /// Room for `len` bytes.
    pub fn new(len: u64) -> Result<Self, NoMemory> {
        let count = usize::try_from(len.div_ceil(CHUNK)).map_err(|_| NoMemory)?;
        Ok(Store {
            chunks: try_slice(count, |_| Cell::default())?,
            len,
            resident: Cell::new(0),
        })
    }

    /// The page at `off`, allocated if need be, and the order of the contiguous
    /// run around it. EFAULT: behind the end. ENOMEM.
    pub fn page(&self, off: u64) -> Result<(Hpa, u32), i32> {
        let slot = self.chunks.get((off / CHUNK) as usize);
        let slot = slot.filter(|_| off < self.len).ok_or(errno::EFAULT)?;
        let whole = self.len - off / CHUNK * CHUNK >= CHUNK;
        let mut chunk = slot.take();
        let before = chunk.resident();
        let page = chunk.page((off % CHUNK / PAGE) as usize, whole);
        let added = chunk.resident() - before;
        slot.set(chunk);
        self.resident.set(self.resident.get() + added);
        page
    }

    /// Takes what is at `off` out of the segment. It always can.
    pub fn detach(&self, off: u64) -> Result<Chunk, i32> {
        let slot = self.chunks.get((off / CHUNK) as usize);
        let chunk = slot.map(Cell::take).unwrap_or_default();
        self.resident.set(self.resident.get() - chunk.resident());
        Ok(chunk)
    }

    /// Bytes allocated so far.
    pub fn resident(&self) -> u64 {
        self.resident.get()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        for chunk in &mut self.chunks {
            drop(chunk.take());
            // There may be many; a signal has no say in it.
            yield_now();
        }
    }
}
