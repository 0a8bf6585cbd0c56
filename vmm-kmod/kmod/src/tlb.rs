//! Pages that instructions which exited were on, or reached, remembered so that the
//! next such exit costs no walk of the guest's page tables: on CPUs that do not tell
//! an instruction's length every CPUID or RDMSR needs its bytes, and device memory
//! needs them anywhere; and where the CPU does not tell the linear address of such an
//! access either, its operand's has to be translated.

use core::ptr;

use vmm_core::cpu::Access;
use vmm_core::paging::{self, Fetched, MAX_INST, Paging, Trail};

use crate::memory::{GuestMemory, PROT_READ};

const PAGE: u64 = 4096;

/// A translation of one page, and the page-table entries that it came from.
/// They are read again at each use, so that the guest may change them at any
/// time without telling.
#[derive(Clone, Copy)]
struct Page {
    /// 0: nothing is remembered.
    generation: u64,
    gla: u64,
    state: Paging,
    /// What it allows.
    access: Access,
    /// Host address and contents of each entry.
    entries: [(usize, u64); 5],
    depth: usize,
    /// Host address of a page of code, guest-physical one of a page of data.
    to: u64,
}

impl Page {
    const NONE: Page = Page {
        generation: 0,
        gla: 0,
        state: Paging::OFF,
        access: Access::empty(),
        entries: [(0, 0); 5],
        depth: 0,
        to: 0,
    };

    /// Whether it is the page around `gla` and the translation still holds.
    /// `generation` is that of the nested page tables: memory that was mapped in it
    /// stays where it is until this vCPU has left the run loop.
    #[inline]
    #[optimize(speed)]
    fn holds(&self, state: &Paging, gla: u64, generation: u64) -> bool {
        if self.generation != generation || self.gla != gla & !(PAGE - 1) || self.state != *state {
            return false;
        }
        for (va, entry) in self.entries.iter().take(self.depth) {
            // SAFETY: an aligned word of guest memory in the direct map, by
            // `learn` and the generation; the guest writes it at will.
            if unsafe { ptr::read_volatile(*va as *const u64) } != *entry {
                return false;
            }
        }
        true
    }

    /// Becomes the translation of the page around `gla`, if it is one of 64-bit paging
    /// that allows `access` and leaves nothing to be marked as accessed or dirty.
    /// `to` is left to the caller, who gets the guest-physical address.
    fn learn(
        &mut self,
        mem: &GuestMemory<'_>,
        state: &Paging,
        gla: u64,
        access: Access,
    ) -> Option<u64> {
        self.generation = 0;
        if !state.long() {
            return None;
        }
        let mut trail = Trail::default();
        let gla = gla & !(PAGE - 1);
        let gpa = paging::trace(mem, state, gla, access, &mut trail).ok()?;
        if !access.contains(Access::EXEC) && !trail.is_marked(access) {
            return None;
        }
        self.depth = 0;
        for (to, (gpa, entry)) in self.entries.iter_mut().zip(trail.entries()) {
            *to = (mem.word(gpa, 8, PROT_READ)?, entry);
            self.depth += 1;
        }
        self.gla = gla;
        self.state = *state;
        self.access = access;
        Some(gpa)
    }
}

/// How many pages of code are remembered, and of data. A guest exits from few places:
/// where it idles, sets its timer, ends an interrupt.
const CODE: usize = 8;
const DATA: usize = 4;

/// A page's only place of so many.
#[inline]
fn slot(gla: u64, places: usize) -> usize {
    (gla / PAGE) as usize % places
}

/// Pages of code.
pub struct Code([Page; CODE]);

impl Code {
    /// Nothing.
    #[optimize(speed)]
    pub const fn new() -> Self {
        Code([Page::NONE; CODE])
    }

    /// Host address of `N` bytes at `gla`, if they are on a page that is remembered.
    #[inline]
    #[optimize(speed)]
    fn at<const N: u64>(&self, state: &Paging, gla: u64, generation: u64) -> Option<usize> {
        let page = self.0.get(slot(gla, CODE))?;
        let offset = gla % PAGE;
        (offset <= PAGE - N && page.holds(state, gla, generation))
            .then_some((page.to + offset) as usize)
    }

    /// The first bytes of the instruction at linear address `gla`, if its page is
    /// remembered. `generation`: of the nested page tables.
    #[inline]
    #[optimize(speed)]
    pub fn bytes(&self, state: &Paging, gla: u64, generation: u64) -> Option<[u8; 3]> {
        let at = self.at::<3>(state, gla, generation)?;
        // SAFETY: three bytes of a page of guest memory, by `fetch` and the
        // generation; the guest may write them at the same time.
        Some(unsafe { ptr::read_volatile(at as *const [u8; 3]) })
    }

    /// All of it, likewise.
    #[optimize(speed)]
    fn known(&self, state: &Paging, gla: u64, generation: u64) -> Option<Fetched> {
        let at = self.at::<{ MAX_INST as u64 }>(state, gla, generation)?;
        let mut bytes = [0; MAX_INST];
        // SAFETY: as above, copied once.
        unsafe { ptr::copy_nonoverlapping(at as *const u8, bytes.as_mut_ptr(), MAX_INST) };
        Some(Fetched::whole(bytes))
    }

    /// The instruction at linear address `gla`, from memory if need be, whose page is
    /// remembered then.
    #[cold]
    #[optimize(speed)]
    pub fn fetch(
        &mut self,
        mem: &GuestMemory<'_>,
        state: &Paging,
        gla: u64,
        generation: u64,
    ) -> Fetched {
        if let Some(known) = self.known(state, gla, generation) {
            return known;
        }
        if let Some(page) = self.0.get_mut(slot(gla, CODE))
            && let Some(gpa) = page.learn(mem, state, gla, Access::EXEC)
            && let Some(va) = mem.word(gpa, 8, PROT_READ)
        {
            page.to = va as u64;
            page.generation = generation;
        }
        paging::fetch_instruction(mem, state, gla)
    }
}

/// Pages of device memory.
pub struct Data([Page; DATA]);

impl Data {
    /// Nothing.
    #[optimize(speed)]
    pub const fn new() -> Self {
        Data([Page::NONE; DATA])
    }

    /// Guest-physical address of the page around `gla`, if it allows `access`. None
    /// also where a walk has to say, as it has more to do.
    #[optimize(speed)]
    pub fn page(
        &mut self,
        mem: &GuestMemory<'_>,
        state: &Paging,
        gla: u64,
        access: Access,
        generation: u64,
    ) -> Option<u64> {
        let page = self.0.get_mut(slot(gla, DATA))?;
        if page.access.contains(access) && page.holds(state, gla, generation) {
            return Some(page.to);
        }
        // What is written is read as well, and allows that.
        page.to = page.learn(mem, state, gla, access | Access::READ)?;
        page.generation = generation;
        Some(page.to)
    }
}
