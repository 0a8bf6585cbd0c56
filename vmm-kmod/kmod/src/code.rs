//! The page of code that an exiting instruction was on last, remembered so that
//! the next exit from there costs no walk of the guest's page tables: on CPUs
//! that do not tell an instruction's length every CPUID or RDMSR needs its
//! bytes.

use core::ptr;

use vmm_core::paging::{self, Paging, Trail};

use crate::memory::{GuestMemory, PROT_READ};

const PAGE: u64 = 4096;

/// A translation of one page, and the page-table entries that it came from.
/// They are read again at each use, so that the guest may change them at any
/// time without telling.
pub struct CodePage {
    /// 0: nothing is remembered.
    generation: u64,
    page: u64,
    state: Paging,
    /// Host address and contents of each entry.
    entries: [(usize, u64); 5],
    depth: usize,
    /// Host address of the page.
    va: usize,
}

impl CodePage {
    /// Nothing.
    pub const fn new() -> Self {
        CodePage {
            generation: 0,
            page: 0,
            state: Paging::OFF,
            entries: [(0, 0); 5],
            depth: 0,
            va: 0,
        }
    }

    /// The first bytes of the instruction at linear address `gla`, if its page
    /// is the one remembered and the translation still holds. `generation` is
    /// that of the nested page tables: memory that was mapped in it stays where
    /// it is until this vCPU has left the run loop.
    #[inline]
    pub fn bytes(&self, state: &Paging, gla: u64, generation: u64) -> Option<[u8; 3]> {
        let offset = gla & (PAGE - 1);
        if self.generation != generation
            || self.page != gla & !(PAGE - 1)
            || offset > PAGE - 3
            || self.state != *state
        {
            return None;
        }
        for (va, entry) in self.entries.iter().take(self.depth) {
            // SAFETY: an aligned word of guest memory in the direct map, by
            // `remember` and the generation; the guest writes it at will.
            if unsafe { ptr::read_volatile(*va as *const u64) } != *entry {
                return None;
            }
        }
        let at = self.va + offset as usize;
        // SAFETY: three bytes of a page of guest memory, likewise.
        Some(unsafe { ptr::read_volatile(at as *const [u8; 3]) })
    }

    /// Remembers the page around `gla`, if it is one of 64-bit paging.
    #[cold]
    pub fn remember(&mut self, mem: &GuestMemory<'_>, state: &Paging, gla: u64, generation: u64) {
        self.generation = 0;
        if !state.long() {
            return;
        }
        let mut trail = Trail::default();
        let page = gla & !(PAGE - 1);
        let Ok(gpa) = paging::trace_fetch(mem, state, page, &mut trail) else {
            return;
        };
        self.depth = 0;
        for (to, (gpa, entry)) in self.entries.iter_mut().zip(trail.entries()) {
            let Some(va) = mem.word(gpa, 8, PROT_READ) else {
                return;
            };
            *to = (va, entry);
            self.depth += 1;
        }
        if let Some(va) = mem.word(gpa, 8, PROT_READ) {
            self.va = va;
            self.page = page;
            self.state = *state;
            self.generation = generation;
        }
    }
}
