//! Interrupts of a function under our own driver: the host's messages, which
//! name a CPU and a vector, are put into a table of the unit's, and the function
//! is given messages that name entries of it. What else it sends is blocked.
//!
//! The host goes on thinking that the function has its messages, and changes
//! them when it likes: its driver core has to say when (`host::Slot`).

use core::sync::atomic::{AtomicBool, Ordering};

use vmm_hw::amdvi::interrupts::Interrupts;

use super::place;
use super::{Group, Unit, locked};
use crate::errno;
use crate::klog;
use crate::os::Os;
use crate::ppt::{Rid, host};

/// Address and data of an interrupt message.
pub type Message = (u64, u32);

/// Whether interrupts of functions can be remapped: by the unit, and without
/// the host's knowing.
pub fn possible(amd: bool) -> bool {
    host::FOLLOWS_MESSAGES && place::remaps_one(amd)
}

/// The table of a function.
pub struct Remap {
    rid: Rid,
    base: u64,
    table: Interrupts<Os>,
    /// It has been said that a message is none that an entry can be.
    said: AtomicBool,
}

impl Remap {
    /// A table that lets nothing through; none where interrupts are the host's
    /// business, or pass as they are. ENXIO, ENOMEM.
    pub fn new(group: &Group) -> Result<Option<Self>, i32> {
        let Group::Own(rid) = *group else {
            return Ok(None);
        };
        let (base, amd) = place::unit_of(rid)?;
        if !possible(amd) {
            return Ok(None);
        }
        let table = Interrupts::new().map_err(|_| errno::ENOMEM)?;
        Ok(Some(Remap {
            rid,
            base,
            table,
            said: AtomicBool::new(false),
        }))
    }

    /// Where the table is.
    pub fn table(&self) -> u64 {
        self.table.pa()
    }

    /// Lets the host's message through as entry `n`, and no longer what was
    /// that before. What comes back is what the function has to send for it,
    /// `None` if it is no message, or no entry can be it (any context).
    pub fn set(&self, n: usize, message: Message) -> Option<Message> {
        let data = self.table.set(n, message);
        // Nothing at all is what the host writes to mask it.
        if data.is_none() && message != (0, 0) && !self.said.swap(true, Ordering::Relaxed) {
            let (address, data) = message;
            klog!(
                Error,
                "ppt {}: the host's interrupt message {address:#x}, {data:#x} cannot be remapped: the guest will miss it (only fixed interrupts to APIC IDs up to 255 can)",
                self.rid
            );
        }
        let mut units = locked();
        if let Some(Unit::Amd(unit)) = units.of(self.base)
            && let Err(e) = unit.invalidate_interrupts(self.rid.0)
        {
            klog!(Error, "ppt {}: the IOMMU: {e}", self.rid);
        }
        data.map(|data| (message.0, data.into()))
    }
}
