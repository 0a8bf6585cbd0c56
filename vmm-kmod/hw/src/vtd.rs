//! Intel's IOMMU (VT-d), in legacy mode: a context for every requester ID that
//! either lets its DMA pass as it is, blocks it, or sends it through the
//! second-level tables of a domain.
//!
//! Invalidation is always global: it happens when a function changes hands, not
//! while it works. It is by register, or, where the host has the unit's queue,
//! through that.

mod queue;
#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use vmm_core::host::{Host, Hpa};

use self::queue::Queue;
use crate::error::Error;
use crate::page::Pages;

/// A unit's registers: 4 KiB of memory space.
pub trait Registers {
    /// Reads 32 bits at an offset.
    fn read32(&self, at: usize) -> u32;
    /// Reads 64 bits.
    fn read64(&self, at: usize) -> u64;
    /// Writes 32 bits.
    fn write32(&self, at: usize, value: u32);
    /// Writes 64 bits.
    fn write64(&self, at: usize, value: u64);
}

// Offsets, VT-d 4.1 §11.4.
const CAP: usize = 0x8;
const ECAP: usize = 0x10;
const GCMD: usize = 0x18;
const GSTS: usize = 0x1c;
const RTADDR: usize = 0x20;
const CCMD: usize = 0x28;
const FSTS: usize = 0x34;
const PMEN: usize = 0x64;

/// GCMD and GSTS: translation on.
const TE: u32 = 1 << 31;
/// Take the root table's address.
const SRTP: u32 = 1 << 30;
/// Write buffer flush.
const WBF: u32 = 1 << 27;
/// Queued invalidation on.
const QIE: u32 = 1 << 26;
/// Interrupt remapping on.
const IRE: u32 = 1 << 25;
/// Interrupts that are not in the format for remapping pass.
const CFI: u32 = 1 << 23;
/// Bits of GSTS that are no one-shot commands (§11.4.4.1).
const LASTING: u32 = 0x96ff_ffff;

const CCMD_ICC: u64 = 1 << 63;
const CCMD_GLOBAL: u64 = 1 << 61;
const IOTLB_IVT: u64 = 1 << 63;
const IOTLB_GLOBAL: u64 = 1 << 60;
/// Drain reads and writes.
const IOTLB_DRAIN: u64 = 3 << 48;

const PMEN_EPM: u32 = 1 << 31;
const PMEN_PRS: u32 = 1;

const FSTS_PPF: u32 = 2;
const FSTS_PFO: u32 = 1;

const PRESENT: u64 = 1;
const TT_PASS: u64 = 2 << 2;

/// Reads of a register until a command must be done.
const PATIENCE: u32 = 10_000_000;

/// Domain of all that passes as it is.
const PASS_DOMAIN: u16 = 1;

/// Why a unit cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Somebody else has turned it on.
    InUse,
    /// It walks neither three nor four levels.
    Levels,
    /// It cannot let the DMA of the host's own functions pass.
    PassThrough,
    /// It does not do what it is told.
    Stuck,
    /// The host is out of memory.
    NoMemory,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::InUse => "the host's own driver uses it",
            Refusal::Levels => "it walks neither 3 nor 4 levels of tables",
            Refusal::PassThrough => "it has no pass-through",
            Refusal::Stuck => "it does not complete a command",
            Refusal::NoMemory => "out of memory",
        })
    }
}

impl From<Error> for Refusal {
    fn from(_: Error) -> Self {
        Refusal::NoMemory
    }
}

/// What a unit can do (§11.4.2, §11.4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Number of domain IDs.
    pub domains: u32,
    /// Levels of second-level tables.
    pub levels: u8,
    /// 2 MiB leaves.
    pub pages_2m: bool,
    /// 1 GiB leaves.
    pub pages_1g: bool,
    /// Walks see the CPUs' caches.
    pub coherent: bool,
    /// Entries that are not present may be cached.
    pub caching: bool,
    pass_through: bool,
    write_buffer: bool,
    protected_memory: bool,
    /// Drains of an invalidation that it knows: its bits in a descriptor.
    drain: u64,
    iotlb: usize,
    faults: usize,
    fault_records: usize,
}

impl Capabilities {
    /// From the two registers. [`Refusal::Levels`].
    pub fn new(cap: u64, ecap: u64) -> Result<Self, Refusal> {
        let bit = |r: u64, n: u32| r >> n & 1 != 0;
        let levels = match (bit(cap, 10), bit(cap, 9)) {
            (true, _) => 4,
            (_, true) => 3,
            _ => return Err(Refusal::Levels),
        };
        Ok(Capabilities {
            domains: 1 << (4 + 2 * (cap & 7).min(6)),
            levels,
            pages_2m: bit(cap, 34),
            pages_1g: bit(cap, 35),
            coherent: bit(ecap, 0),
            caching: bit(cap, 7),
            pass_through: bit(ecap, 6),
            write_buffer: bit(cap, 4),
            protected_memory: bit(cap, 5) || bit(cap, 6),
            drain: (cap >> 54 & 3) << 6,
            iotlb: (ecap >> 8 & 0x3ff) as usize * 16 + 8,
            faults: (cap >> 24 & 0x3ff) as usize * 16,
            fault_records: (cap >> 40 & 0xff) as usize + 1,
        })
    }
}

/// What a function tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read the page at this address.
    Read(u64),
    /// To write it.
    Write(u64),
    /// To send an interrupt.
    Interrupt,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Access::Read(at) => write!(f, "DMA read from {at:#x}"),
            Access::Write(at) => write!(f, "DMA write to {at:#x}"),
            Access::Interrupt => f.write_str("an interrupt that is not its own"),
        }
    }
}

/// DMA or an interrupt that was not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Requester ID.
    pub source: u16,
    /// What it tried.
    pub access: Access,
    /// §7.1.3.
    pub reason: u8,
}

/// A unit that is on. Dropping it turns it off.
pub struct Unit<H: Host, R: Registers> {
    registers: R,
    capabilities: Capabilities,
    root: Pages<H>,
    contexts: Box<[Pages<H>]>,
    /// The queue is on, and the host's.
    queue: Option<Queue<H>>,
}

/// Whether the host has a unit remap interrupts, and block those that are not in
/// the format for it (§5.1.4).
pub fn remaps(registers: &impl Registers) -> bool {
    registers.read32(GSTS) & (IRE | CFI) == IRE
}

/// Writes a table's bytes back to memory, for walks that do not see caches.
///
/// `va` is the address of 4 KiB that are mapped.
fn write_back(va: *const u8) {
    write_back_some(va, 4096);
}

/// The same of the first `len` bytes.
#[inline(never)]
fn write_back_some(va: *const u8, len: usize) {
    for line in (0..len).step_by(64) {
        // SAFETY: within the page; CLFLUSH changes nothing.
        unsafe { core::arch::x86_64::_mm_clflush(va.wrapping_add(line)) };
    }
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

impl<H: Host, R: Registers> Unit<H, R> {
    /// A unit that is not on yet, everything passing. `share`: the host may have it
    /// remap interrupts, and nobody else uses it during what is called afterwards.
    pub fn new(registers: R, share: bool) -> Result<Self, Refusal> {
        let capabilities = Capabilities::new(registers.read64(CAP), registers.read64(ECAP))?;
        let status = registers.read32(GSTS);
        if status & TE != 0 || !share && status & (QIE | IRE) != 0 {
            return Err(Refusal::InUse);
        }
        if !capabilities.pass_through {
            return Err(Refusal::PassThrough);
        }
        let mut contexts = Vec::new();
        contexts
            .try_reserve_exact(256)
            .map_err(|_| Refusal::NoMemory)?;
        let mut root = Pages::<H>::new(0)?;
        for entry in root.bytes_mut().chunks_exact_mut(16) {
            let context = Pages::<H>::new(0)?;
            put(entry, context.pa() | PRESENT, 0);
            contexts.push(context);
        }
        let queue = if status & QIE != 0 {
            Some(Queue::new(&registers)?)
        } else {
            None
        };
        let mut unit = Unit {
            registers,
            capabilities,
            root,
            contexts: contexts.into_boxed_slice(),
            queue,
        };
        let pass = unit.pass();
        for context in &mut unit.contexts {
            for entry in context.bytes_mut().chunks_exact_mut(16) {
                put(entry, pass.0, pass.1);
            }
            write_back(context.as_ptr());
        }
        write_back(unit.root.as_ptr());
        Ok(unit)
    }

    /// Whether the host has its queue.
    pub fn shared(&self) -> bool {
        self.queue.is_some()
    }

    /// What it can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn until(&self, done: impl Fn(&R) -> bool) -> Result<(), Refusal> {
        for _ in 0..PATIENCE {
            if done(&self.registers) {
                return Ok(());
            }
            core::hint::spin_loop();
        }
        Err(Refusal::Stuck)
    }

    /// Gives a command: what lasts stays as it is.
    fn command(&self, bit: u32, on: bool) {
        let lasting = self.registers.read32(GSTS) & LASTING;
        let value = if on { lasting | bit } else { lasting & !bit };
        self.registers.write32(GCMD, value);
    }

    fn start(&self) -> Result<(), Refusal> {
        let r = &self.registers;
        r.write64(RTADDR, self.root.pa());
        self.command(SRTP, true);
        self.until(|r| r.read32(GSTS) & SRTP != 0)?;
        self.invalidate()?;
        // Memory that the firmware kept from DMA until now (§11.4.8).
        if self.capabilities.protected_memory && r.read32(PMEN) & PMEN_EPM != 0 {
            r.write32(PMEN, r.read32(PMEN) & !PMEN_EPM);
            self.until(|r| r.read32(PMEN) & PMEN_PRS == 0)?;
        }
        self.command(TE, true);
        self.until(|r| r.read32(GSTS) & TE != 0)
    }

    /// Turns it on, where it is not or has lost its state while the host slept.
    pub fn resume(&self) -> Result<(), Refusal> {
        if self.registers.read32(GSTS) & TE == 0 {
            self.start()?;
        }
        Ok(())
    }

    /// Turns it off, everything passing, before the host sleeps: who turns interrupt
    /// remapping off then changes nothing else with it (§11.4.4).
    pub fn suspend(&self) -> Result<(), Refusal> {
        self.command(TE, false);
        self.until(|r| r.read32(GSTS) & TE == 0)
    }

    /// Has the unit forget all that it has cached (§6.5).
    pub fn invalidate(&self) -> Result<(), Refusal> {
        let r = &self.registers;
        if self.capabilities.write_buffer {
            self.command(WBF, true);
            self.until(|r| r.read32(GSTS) & WBF == 0)?;
        }
        if let Some(queue) = &self.queue {
            return queue.invalidate(r, self.capabilities.drain);
        }
        r.write64(CCMD, CCMD_ICC | CCMD_GLOBAL);
        self.until(|r| r.read64(CCMD) & CCMD_ICC == 0)?;
        let iotlb = self.capabilities.iotlb;
        r.write64(iotlb, IOTLB_IVT | IOTLB_GLOBAL | IOTLB_DRAIN);
        self.until(|r| r.read64(iotlb) & IOTLB_IVT == 0)
    }

    /// The context of what passes: the widest address it knows (§9.3).
    fn pass(&self) -> (u64, u64) {
        let width = u64::from(self.capabilities.levels) - 2;
        (PRESENT | TT_PASS, width | u64::from(PASS_DOMAIN) << 8)
    }

    /// Where the unit does not say that it has done so, nothing is present: it must not
    /// look at what may be gone the next time.
    fn set(&mut self, rid: u16, value: (u64, u64)) -> Result<(), Refusal> {
        self.put(rid, value);
        self.invalidate().inspect_err(|_| self.put(rid, (0, 0)))
    }

    fn put(&mut self, rid: u16, (low, high): (u64, u64)) {
        let page = self.contexts.get_mut(usize::from(rid >> 8));
        if let Some(page) = page {
            let at = usize::from(rid & 0xff) * 16;
            if let Some(entry) = page.bytes_mut().get_mut(at..at + 16) {
                if entry == [low.to_le_bytes(), high.to_le_bytes()].as_flattened() {
                    return;
                }
                // Not present while it is neither the one nor the other.
                put(entry, 0, 0);
                core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
                put(entry, low, high);
                write_back_some(entry.as_ptr(), 16);
            }
        }
    }

    /// Sends a function's DMA through the tables at `root`, of as many levels
    /// as the unit has; `domain` is a number that no other tables have, from 2.
    pub fn attach(&mut self, rid: u16, root: Hpa, domain: u16) -> Result<(), Refusal> {
        let width = u64::from(self.capabilities.levels) - 2;
        self.set(rid, (root | PRESENT, width | u64::from(domain) << 8))
    }

    /// Blocks a function's DMA.
    pub fn block(&mut self, rid: u16) -> Result<(), Refusal> {
        self.set(rid, (0, 0))
    }

    /// Lets the DMA of a requester ID that is under no domain pass, or blocks it.
    /// After one or more of these comes [`Unit::forget_passed`].
    pub fn let_pass(&mut self, rid: u16, pass: bool) -> Result<(), Refusal> {
        let value = if pass { self.pass() } else { (0, 0) };
        self.put(rid, value);
        Ok(())
    }

    /// Has the unit forget what passed.
    pub fn forget_passed(&self) -> Result<(), Refusal> {
        self.invalidate()
    }

    /// Writes a domain's table back to memory, where that is needed.
    pub fn publish(&self, table: Hpa) {
        if !self.capabilities.coherent {
            write_back(H::phys_to_virt(table) as *const u8);
        }
    }

    /// Calls `f` with each fault that has been recorded, and clears them. Whether there
    /// was no room for some.
    ///
    /// Where the host has the unit's queue it has a handler of faults too, which clears them.
    pub fn faults(&self, mut f: impl FnMut(Fault)) -> bool {
        if self.shared() {
            return false;
        }
        let r = &self.registers;
        // None is recorded while an overflow is noted (§7.3.1).
        let status = r.read32(FSTS);
        if status & (FSTS_PPF | FSTS_PFO) == 0 {
            return false;
        }
        for n in 0..self.capabilities.fault_records {
            let at = self.capabilities.faults + n * 16;
            let high = r.read64(at + 8);
            if high >> 63 == 0 {
                continue;
            }
            let address = r.read64(at) & !0xfff;
            f(Fault {
                source: high as u16,
                access: if high >> 62 & 1 == 0 {
                    Access::Write(address)
                } else {
                    Access::Read(address)
                },
                reason: (high >> 32) as u8,
            });
            // Written as one, the F bit is cleared (§11.4.14.4).
            r.write32(at + 12, 1 << 31);
        }
        r.write32(FSTS, FSTS_PFO);
        status & FSTS_PFO != 0
    }
}

impl<H: Host, R: Registers> Drop for Unit<H, R> {
    fn drop(&mut self) {
        if self.suspend().is_err() {
            // It still walks the tables: they must not be used for anything else.
            let contexts = core::mem::take(&mut self.contexts);
            contexts.into_iter().for_each(core::mem::forget);
            if let Ok(spare) = Pages::new(0) {
                core::mem::forget(core::mem::replace(&mut self.root, spare));
            }
        }
    }
}

/// Writes an entry of 16 bytes, the half with the present bit last.
fn put(entry: &mut [u8], low: u64, high: u64) {
    let (first, second) = entry.split_at_mut(8);
    for (to, from) in second.iter_mut().zip(high.to_le_bytes()) {
        *to = from;
    }
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    for (to, from) in first.iter_mut().zip(low.to_le_bytes()) {
        *to = from;
    }
}
