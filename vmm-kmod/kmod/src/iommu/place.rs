//! What the firmware's tables and PCI say of a function: which unit serves it,
//! and under whose name its DMA comes.

use core::ffi::CStr;
use core::fmt;
use core::ptr;

use vmm_core::iommu::acpi_table::Malformed;
use vmm_core::iommu::dmar::{self, Structure};
use vmm_core::iommu::ivrs::{self, Block, Serves};
use vmm_core::iommu::pci::{Bridges, Config};

use crate::errno;
use crate::klog;
use crate::ppt::Rid;
use crate::ppt::host;

/// A table of the firmware's, if there is one. It stays mapped.
fn acpi(signature: &CStr) -> Option<&'static [u8]> {
    let mut table: *const u8 = ptr::null();
    // SAFETY: the signature ends with NUL, `table` is writable.
    let status = unsafe { host::get_table(signature.as_ptr(), 1, &mut table) };
    if status != 0 || table.is_null() {
        return None;
    }
    // SAFETY: an ACPI table begins with its signature and its length, and is
    // mapped as a whole; nobody writes it.
    unsafe {
        let len = table.add(4).cast::<u32>().read_unaligned();
        Some(core::slice::from_raw_parts(table, len as usize))
    }
}

/// The unit that serves a function, and whether it is AMD's. ENXIO.
pub fn unit_of(rid: Rid) -> Result<(u64, bool), i32> {
    let found = match (acpi(c"DMAR"), acpi(c"IVRS")) {
        (Some(table), _) => intel(table, rid).map(|base| (base, false)),
        (None, Some(table)) => amd(table, rid).map(|base| (base, true)),
        (None, None) => Err(Excuse::Nothing),
    };
    found.map_err(|why| {
        klog!(Error, "ppt {rid}: {why}");
        errno::ENXIO
    })
}

/// Why no unit serves a function.
pub enum Excuse {
    Nothing,
    Table(Malformed),
    Firmware,
    Alias(u16),
    Unserved,
}

impl fmt::Display for Excuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Excuse::Nothing => {
                f.write_str("no IOMMU: the firmware describes none (is VT-d or AMD-Vi off there?)")
            }
            Excuse::Table(e) => e.fmt(f),
            Excuse::Firmware => f.write_str(
                "the firmware uses memory through it (RMRR, IVMD): it has to stay with the host",
            ),
            Excuse::Alias(bridge) => write!(
                f,
                "its DMA comes in the name of the bridge {}, and that of others too",
                Rid(*bridge)
            ),
            Excuse::Unserved => f.write_str("no IOMMU serves it"),
        }
    }
}

/// The host's PCI.
pub struct Pci;

impl Config for Pci {
    fn config(&self, rid: u16, at: u16) -> Option<u32> {
        host::config(rid, at)
    }
}

fn buses(rid: u16) -> Option<(u8, u8)> {
    Pci.buses(rid)
}

/// Whether all DMA of a function comes with its own requester ID: what
/// conventional PCI sends comes with that of a bridge, or of its bus, whose
/// context would let it pass.
pub fn own_name(Rid(rid): Rid) -> Result<(), Excuse> {
    /// PCI Express to PCI, and back.
    const TO_PCI: [u8; 2] = [7, 8];
    let pci = Bridges::new(Pci);
    let mut at = rid;
    let mut kind = pci.port_type(rid);
    while let Some(bridge) = pci.bridge_to((at >> 8) as u8) {
        // Whatever is below is told from others only on PCI Express.
        if kind.is_none() {
            return Err(Excuse::Alias(bridge));
        }
        kind = pci.port_type(bridge);
        if kind.is_none_or(|k| TO_PCI.contains(&k)) {
            return Err(Excuse::Alias(bridge));
        }
        at = bridge;
    }
    Ok(())
}

fn intel(table: &[u8], rid: Rid) -> Result<u64, Excuse> {
    let (mut named, mut rest) = (None, None);
    for s in dmar::structures(table) {
        match s.map_err(Excuse::Table)? {
            Structure::Reserved { segment: 0, scopes } if scopes.has(rid.0, buses) => {
                return Err(Excuse::Firmware);
            }
            Structure::Unit {
                segment: 0,
                base,
                rest: others,
                scopes,
            } => {
                if scopes.has(rid.0, buses) {
                    named = Some(base);
                } else if others {
                    rest = Some(base);
                }
            }
            _ => {}
        }
    }
    named.or(rest).ok_or(Excuse::Unserved)
}

fn amd(table: &[u8], rid: Rid) -> Result<u64, Excuse> {
    let mut found = Err(Excuse::Unserved);
    for b in ivrs::blocks(table) {
        match b.map_err(Excuse::Table)? {
            Block::Reserved { first, last } if (first..=last).contains(&rid.0) => {
                return Err(Excuse::Firmware);
            }
            Block::Unit {
                segment: 0,
                base,
                entries,
            } => match entries.serves(rid.0) {
                Serves::Yes => found = Ok(base),
                Serves::As(other) if other == rid.0 => found = Ok(base),
                Serves::As(other) => return Err(Excuse::Alias(other)),
                Serves::No => {}
            },
            _ => {}
        }
    }
    found
}

/// Whether a unit can remap the interrupts of one function and leave alone those
/// of all others: only AMD's can, and only where the firmware says so.
pub fn remaps_one(amd: bool) -> bool {
    amd && acpi(c"IVRS").is_some_and(ivrs::interrupts)
}
