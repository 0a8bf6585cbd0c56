//! AMD's IOMMU (AMD-Vi): a device table with an entry for every requester ID
//! that either lets its DMA pass as it is, blocks it, or sends it through the
//! page tables of a domain. Sections are those of the AMD I/O Virtualization
//! Technology Specification (48882).

pub mod interrupts;
#[cfg(test)]
mod tests;

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use vmm_core::host::{Host, Hpa};

use crate::page::Pages;
use crate::vtd::{Access, Fault, Refusal, Registers};

// Offsets of the registers, §3.4.
const DEVICE_TABLE: usize = 0;
const COMMANDS: usize = 8;
const EVENTS: usize = 0x10;
const CONTROL: usize = 0x18;
const COMMAND_HEAD: usize = 0x2000;
const COMMAND_TAIL: usize = 0x2008;
const EVENT_HEAD: usize = 0x2010;
const EVENT_TAIL: usize = 0x2018;
const STATUS: usize = 0x2020;

const IOMMU_EN: u64 = 1;
const EVENT_LOG_EN: u64 = 1 << 2;
const COHERENT: u64 = 1 << 10;
const COMMANDS_EN: u64 = 1 << 12;

/// STATUS: events have been lost, and none is logged from then on; written as one, it
/// is cleared.
const EVENT_OVERFLOW: u64 = 1;
/// STATUS: events are logged.
const EVENT_LOG_RUN: u64 = 1 << 3;

/// 65,536 entries of 32 bytes.
const DEVICE_TABLE_ORDER: u32 = 9;
const ENTRY: usize = 32;
/// A page of commands or events: 256 of 16 bytes, as the registers say it.
const RING: u64 = 8 << 56;
const RING_BYTES: u64 = 4096;

// A device table entry's first quadword, §2.2.2.
const VALID: u64 = 3;
const READ_WRITE: u64 = 3 << 61;
const MODE_SHIFT: u32 = 9;
/// Levels of page tables.
const LEVELS: u8 = 4;

// Its third quadword, on interrupts.
const INTERRUPTS_VALID: u64 = 1;
/// Binary logarithm of the number of entries.
const TABLE_LENGTH: u64 = (interrupts::ENTRIES.ilog2() as u64) << 1;
/// Of those that are plain interrupts; all others are blocked where the
/// quadword is valid, and so are these without this.
const THROUGH_TABLE: u64 = 2 << 60;

const COMPLETION_WAIT: u64 = 1 << 60;
const INVALIDATE_ENTRY: u64 = 2 << 60;
const INVALIDATE_PAGES: u64 = 3 << 60;
const INVALIDATE_INTERRUPTS: u64 = 5 << 60;
/// All pages of a domain, those of tables too (§2.4.3).
const ALL_PAGES: u64 = 0x7fff_ffff_ffff_f003;
const STORE: u64 = 1;

const IO_PAGE_FAULT: u64 = 2;
/// In the event: of an interrupt, a write.
const OF_INTERRUPT: u64 = 1 << 51;
const OF_WRITE: u64 = 1 << 53;

/// Reads of a place until a command must be done.
const PATIENCE: u32 = 10_000_000;

/// Reads of a register until the log, which has overflowed, must have ended.
const LOG_ENDS: u32 = 1000;

/// Domain of all that passes as it is.
const PASS_DOMAIN: u16 = 1;

/// A device table entry.
struct Entry {
    translation: u64,
    domain: u16,
    interrupts: u64,
}

const PASS: Entry = Entry {
    translation: VALID | READ_WRITE,
    domain: PASS_DOMAIN,
    interrupts: 0,
};
const BLOCKED: Entry = Entry {
    translation: VALID,
    domain: PASS_DOMAIN,
    interrupts: INTERRUPTS_VALID,
};

/// A unit that is on. Dropping it turns it off.
pub struct Unit<H: Host, R: Registers> {
    registers: R,
    devices: Pages<H>,
    commands: Pages<H>,
    events: Pages<H>,
    /// Where completed waits are noted.
    done: Pages<H>,
    sequence: AtomicU64,
}

impl<H: Host, R: Registers> fmt::Debug for Unit<H, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("amdvi::Unit")
    }
}

/// The 64-bit word at an offset of pages that a unit reads or writes too.
fn shared<H: Host>(pages: &Pages<H>, at: usize) -> &AtomicU64 {
    let at = at & (pages.len() - 8);
    // SAFETY: within the pages, aligned; all bits are valid, and accesses are
    // atomic on both sides.
    unsafe { &*pages.as_ptr().wrapping_add(at).cast::<AtomicU64>() }
}

impl<H: Host, R: Registers> Unit<H, R> {
    /// Turns a unit on, everything passing.
    pub fn new(registers: R) -> Result<Self, Refusal> {
        if registers.read64(CONTROL) & IOMMU_EN != 0 {
            return Err(Refusal::InUse);
        }
        let unit = Unit {
            registers,
            devices: Pages::new(DEVICE_TABLE_ORDER)?,
            commands: Pages::new(0)?,
            events: Pages::new(0)?,
            done: Pages::new(0)?,
            sequence: AtomicU64::new(0),
        };
        for rid in 0..=u16::MAX {
            unit.put(rid, &PASS);
        }
        unit.start()?;
        Ok(unit)
    }

    fn start(&self) -> Result<(), Refusal> {
        let r = &self.registers;
        let size = self.devices.len() as u64 / 4096 - 1;
        r.write64(DEVICE_TABLE, self.devices.pa() | size);
        r.write64(COMMANDS, self.commands.pa() | RING);
        r.write64(EVENTS, self.events.pa() | RING);
        for at in [COMMAND_HEAD, COMMAND_TAIL, EVENT_HEAD, EVENT_TAIL] {
            r.write64(at, 0);
        }
        let control = r.read64(CONTROL) | COHERENT | EVENT_LOG_EN | COMMANDS_EN;
        r.write64(CONTROL, control);
        r.write64(CONTROL, control | IOMMU_EN);
        self.invalidate(PASS_DOMAIN)
    }

    /// Turns it on again where it has lost its state while the host slept.
    pub fn resume(&self) -> Result<(), Refusal> {
        if self.registers.read64(CONTROL) & IOMMU_EN == 0 {
            self.start()?;
        }
        Ok(())
    }

    /// Levels of page tables.
    pub fn levels(&self) -> u8 {
        LEVELS
    }

    fn command(&self, low: u64, high: u64) {
        let tail = self.registers.read64(COMMAND_TAIL) & (RING_BYTES - 1);
        shared(&self.commands, tail as usize).store(low, Ordering::Relaxed);
        shared(&self.commands, tail as usize + 8).store(high, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let next = (tail + 16) & (RING_BYTES - 1);
        self.registers.write64(COMMAND_TAIL, next);
    }

    /// Waits until all commands so far have been obeyed.
    fn wait(&self) -> Result<(), Refusal> {
        let n = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        self.command(COMPLETION_WAIT | self.done.pa() | STORE, n);
        for _ in 0..PATIENCE {
            if shared(&self.done, 0).load(Ordering::Acquire) == n {
                return Ok(());
            }
            core::hint::spin_loop();
        }
        Err(Refusal::Stuck)
    }

    /// Has the unit forget what it has cached of a domain.
    pub fn invalidate(&self, domain: u16) -> Result<(), Refusal> {
        self.command(INVALIDATE_PAGES | u64::from(domain) << 32, ALL_PAGES);
        self.wait()
    }

    /// Writes a device table entry, its first quadword last.
    fn put(&self, rid: u16, entry: &Entry) {
        let at = usize::from(rid) * ENTRY;
        shared(&self.devices, at + 8).store(entry.domain.into(), Ordering::Relaxed);
        shared(&self.devices, at + 16).store(entry.interrupts, Ordering::Relaxed);
        shared(&self.devices, at).store(entry.translation, Ordering::Release);
    }

    /// Where the unit does not say that it has done so, the entry is blocked: it must not
    /// look at what may be gone the next time.
    fn set(&self, rid: u16, entry: &Entry) -> Result<(), Refusal> {
        self.change(rid, entry)
            .inspect_err(|_| self.put(rid, &BLOCKED))
    }

    fn change(&self, rid: u16, entry: &Entry) -> Result<(), Refusal> {
        let at = usize::from(rid) * ENTRY;
        let old = shared(&self.devices, at + 8).load(Ordering::Relaxed) as u16;
        // Blocked while it is neither the one nor the other.
        let domain = entry.domain;
        self.put(rid, &Entry { domain, ..BLOCKED });
        self.command(INVALIDATE_ENTRY | u64::from(rid), 0);
        self.wait()?;
        self.put(rid, entry);
        self.command(INVALIDATE_ENTRY | u64::from(rid), 0);
        self.command(INVALIDATE_INTERRUPTS | u64::from(rid), 0);
        self.invalidate(old)?;
        self.invalidate(domain)
    }

    /// Sends a function's DMA through the tables at `root`; `domain` is a
    /// number that no other tables have, from 2. Its interrupts go through the
    /// table at `interrupts`, or pass as they are.
    pub fn attach(
        &self,
        rid: u16,
        root: Hpa,
        domain: u16,
        interrupts: Option<Hpa>,
    ) -> Result<(), Refusal> {
        let mode = u64::from(LEVELS) << MODE_SHIFT;
        let remap = INTERRUPTS_VALID | TABLE_LENGTH | THROUGH_TABLE;
        let entry = Entry {
            translation: root | mode | VALID | READ_WRITE,
            domain,
            interrupts: interrupts.map_or(0, |table| table | remap),
        };
        self.set(rid, &entry)
    }

    /// Has the unit forget what it has cached of a function's interrupts.
    pub fn invalidate_interrupts(&self, rid: u16) -> Result<(), Refusal> {
        self.command(INVALIDATE_INTERRUPTS | u64::from(rid), 0);
        self.wait()
    }

    /// Blocks a function's DMA and its interrupts.
    pub fn block(&self, rid: u16) -> Result<(), Refusal> {
        self.set(rid, &BLOCKED)
    }

    /// Lets the DMA and the interrupts of a requester ID that is under no domain
    /// pass, or blocks them. After one or more of these comes
    /// [`Unit::forget_passed`].
    pub fn let_pass(&mut self, rid: u16, pass: bool) -> Result<(), Refusal> {
        let entry = if pass { &PASS } else { &BLOCKED };
        let at = usize::from(rid) * ENTRY;
        if shared(&self.devices, at).load(Ordering::Relaxed) == entry.translation {
            return Ok(());
        }
        self.put(rid, entry);
        self.command(INVALIDATE_ENTRY | u64::from(rid), 0);
        self.invalidate_interrupts(rid)
    }

    /// Has the unit forget what passed.
    pub fn forget_passed(&self) -> Result<(), Refusal> {
        self.invalidate(PASS_DOMAIN)
    }

    /// Calls `f` with each fault that has been recorded, and clears them. Whether there
    /// was no room for some.
    pub fn faults(&self, mut f: impl FnMut(Fault)) -> bool {
        let r = &self.registers;
        let tail = r.read64(EVENT_TAIL) & (RING_BYTES - 16);
        let mut head = r.read64(EVENT_HEAD) & (RING_BYTES - 16);
        while head != tail {
            let event = shared(&self.events, head as usize).load(Ordering::Acquire);
            if event >> 60 == IO_PAGE_FAULT {
                let address =
                    shared(&self.events, head as usize + 8).load(Ordering::Relaxed) & !0xfff;
                f(Fault {
                    source: event as u16,
                    access: if event & OF_INTERRUPT != 0 {
                        Access::Interrupt
                    } else if event & OF_WRITE != 0 {
                        Access::Write(address)
                    } else {
                        Access::Read(address)
                    },
                    reason: IO_PAGE_FAULT as u8,
                });
            }
            head = (head + 16) & (RING_BYTES - 1);
        }
        r.write64(EVENT_HEAD, head);
        let lost = r.read64(STATUS) & EVENT_OVERFLOW != 0;
        if lost {
            self.log_again();
        }
        lost
    }

    /// Starts the log anew after an overflow, which ends it (§2.5.2).
    fn log_again(&self) {
        let r = &self.registers;
        let running = || r.read64(STATUS) & EVENT_LOG_RUN != 0;
        if (0..LOG_ENDS).all(|_| running()) {
            // The next time, then.
            return;
        }
        let control = r.read64(CONTROL);
        r.write64(CONTROL, control & !EVENT_LOG_EN);
        r.write64(STATUS, EVENT_OVERFLOW);
        r.write64(EVENT_HEAD, 0);
        r.write64(EVENT_TAIL, 0);
        r.write64(CONTROL, control | EVENT_LOG_EN);
    }
}

impl<H: Host, R: Registers> Drop for Unit<H, R> {
    fn drop(&mut self) {
        let r = &self.registers;
        let control = r.read64(CONTROL);
        r.write64(CONTROL, control & !IOMMU_EN);
        r.write64(CONTROL, control & !(IOMMU_EN | COMMANDS_EN | EVENT_LOG_EN));
    }
}
