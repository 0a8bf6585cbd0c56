//! The guest's own page tables: from guest-linear to guest-physical addresses
//! (SDM Vol. 3A chapter 4).

use crate::cpu::{Access, CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, CpuState, EFER_LMA, Event, Reg};

/// Guest-physical memory as a page-table walk needs it.
pub trait GuestPhys {
    /// Reads bytes; false if any of them is not memory.
    fn read(&self, gpa: u64, buf: &mut [u8]) -> bool;
    /// Replaces the 32 bits at `gpa` (aligned) by `new` if they are `old`,
    /// atomically. `Some(false)` if they were not; `None` if there is no
    /// writable memory.
    fn cmpxchg_u32(&self, gpa: u64, old: u32, new: u32) -> Option<bool>;
    /// The same with 64 bits.
    fn cmpxchg_u64(&self, gpa: u64, old: u64, new: u64) -> Option<bool>;

    /// Reads an aligned 32-bit entry.
    fn read_u32(&self, gpa: u64) -> Option<u32> {
        let mut b = [0; 4];
        self.read(gpa, &mut b).then(|| u32::from_le_bytes(b))
    }
    /// Reads an aligned 64-bit entry.
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        let mut b = [0; 8];
        self.read(gpa, &mut b).then(|| u64::from_le_bytes(b))
    }
}

/// What a translation depends on besides memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paging {
    /// CR0: PG, WP.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4: PSE, PAE, LA57, SMEP, SMAP.
    pub cr4: u64,
    /// EFER: LMA, NXE.
    pub efer: u64,
    /// Current privilege level; 3 makes user-mode accesses.
    pub cpl: u8,
    /// RFLAGS.AC: lifts SMAP for explicit accesses.
    pub ac: bool,
    /// The access is implicit (descriptor tables, TSS): supervisor-mode
    /// whatever CPL is, and AC does not lift SMAP (SDM Vol. 3A §4.6).
    pub implicit: bool,
    /// Physical address width, bits (MAXPHYADDR).
    pub phys_bits: u8,
    /// 1 GiB pages exist (CPUID 0x8000_0001 EDX bit 26).
    pub gib_pages: bool,
}

impl Paging {
    /// No paging at all.
    pub const OFF: Paging = Paging {
        cr0: 0,
        cr3: 0,
        cr4: 0,
        efer: 0,
        cpl: 0,
        ac: false,
        implicit: false,
        phys_bits: 0,
        gib_pages: false,
    };

    /// The paging state of a vCPU; costs the reads of five registers.
    pub fn of(cpu: &(impl CpuState + ?Sized), phys_bits: u8, gib_pages: bool) -> Self {
        Paging {
            cr0: cpu.reg(Reg::Cr0),
            cr3: cpu.reg(Reg::Cr3),
            cr4: cpu.reg(Reg::Cr4),
            efer: cpu.reg(Reg::Efer),
            cpl: cpu.cpl(),
            ac: cpu.reg(Reg::Rflags) & RFLAGS_AC != 0,
            implicit: false,
            phys_bits,
            gib_pages,
        }
    }

    /// The same for implicit supervisor-mode accesses.
    pub const fn implicit(mut self) -> Self {
        self.implicit = true;
        self
    }

    /// Whether linear addresses have 64 bits.
    pub const fn long(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    const fn user(&self) -> bool {
        self.cpl == 3 && !self.implicit
    }
}

/// RFLAGS.AC.
const RFLAGS_AC: u64 = 1 << 18;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const EFER_NXE: u64 = 1 << 11;

const PTE_P: u64 = 1;
const PTE_W: u64 = 1 << 1;
const PTE_U: u64 = 1 << 2;
const PTE_A: u64 = 1 << 5;
const PTE_D: u64 = 1 << 6;
const PTE_PS: u64 = 1 << 7;
const PTE_NX: u64 = 1 << 63;
/// Address bits of a 64-bit entry.
const PTE_ADDR: u64 = 0x000f_ffff_ffff_f000;

/// Error code: the page was present.
pub const PF_P: u32 = 1;
/// Error code: write.
pub const PF_W: u32 = 1 << 1;
/// Error code: user mode.
pub const PF_U: u32 = 1 << 2;
/// Error code: reserved bit set.
pub const PF_RSVD: u32 = 1 << 3;
/// Error code: instruction fetch.
pub const PF_ID: u32 = 1 << 4;

/// A page fault (#PF) to be given to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// Error code (SDM Vol. 3A §4.7).
    pub error_code: u32,
    /// Faulting linear address, for CR2.
    pub cr2: u64,
}

impl PageFault {
    /// The exception; CR2 is the caller's to set.
    pub const fn event(&self) -> Event {
        Event::exception_with(14, self.error_code)
    }
}

/// Why a linear address has no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// The guest gets a page fault.
    Fault(PageFault),
    /// A paging structure lies outside of the guest's memory, at this
    /// guest-physical address.
    NoMemory(u64),
}

/// An entry on the way, for setting its accessed and dirty flags.
#[derive(Clone, Copy, Default)]
struct Step {
    gpa: u64,
    entry: u64,
}

struct Walk<'a, M: GuestPhys> {
    mem: &'a M,
    p: &'a Paging,
    gla: u64,
    access: Access,
    steps: [Step; 5],
    depth: usize,
    writable: bool,
    user: bool,
    nx: bool,
}

/// How often a walk starts again because the guest changed an entry under it.
const RETRIES: u32 = 16;

/// Translates `gla` for `access` and sets accessed and dirty flags as the CPU
/// does. In 64-bit mode the caller has checked that `gla` is canonical;
/// otherwise bits above 31 are ignored.
pub fn translate<M: GuestPhys>(
    mem: &M,
    p: &Paging,
    gla: u64,
    access: Access,
) -> Result<u64, WalkError> {
    let mut last = 0;
    for _ in 0..RETRIES {
        let mut w = Walk::new(mem, p, gla, access);
        last = w.run()?;
        if w.mark()? {
            break;
        }
    }
    Ok(last)
}

/// As [`translate`], but changes nothing in the guest's memory.
pub fn translate_nofault<M: GuestPhys>(
    mem: &M,
    p: &Paging,
    gla: u64,
    access: Access,
) -> Result<u64, WalkError> {
    Walk::new(mem, p, gla, access).run()
}

/// The paging-structure entries that a translation came from.
#[derive(Clone, Copy, Default)]
pub struct Trail {
    steps: [Step; 5],
    depth: usize,
}

impl Trail {
    /// Guest-physical address and contents of each entry, highest level first.
    pub fn entries(&self) -> impl Iterator<Item = (u64, u64)> {
        let steps = self.steps.iter().take(self.depth);
        steps.map(|s| (s.gpa, s.entry))
    }

    /// Whether the entries are marked as accessed, and the last as dirty where `access`
    /// writes: [`translate`] would change nothing.
    pub fn is_marked(&self, access: Access) -> bool {
        let mut last = 0;
        for (_, entry) in self.entries() {
            if entry & PTE_A == 0 {
                return false;
            }
            last = entry;
        }
        last & PTE_D != 0 || !access.contains(Access::WRITE)
    }
}

/// As [`translate_nofault`] under 64-bit paging, and leaves the entries that were
/// used in `trail`.
pub fn trace<M: GuestPhys>(
    mem: &M,
    p: &Paging,
    gla: u64,
    access: Access,
    trail: &mut Trail,
) -> Result<u64, WalkError> {
    let mut w = Walk::new(mem, p, gla, access);
    let gpa = w.run()?;
    *trail = Trail {
        steps: w.steps,
        depth: w.depth,
    };
    Ok(gpa)
}

impl<'a, M: GuestPhys> Walk<'a, M> {
    fn new(mem: &'a M, p: &'a Paging, gla: u64, access: Access) -> Self {
        let gla = if p.long() { gla } else { gla & 0xffff_ffff };
        Walk {
            mem,
            p,
            gla,
            access,
            steps: [Step::default(); 5],
            depth: 0,
            writable: true,
            user: true,
            nx: false,
        }
    }

    #[cfg_attr(target_os = "none", optimize(speed))]
    fn run(&mut self) -> Result<u64, WalkError> {
        if self.p.cr0 & CR0_PG == 0 {
            return Ok(self.gla & 0xffff_ffff);
        }
        if self.p.long() {
            let levels = if self.p.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
            self.wide(self.p.cr3 & PTE_ADDR, levels)
        } else if self.p.cr4 & CR4_PAE != 0 {
            self.pae()
        } else {
            self.narrow()
        }
    }

    /// 32-bit paging, with PSE and PSE-36.
    fn narrow(&mut self) -> Result<u64, WalkError> {
        let pde_gpa = (self.p.cr3 & 0xffff_f000) | (self.gla >> 22 & 0x3ff) << 2;
        let pde = self.entry32(pde_gpa)?;
        if pde & PTE_PS != 0 && self.p.cr4 & CR4_PSE != 0 {
            // Bits 20:13 are address bits 39:32 as far as there are such.
            let high_bits = u32::from(self.p.phys_bits.clamp(32, 40)) - 32;
            let reserved = 1 << 21 | (0xff & !((1 << high_bits) - 1)) << 13;
            self.check(pde, reserved)?;
            self.allow()?;
            return Ok(pde & 0xffc0_0000 | (pde >> 13 & 0xff) << 32 | self.gla & 0x3f_ffff);
        }
        let pte = self.entry32((pde & 0xffff_f000) | (self.gla >> 12 & 0x3ff) << 2)?;
        self.allow()?;
        Ok(pte & 0xffff_f000 | self.gla & 0xfff)
    }

    /// PAE paging. The PDPTEs are read from memory: the CPU's copies differ
    /// only if the guest changed them and did not reload CR3.
    fn pae(&mut self) -> Result<u64, WalkError> {
        let gpa = (self.p.cr3 & 0xffff_ffe0) | (self.gla >> 30 & 3) << 3;
        let pdpte = self.mem.read_u64(gpa).ok_or(WalkError::NoMemory(gpa))?;
        if pdpte & PTE_P == 0 {
            return Err(self.fault(0));
        }
        self.wide(pdpte & PTE_ADDR, 2)
    }

    /// `levels` of 64-bit entries, the highest of which lies at `table`.
    #[cfg_attr(target_os = "none", optimize(speed))]
    fn wide(&mut self, mut table: u64, levels: u32) -> Result<u64, WalkError> {
        let mut reserved = PTE_ADDR & !((1u64 << self.p.phys_bits.clamp(32, 52)) - 1);
        if self.p.efer & EFER_NXE == 0 {
            reserved |= PTE_NX;
        }
        if !self.p.long() {
            reserved |= 0x7ff0_0000_0000_0000;
        }
        let mut level = levels;
        loop {
            let shift = 12 + 9 * (level - 1);
            let e = self.entry64(table | (self.gla >> shift & 0x1ff) << 3)?;
            let large = e & PTE_PS != 0 && level > 1;
            let mut bad = reserved;
            if large {
                let gib = level == 3 && self.p.gib_pages;
                if level == 2 || gib {
                    // Address bits below the page's size, except PAT (12).
                    bad |= ((1u64 << shift) - 1) & PTE_ADDR & !(1 << 12);
                } else {
                    bad |= PTE_PS;
                }
            }
            self.check(e, bad)?;
            if large || level == 1 {
                self.allow()?;
                let offset = (1u64 << shift) - 1;
                return Ok(e & PTE_ADDR & !offset | self.gla & offset);
            }
            table = e & PTE_ADDR;
            level -= 1;
        }
    }

    fn entry32(&mut self, gpa: u64) -> Result<u64, WalkError> {
        let e = self.mem.read_u32(gpa).ok_or(WalkError::NoMemory(gpa))?;
        self.push(gpa, u64::from(e))
    }

    fn entry64(&mut self, gpa: u64) -> Result<u64, WalkError> {
        let e = self.mem.read_u64(gpa).ok_or(WalkError::NoMemory(gpa))?;
        self.push(gpa, e)
    }

    fn push(&mut self, gpa: u64, entry: u64) -> Result<u64, WalkError> {
        if entry & PTE_P == 0 {
            return Err(self.fault(0));
        }
        if let Some(s) = self.steps.get_mut(self.depth) {
            *s = Step { gpa, entry };
            self.depth += 1;
        }
        self.writable &= entry & PTE_W != 0;
        self.user &= entry & PTE_U != 0;
        self.nx |= entry & PTE_NX != 0;
        Ok(entry)
    }

    fn check(&self, entry: u64, reserved: u64) -> Result<(), WalkError> {
        if entry & reserved != 0 {
            Err(self.fault(PF_P | PF_RSVD))
        } else {
            Ok(())
        }
    }

    /// Access rights (SDM Vol. 3A §4.6.1).
    fn allow(&self) -> Result<(), WalkError> {
        let p = self.p;
        let ok = if self.access.contains(Access::EXEC) {
            // Bit 63 of an entry reached here only with EFER.NXE set.
            !self.nx
                && if p.user() {
                    self.user
                } else {
                    !(self.user && p.cr4 & CR4_SMEP != 0)
                }
        } else if p.user() {
            self.user && (self.writable || !self.access.contains(Access::WRITE))
        } else {
            let smap = self.user && p.cr4 & CR4_SMAP != 0 && (p.implicit || !p.ac);
            let wp = self.access.contains(Access::WRITE) && !self.writable && p.cr0 & CR0_WP != 0;
            !smap && !wp
        };
        if ok { Ok(()) } else { Err(self.fault(PF_P)) }
    }

    fn fault(&self, bits: u32) -> WalkError {
        let mut error_code = bits;
        if self.access.contains(Access::WRITE) {
            error_code |= PF_W;
        }
        if self.p.user() {
            error_code |= PF_U;
        }
        let nx = self.p.cr4 & CR4_PAE != 0 && self.p.efer & EFER_NXE != 0;
        if self.access.contains(Access::EXEC) && (nx || self.p.cr4 & CR4_SMEP != 0) {
            error_code |= PF_ID;
        }
        WalkError::Fault(PageFault {
            error_code,
            cr2: self.gla,
        })
    }

    /// Sets accessed flags, and the dirty flag of the last entry for a write.
    /// False if an entry has changed meanwhile.
    fn mark(&self) -> Result<bool, WalkError> {
        let wide = self.p.long() || self.p.cr4 & CR4_PAE != 0;
        for (i, s) in self.steps.iter().take(self.depth).enumerate() {
            let leaf = i + 1 == self.depth;
            let mut want = s.entry | PTE_A;
            if leaf && self.access.contains(Access::WRITE) {
                want |= PTE_D;
            }
            if want == s.entry {
                continue;
            }
            let done = if wide {
                self.mem.cmpxchg_u64(s.gpa, s.entry, want)
            } else {
                self.mem.cmpxchg_u32(s.gpa, s.entry as u32, want as u32)
            };
            if !done.ok_or(WalkError::NoMemory(s.gpa))? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Longest x86 instruction, bytes.
pub const MAX_INST: usize = 15;

/// Bytes at an instruction's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    bytes: [u8; MAX_INST],
    len: u8,
    /// Why there are no more bytes, if there are fewer than
    /// [`MAX_INST`]. Concerns the guest only if the instruction is longer
    /// than what was read.
    pub stop: Option<WalkError>,
}

impl Fetched {
    /// What is all there.
    pub const fn whole(bytes: [u8; MAX_INST]) -> Self {
        Fetched {
            bytes,
            len: MAX_INST as u8,
            stop: None,
        }
    }

    /// What was read.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

/// Reads the instruction at linear address `gla` (CS base added), which may
/// cross into a second page. Changes nothing in the guest.
#[cfg_attr(target_os = "none", optimize(speed))]
pub fn fetch_instruction<M: GuestPhys>(mem: &M, p: &Paging, gla: u64) -> Fetched {
    let mut f = Fetched {
        bytes: [0; MAX_INST],
        len: 0,
        stop: None,
    };
    while usize::from(f.len) < MAX_INST {
        let mut at = gla.wrapping_add(u64::from(f.len));
        if !p.long() {
            at &= 0xffff_ffff;
        }
        let gpa = match translate_nofault(mem, p, at, Access::EXEC) {
            Ok(gpa) => gpa,
            Err(e) => {
                f.stop = Some(e);
                break;
            }
        };
        let room = (0x1000 - (gpa & 0xfff)) as usize;
        let end = (usize::from(f.len) + room).min(MAX_INST);
        let Some(part) = f.bytes.get_mut(usize::from(f.len)..end) else {
            break;
        };
        if !mem.read(gpa, part) {
            f.stop = Some(WalkError::NoMemory(gpa));
            break;
        }
        f.len = end as u8;
    }
    f
}

#[cfg(test)]
mod tests;
