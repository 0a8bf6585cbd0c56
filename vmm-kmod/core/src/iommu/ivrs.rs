//! The firmware's I/O virtualization table: which of AMD's IOMMUs is where, and
//! what it serves (AMD I/O Virtualization Technology Specification §5.2).

use super::acpi_table::{self, Malformed, quad, word};

/// What a unit makes of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serves {
    /// It serves it.
    Yes,
    /// It serves it under another requester ID, that of a bridge.
    As(u16),
    /// It does not.
    No,
}

/// The device entries of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entries<'a>(&'a [u8]);

/// A block of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block<'a> {
    /// A unit.
    Unit {
        /// PCI segment.
        segment: u16,
        /// Physical address of its registers.
        base: u64,
        /// What it serves.
        entries: Entries<'a>,
    },
    /// Memory that the firmware uses through the functions from the first to
    /// the last requester ID.
    Reserved {
        /// First.
        first: u16,
        /// Last.
        last: u16,
    },
}

/// The blocks of a table, header included, that matter here.
pub fn blocks(table: &[u8]) -> impl Iterator<Item = Result<Block<'_>, Malformed>> {
    acpi_table::structures("IVRS", table, |body| {
        let unit = |entries: usize| {
            Some(Block::Unit {
                segment: word(body, 16)?,
                base: quad(body, 8)?,
                entries: Entries(body.get(entries..)?),
            })
        };
        Some(match *body.first()? {
            0x10 => Some(unit(24)?),
            0x11 | 0x40 => Some(unit(40)?),
            0x20 => Some(Block::Reserved {
                first: 0,
                last: u16::MAX,
            }),
            0x21 => Some(Block::Reserved {
                first: word(body, 4)?,
                last: word(body, 4)?,
            }),
            0x22 => Some(Block::Reserved {
                first: word(body, 4)?,
                last: word(body, 6)?,
            }),
            _ => None,
        })
    })
}

/// Whether the units of a table can remap interrupts, each function's by itself.
pub fn interrupts(table: &[u8]) -> bool {
    blocks(table).any(|b| matches!(b, Ok(Block::Unit { entries, .. }) if entries.interrupts()))
}

impl Entries<'_> {
    /// The entries that can be read, each with what comes behind it.
    fn each(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.0;
        core::iter::from_fn(move || {
            let entry = rest;
            let kind = entry.first()?;
            let len = match kind >> 6 {
                0 => 4,
                1 => 8,
                2 => 16,
                // An ACPI device: its name's length comes last.
                _ => 22 + entry.get(21).map_or(0, |n| usize::from(*n)),
            };
            rest = entry.get(len..).unwrap_or_default();
            Some(entry)
        })
    }

    /// Whether the unit remaps an I/O APIC's interrupts, by which the firmware
    /// tells that interrupts can be remapped.
    fn interrupts(&self) -> bool {
        const SPECIAL: u8 = 0x48;
        const IO_APIC: u8 = 1;
        self.each()
            .any(|e| matches!(e, [SPECIAL, _, _, _, _, _, _, IO_APIC, ..]))
    }

    /// What becomes of the function with this requester ID.
    pub fn serves(&self, rid: u16) -> Serves {
        // A range that has begun: its first ID, and what the functions in it are.
        let mut range: Option<(u16, Serves)> = None;
        let mut all = Serves::No;
        for entry in self.each() {
            let (Some(kind), Some(id)) = (entry.first(), word(entry, 1)) else {
                break;
            };
            let alias = word(entry, 5).map_or(Serves::Yes, Serves::As);
            match kind {
                1 => all = Serves::Yes,
                2 | 0x46 if id == rid => return Serves::Yes,
                0x42 if id == rid => return alias,
                3 | 0x47 => range = Some((id, Serves::Yes)),
                0x43 => range = Some((id, alias)),
                4 => {
                    if let Some((first, what)) = range.take()
                        && (first..=id).contains(&rid)
                    {
                        return what;
                    }
                }
                _ => {}
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::super::acpi_table::HEADER;
    use super::super::acpi_table::testing::table;
    use super::*;
    use std::vec;
    use std::vec::Vec;

    fn unit(kind: u8, base: u64, entries: &[u8]) -> Vec<u8> {
        let fixed = if kind == 0x10 { 24 } else { 40 };
        let mut b = vec![kind, 0, (fixed + entries.len()) as u8, 0, 0, 0, 0, 0];
        b.extend(base.to_le_bytes());
        b.resize(fixed, 0);
        b.extend(entries);
        b
    }

    #[test]
    fn units_and_reserved_memory_are_found_and_others_skipped() {
        let mut one = vec![0x21, 0, 32, 0, 0x28, 0, 0, 0];
        one.resize(32, 0);
        let other = vec![0x77, 0, 4, 0];
        let t = table(&[
            unit(0x10, 0xfed8_0000, &[1, 0, 0, 0]),
            other,
            one,
            unit(0x11, 0xfed8_0000, &[]),
        ]);
        let all: Vec<_> = blocks(&t).map(Result::unwrap).collect();
        let [
            Block::Unit {
                base: 0xfed8_0000,
                entries,
                ..
            },
            Block::Reserved {
                first: 0x28,
                last: 0x28,
            },
            Block::Unit { .. },
        ] = all[..]
        else {
            panic!("{all:?}");
        };
        assert_eq!(entries.serves(0x1234), Serves::Yes);
    }

    #[test]
    fn entries_name_single_functions_ranges_and_aliases() {
        let e = Entries(&[
            2, 0x08, 0, 0, // 0:1.0
            3, 0x10, 0, 0, 4, 0x1f, 0, 0, // 0:2.0 to 0:3.7
            0x42, 0x00, 2, 0, 0, 0x00, 1, 0, // 2:0.0 as 1:0.0
            0x43, 0x00, 3, 0, 0, 0x00, 1, 0, 4, 0xff, 3, 0, // bus 3 as 1:0.0
            0x48, 0, 0, 0, 0, 0xa0, 0, 1, // the I/O APIC
        ]);
        for rid in [0x08, 0x10, 0x17, 0x1f] {
            assert_eq!(e.serves(rid), Serves::Yes, "{rid:x}");
        }
        assert!(e.interrupts());
        assert!(
            !Entries(&[0x48, 0, 0, 0, 0, 0xa0, 0, 2]).interrupts(),
            "HPET"
        );
        assert!(!Entries(&[2, 0x48, 0, 0, 0x48, 0, 0, 0]).interrupts());
        assert_eq!(e.serves(0x200), Serves::As(0x100));
        assert_eq!(e.serves(0x3ff), Serves::As(0x100));
        for rid in [0x09, 0x20, 0x201, 0x400] {
            assert_eq!(e.serves(rid), Serves::No, "{rid:x}");
        }
    }

    #[test]
    fn malformed_tables_end_in_an_error() {
        for bad in [
            vec![0x10, 0, 0, 0],
            vec![0x10, 0, 8, 0, 0, 0, 0, 0],
            vec![0x10, 0, 99, 0],
            vec![1],
        ] {
            let t = table(&[bad]);
            let all: Vec<_> = blocks(&t).collect();
            assert_eq!(
                all,
                [Err(Malformed {
                    table: "IVRS",
                    at: HEADER
                })]
            );
        }
        for bad in [&[][..], &[2], &[0x42, 8, 0], &[0xf0, 0, 0, 0]] {
            assert_eq!(Entries(bad).serves(9), Serves::No);
        }
    }
}
