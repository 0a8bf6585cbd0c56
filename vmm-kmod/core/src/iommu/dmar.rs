//! The firmware's DMA remapping table: which IOMMU is where, and what it
//! serves (VT-d 4.1 §8).

use super::acpi_table::{self, Malformed, quad, word};

/// Which PCI functions a structure speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scopes<'a>(&'a [u8]);

/// A remapping structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Structure<'a> {
    /// A remapping unit.
    Unit {
        /// PCI segment.
        segment: u16,
        /// Physical address of its registers.
        base: u64,
        /// It serves all functions that no other unit of the segment names.
        rest: bool,
        /// The functions that it serves.
        scopes: Scopes<'a>,
    },
    /// Memory that the firmware uses through devices, and that must stay mapped
    /// for them.
    Reserved {
        /// PCI segment.
        segment: u16,
        /// The devices.
        scopes: Scopes<'a>,
    },
}

/// The structures of a table, header included, that matter here.
pub fn structures(table: &[u8]) -> impl Iterator<Item = Result<Structure<'_>, Malformed>> {
    acpi_table::structures("DMAR", table, |body| {
        Some(match word(body, 0)? {
            0 => Some(Structure::Unit {
                rest: body.get(4)? & 1 != 0,
                segment: word(body, 6)?,
                base: quad(body, 8)?,
                scopes: Scopes(body.get(16..)?),
            }),
            1 => Some(Structure::Reserved {
                segment: word(body, 6)?,
                scopes: Scopes(body.get(24..)?),
            }),
            _ => None,
        })
    })
}

const ENDPOINT: u8 = 1;
const HIERARCHY: u8 = 2;

impl Scopes<'_> {
    /// Whether the function with this requester ID is one of them. `buses`
    /// tells a bridge's secondary and subordinate bus from its requester ID.
    pub fn has(&self, rid: u16, buses: impl Fn(u16) -> Option<(u8, u8)>) -> bool {
        let mut rest = self.0;
        // Scopes that cannot be read end the list.
        while let Some(len) = rest.get(1).map(|l| usize::from(*l)) {
            let Some(scope) = rest.get(..len).filter(|s| s.len() >= 6) else {
                return false;
            };
            if matches(scope, rid, &buses) {
                return true;
            }
            rest = rest.get(len..).unwrap_or_default();
        }
        false
    }
}

fn matches(scope: &[u8], rid: u16, buses: &impl Fn(u16) -> Option<(u8, u8)>) -> bool {
    let [kind, _, _, _, _, start, path @ ..] = scope else {
        return false;
    };
    let mut bus = *start;
    let mut hops = path.chunks_exact(2).peekable();
    while let Some(hop) = hops.next() {
        let [slot, func] = hop else { return false };
        let at = u16::from(bus) << 8 | u16::from(slot & 31) << 3 | u16::from(func & 7);
        if hops.peek().is_none() {
            return match *kind {
                ENDPOINT => at == rid,
                HIERARCHY => {
                    at == rid
                        || buses(at).is_some_and(|(from, to)| {
                            let bus = (rid >> 8) as u8;
                            (from..=to).contains(&bus)
                        })
                }
                _ => false,
            };
        }
        match buses(at) {
            Some((secondary, _)) => bus = secondary,
            None => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::acpi_table::HEADER;
    use super::super::acpi_table::testing::table;
    use super::*;
    use std::vec;
    use std::vec::Vec;

    fn unit(flags: u8, base: u64, scopes: &[u8]) -> Vec<u8> {
        let mut s = vec![0, 0, 16 + scopes.len() as u8, 0, flags, 0, 0, 0];
        s.extend(base.to_le_bytes());
        s.extend(scopes);
        s
    }

    fn none(_: u16) -> Option<(u8, u8)> {
        None
    }

    #[test]
    fn units_and_reserved_memory_are_found_and_others_skipped() {
        let mut rmrr = vec![1, 0, 32, 0, 0, 0, 0, 0];
        rmrr.extend([0; 16]);
        rmrr.extend([ENDPOINT, 8, 0, 0, 0, 0, 0x1d, 0]);
        let atsr = vec![2, 0, 8, 0, 0, 0, 0, 0];
        let t = table(&[
            unit(0, 0xfed9_0000, &[ENDPOINT, 8, 0, 0, 0, 0, 2, 0]),
            rmrr,
            atsr,
            unit(1, 0xfed9_1000, &[]),
        ]);
        let all: Vec<_> = structures(&t).map(Result::unwrap).collect();
        let [
            Structure::Unit {
                base: 0xfed9_0000,
                rest: false,
                scopes,
                ..
            },
            Structure::Reserved {
                scopes: reserved, ..
            },
            Structure::Unit {
                base: 0xfed9_1000,
                rest: true,
                ..
            },
        ] = all[..]
        else {
            panic!("{all:?}");
        };
        assert!(scopes.has(2 << 3, none));
        assert!(!scopes.has(2 << 3 | 1, none));
        assert!(reserved.has(0x1d << 3, none));
    }

    #[test]
    fn a_path_goes_through_bridges() {
        // Bridge 0:1c.4 leads to buses 5 to 7, on 5 is the endpoint 5:0.1.
        let buses = |rid| (rid == 0x1c << 3 | 4).then_some((5, 7));
        let endpoint = [ENDPOINT, 10, 0, 0, 0, 0, 0x1c, 4, 0, 1];
        let hierarchy = [HIERARCHY, 8, 0, 0, 0, 0, 0x1c, 4];
        assert!(Scopes(&endpoint).has(0x501, buses));
        assert!(!Scopes(&endpoint).has(0x500, buses));
        assert!(!Scopes(&endpoint).has(0x501, none));
        for rid in [0x500, 0x601, 0x7ff, 0x1c << 3 | 4] {
            assert!(Scopes(&hierarchy).has(rid, buses), "{rid:x}");
        }
        for rid in [0x800, 0x4ff, 0x1c << 3] {
            assert!(!Scopes(&hierarchy).has(rid, buses), "{rid:x}");
        }
    }

    #[test]
    fn malformed_tables_end_in_an_error_and_scopes_in_no() {
        for bad in [
            vec![0, 0, 0, 0],
            vec![0, 0, 3, 0],
            vec![0, 0, 16, 0, 0],
            vec![0, 0, 8, 0, 0, 0, 0, 0],
            vec![0],
        ] {
            let t = table(&[bad]);
            let all: Vec<_> = structures(&t).collect();
            assert_eq!(
                all,
                [Err(Malformed {
                    table: "DMAR",
                    at: HEADER
                })]
            );
        }
        assert_eq!(structures(&[]).count(), 0);
        for bad in [
            &[ENDPOINT, 0, 0, 0, 0, 0][..],
            &[ENDPOINT, 40, 0, 0, 0, 0],
            &[ENDPOINT],
        ] {
            assert!(!Scopes(bad).has(0, none));
        }
        // No path.
        assert!(!Scopes(&[ENDPOINT, 6, 0, 0, 0, 0]).has(0, none));
    }
}
