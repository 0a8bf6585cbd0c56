//! A function's interrupt remapping table (§2.2.5): of what the function
//! sends, only the messages that the host has set up for it arrive. The tables
//! of other functions, and those without one, are not touched by that.

use core::sync::atomic::{AtomicU32, Ordering};

use vmm_core::host::{Host, Hpa};

use crate::error::Error;
use crate::page::Pages;

/// Entries of a table: as many as every unit takes, and as a message's data can
/// name with the two delivery modes that are remapped.
pub const ENTRIES: usize = 512;

// An entry, §2.2.5.2.
const REMAP: u32 = 1;
/// Fixed, or arbitrated, which is lowest priority.
const TYPE_SHIFT: u32 = 2;
const LOGICAL: u32 = 1 << 6;
const DESTINATION_SHIFT: u32 = 8;
const VECTOR_SHIFT: u32 = 16;

/// A table. It has to outlive its function's stay under a domain.
pub struct Interrupts<H: Host>(Pages<H>);

/// The entry that has a message delivered (SDM Vol. 3A §10.11). `None`: none
/// does, for what is no plain interrupt to one of the first 256 APIC IDs.
fn entry(address: u64, data: u32) -> Option<u32> {
    if address >> 20 != 0xfee || address & 0xff0 != 0 {
        return None;
    }
    let logical = if address & 4 != 0 { LOGICAL } else { 0 };
    let hint = address & 8 != 0 && logical != 0;
    let arbitrated = match data >> 8 & 7 {
        0 => u32::from(hint),
        1 => 1,
        _ => return None,
    };
    let destination = (address >> 12) as u32 & 0xff;
    Some(
        REMAP
            | arbitrated << TYPE_SHIFT
            | logical
            | destination << DESTINATION_SHIFT
            | (data & 0xff) << VECTOR_SHIFT,
    )
}

impl<H: Host> Interrupts<H> {
    /// A table that lets nothing through.
    pub fn new() -> Result<Self, Error> {
        Pages::for_bytes(ENTRIES * 4).map(Interrupts)
    }

    /// Where it is.
    pub fn pa(&self) -> Hpa {
        self.0.pa()
    }

    /// Has entry `n` deliver the host's message, or nothing if that is no
    /// interrupt; the unit may know the entry as it was until it is told to
    /// forget it. What comes back is the data that the function has to send
    /// instead of the message's. `None`: nothing will arrive.
    pub fn set(&self, n: usize, (address, data): (u64, u32)) -> Option<u16> {
        if n >= ENTRIES {
            return None;
        }
        let value = entry(address, data);
        // SAFETY: within the page, aligned; the unit reads whole entries.
        let at = unsafe { &*self.0.as_ptr().cast::<AtomicU32>().wrapping_add(n) };
        at.store(value.unwrap_or(0), Ordering::Release);
        value.map(|_| n as u16)
    }
}
