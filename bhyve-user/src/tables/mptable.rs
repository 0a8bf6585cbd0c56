//! The MP table (Intel MultiProcessor Specification 1.4 §4).

use super::{IOAPIC, LAPIC, MPTABLE_BASE, SMBIOS_BASE, TooLarge, seal};
use crate::pci::root::IntxMap;
use crate::pm::SCI;

const POINTER: usize = 16;
const HEADER: usize = 44;
const PCI_BUS: u8 = 0;
const ISA_BUS: u8 = 1;
const IOAPIC_ID: u8 = 0;
/// Interrupt types.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
/// Active low, level triggered.
const LOW_LEVEL: u16 = 0xf;
const LAPIC_VERSION: u8 = 0x10;
const IOAPIC_VERSION: u8 = 0x11;
/// A Nehalem, and its features: guests want to see a CPU with an APIC.
const SIGNATURE: u32 = 0x06a5;
const FEATURES: u32 = 0xbfeb_fbff;

/// Pointer and table for [`MPTABLE_BASE`]. APIC IDs are one byte, so CPUs from
/// 255 on are in ACPI's MADT only.
pub fn build(cpus: u32, intx: &IntxMap) -> Result<Vec<u8>, TooLarge> {
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..cpus.min(255) as u8 {
        let flags = if id == 0 { 3 } else { 1 };
        let mut e = vec![0, id, LAPIC_VERSION, flags];
        e.extend(SIGNATURE.to_le_bytes());
        e.extend(FEATURES.to_le_bytes());
        e.resize(20, 0);
        entry(&e);
    }
    for (id, name) in [(PCI_BUS, b"PCI   "), (ISA_BUS, b"ISA   ")] {
        let mut e = vec![1, id];
        e.extend(name);
        entry(&e);
    }
    let mut e = vec![2, IOAPIC_ID, IOAPIC_VERSION, 1];
    e.extend(IOAPIC.to_le_bytes());
    entry(&e);
    let mut interrupt = |kind: u8, flags: u16, bus: u8, irq: u8, pin: u8| {
        let [lo, hi] = flags.to_le_bytes();
        entry(&[3, kind, lo, hi, bus, irq, IOAPIC_ID, pin]);
    };
    for pin in 0..16 {
        match pin {
            0 => interrupt(EXTINT, 0, ISA_BUS, 0, 0),
            2 => interrupt(INT, 0, ISA_BUS, 0, 2),
            SCI => interrupt(INT, LOW_LEVEL, ISA_BUS, SCI, SCI),
            _ => interrupt(INT, 0, ISA_BUS, pin, pin),
        }
    }
    for (at, pin, route) in intx {
        interrupt(INT, 0, PCI_BUS, at.slot << 2 | pin, route.ioapic);
    }
    // All CPUs: the 8259s at LINT0, NMI at LINT1.
    entry(&[4, EXTINT, 0, 0, 0, 0, 0xff, 0]);
    entry(&[4, NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut table = b"PCMP".to_vec();
    table.extend(((HEADER + entries.len()) as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"BHyVe   Hypervisor  ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(LAPIC.to_le_bytes());
    table.resize(HEADER, 0);
    table.append(&mut entries);
    seal(&mut table, 7);

    let mut out = b"_MP_".to_vec();
    out.extend((MPTABLE_BASE as u32 + POINTER as u32).to_le_bytes());
    out.extend([1, 4]);
    out.resize(POINTER, 0);
    seal(&mut out, 10);
    out.append(&mut table);
    let room = (SMBIOS_BASE - MPTABLE_BASE) as usize;
    if out.len() > room {
        return Err(TooLarge("MP table", out.len(), room));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Bdf;
    use crate::pci::intx::Route;
    use crate::tables::checksum;

    #[test]
    fn sums_lengths_and_counts_are_right() {
        let at = Bdf {
            bus: 0,
            slot: 3,
            func: 0,
        };
        let intx = vec![(
            at,
            0,
            Route {
                ioapic: 17,
                link: 0,
            },
        )];
        let t = build(4, &intx).unwrap();
        assert_eq!(checksum(&t[..16]), 0);
        let table = &t[16..];
        assert_eq!(checksum(table), 0);
        assert_eq!(
            usize::from(u16::from_le_bytes([table[4], table[5]])),
            table.len()
        );
        let count = u16::from_le_bytes([table[34], table[35]]);
        let (mut at, mut seen, mut kinds) = (HEADER, 0, [0; 5]);
        while at < table.len() {
            kinds[usize::from(table[at])] += 1;
            at += if table[at] == 0 { 20 } else { 8 };
            seen += 1;
        }
        assert_eq!((at, seen), (table.len(), count));
        assert_eq!(kinds, [4, 2, 1, 17, 2]);
        assert!(table.ends_with(&[
            3, 0, 0, 0, 0, 12, 0, 17, 4, 3, 0, 0, 0, 0, 0xff, 0, 4, 1, 0, 0, 0, 0, 0xff, 1
        ]));
    }

    #[test]
    fn more_cpus_than_fit_is_an_error_with_the_reason() {
        assert!(
            build(255, &Vec::new())
                .unwrap_err()
                .to_string()
                .contains("too many CPUs")
        );
        assert!(build(150, &Vec::new()).is_ok());
    }
}
