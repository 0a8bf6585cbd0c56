//! ACPI tables other than the DSDT (ACPI 6.5 §5.2), at [`ACPI_BASE`].

use acpi_tables::sdt::Sdt;

use super::dsdt;
use super::{ACPI_BASE, END, HPET, IOAPIC, LAPIC, TooLarge, seal};
use crate::pci::root::PciRoot;
use crate::pci::{ECAM_BASE, root};
use crate::pm;

const OEM: [u8; 6] = *b"BHYVE ";
/// The highest APIC ID of an xAPIC entry; 255 is broadcast.
const XAPIC_MAX: u32 = 254;

/// What the tables tell.
pub struct Facts<'a> {
    /// CPUs; APIC IDs count from 0.
    pub cpus: u32,
    /// Capability register of the HPET, low half; `None` without one.
    pub hpet: Option<u32>,
    /// The PCI buses.
    pub pci: &'a PciRoot,
    /// Serial ports that exist.
    pub serial: [bool; 2],
}

fn sdt(signature: &[u8; 4], revision: u8, table: &[u8; 8]) -> Sdt {
    Sdt::new(*signature, 36, revision, OEM, *table, 1)
}

/// RSDP and every table behind it, as one block of memory.
pub fn build(facts: &Facts<'_>) -> Result<Vec<u8>, TooLarge> {
    let mut image = Image {
        bytes: vec![0; 0x100],
    };
    let facs = image.add(&facs());
    let dsdt = image.add(dsdt::build(facts).as_slice());
    let mut tables = vec![
        image.add(madt(facts.cpus).as_slice()),
        image.add(fadt(facs, dsdt).as_slice()),
    ];
    if let Some(capabilities) = facts.hpet {
        tables.push(image.add(hpet(capabilities).as_slice()));
    }
    tables.push(image.add(mcfg().as_slice()));

    let mut rsdt = sdt(b"RSDT", 1, b"BVRSDT  ");
    let mut xsdt = sdt(b"XSDT", 1, b"BVXSDT  ");
    for &t in &tables {
        rsdt.append_slice(&t.to_le_bytes());
        xsdt.append_slice(&u64::from(t).to_le_bytes());
    }
    image.put(0x40, rsdt.as_slice());
    image.put(0x80, xsdt.as_slice());

    let mut rsdp = b"RSD PTR \0".to_vec();
    rsdp.extend(OEM);
    rsdp.push(2);
    rsdp.extend((ACPI_BASE as u32 + 0x40).to_le_bytes());
    seal(&mut rsdp, 8);
    rsdp.extend(36_u32.to_le_bytes());
    rsdp.extend((ACPI_BASE + 0x80).to_le_bytes());
    rsdp.resize(36, 0);
    seal(&mut rsdp, 32);
    image.put(0, &rsdp);

    let room = (END - ACPI_BASE) as usize;
    if image.bytes.len() > room {
        return Err(TooLarge("set of ACPI tables", image.bytes.len(), room));
    }
    Ok(image.bytes)
}

struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table, aligned for the FACS, and returns its address.
    fn add(&mut self, table: &[u8]) -> u32 {
        let at = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(at, 0);
        self.bytes.extend(table);
        ACPI_BASE as u32 + at as u32
    }
    fn put(&mut self, at: usize, table: &[u8]) {
        for (b, v) in self.bytes.iter_mut().skip(at).zip(table) {
            *b = *v;
        }
    }
}

fn facs() -> Vec<u8> {
    let mut f = b"FACS".to_vec();
    f.extend(64_u32.to_le_bytes());
    f.resize(32, 0);
    f.push(2);
    f.resize(64, 0);
    f
}

/// Interrupt controllers: every local APIC, the I/O APIC, IRQ 0 at pin 2, the
/// SCI level and low, NMI at LINT1.
fn madt(cpus: u32) -> Sdt {
    let mut t = sdt(b"APIC", 3, b"BVMADT  ");
    t.append_slice(&LAPIC.to_le_bytes());
    t.append_slice(&1_u32.to_le_bytes());
    let mut entries = Vec::new();
    for id in 0..cpus {
        if id <= XAPIC_MAX {
            entries.extend([0, 8, id as u8, id as u8, 1, 0, 0, 0]);
        } else {
            entries.extend([9, 16, 0, 0]);
            entries.extend(id.to_le_bytes());
            entries.extend(1_u32.to_le_bytes());
            entries.extend(id.to_le_bytes());
        }
    }
    entries.extend([1, 12, 0, 0]);
    entries.extend(IOAPIC.to_le_bytes());
    entries.extend(0_u32.to_le_bytes());
    // Edge and active high; level and active low.
    entries.extend([2, 10, 0, 0, 2, 0, 0, 0, 5, 0]);
    entries.extend([2, 10, 0, pm::SCI, pm::SCI, 0, 0, 0, 0xf, 0]);
    entries.extend([4, 6, 0xff, 5, 0, 1]);
    if cpus > XAPIC_MAX + 1 {
        entries.extend([10, 12, 5, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    t.append_slice(&entries);
    t
}

/// A generic address structure in I/O space; `access` is 1 for bytes, 2 for
/// words, 3 for double words.
fn io(bits: u8, access: u8, port: u16) -> [u8; 12] {
    let [lo, hi] = port.to_le_bytes();
    [1, bits, 0, access, lo, hi, 0, 0, 0, 0, 0, 0]
}

fn fadt(facs: u32, dsdt: u32) -> Sdt {
    let mut t = Sdt::new(*b"FACP", 268, 5, OEM, *b"BVFACP  ", 1);
    t.write_u32(36, facs);
    t.write_u32(40, dsdt);
    t.write_u8(44, 1);
    t.write_u16(46, pm::SCI.into());
    t.write_u32(48, pm::SMI_COMMAND.into());
    t.write_u8(52, pm::ACPI_ENABLE);
    t.write_u8(53, pm::ACPI_DISABLE);
    t.write_u32(56, pm::PM1_EVENT.into());
    t.write_u32(64, pm::PM1_CONTROL.into());
    t.write_u32(76, pm::PM_TIMER.into());
    t.write_u8(88, 4);
    t.write_u8(89, 2);
    t.write_u8(91, 4);
    // No C2, no C3.
    t.write_u16(96, 101);
    t.write_u16(98, 1001);
    t.write_u8(108, 0x32);
    // No VGA, no ASPM, no 8042 that matters.
    t.write_u16(109, 0x14);
    // WBINVD works, C1, no fixed sleep button, no RTC alarm among the fixed
    // events, 32-bit timer, reset register, headless, physical APIC
    // destinations.
    let flags = [0, 2, 5, 6, 8, 10, 12, 19];
    t.write_u32(112, flags.iter().fold(0, |f, bit| f | 1 << bit));
    t.write_bytes(116, &io(8, 1, pm::RESET));
    t.write_u8(128, 6);
    t.write_u8(131, 1);
    // X_FIRMWARE_CTRL stays 0: only one of the two may name the FACS (ACPI 6.5
    // table 5.9).
    t.write_u64(140, dsdt.into());
    t.write_bytes(148, &io(32, 2, pm::PM1_EVENT));
    t.write_bytes(172, &io(16, 2, pm::PM1_CONTROL));
    t.write_bytes(208, &io(32, 3, pm::PM_TIMER));
    t
}

fn hpet(capabilities: u32) -> Sdt {
    let mut t = Sdt::new(*b"HPET", 56, 1, OEM, *b"BVHPET  ", 1);
    t.write_u32(36, capabilities);
    t.write_u64(44, HPET.into());
    // Protected for 4 KiB.
    t.write_u8(55, 1);
    t
}

fn mcfg() -> Sdt {
    let mut t = Sdt::new(*b"MCFG", 60, 1, OEM, *b"BVMCFG  ", 1);
    t.write_u64(44, ECAM_BASE);
    t.write_u8(55, 0xff);
    t
}

/// INTx pins of one bus as `_PRT` wants them; re-exported for [`dsdt`].
pub(super) fn intx_of(pci: &PciRoot, bus: u8) -> root::IntxMap {
    pci.intx_map()
        .into_iter()
        .filter(|(at, ..)| at.bus == bus)
        .collect()
}

#[cfg(test)]
#[path = "acpi_tests.rs"]
mod tests;
