//! What the two tables that describe IOMMUs have in common: structures, one
//! behind the other after a header of 48 bytes, each with its length, bytes, in
//! the word at 2 (VT-d 4.1 §8.1; AMD I/O Virtualization Technology
//! Specification §5.2.1).

use core::fmt;

/// Why a table cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Its signature.
    pub table: &'static str,
    /// Offset of the structure that is wrong, bytes.
    pub at: usize,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Malformed { table, at } = self;
        write!(f, "the ACPI table {table} is malformed at byte {at}")
    }
}

pub(crate) const HEADER: usize = 48;

pub(crate) fn word(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(b.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn quad(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(b.get(at..at + 8)?.try_into().ok()?))
}

/// What `read` makes of each structure of `table`: `None` of one that is cut
/// short, which ends the walk with an error, `Some(None)` of one that does not
/// matter.
pub(crate) fn structures<'a, T>(
    name: &'static str,
    table: &'a [u8],
    read: impl Fn(&'a [u8]) -> Option<Option<T>>,
) -> impl Iterator<Item = Result<T, Malformed>> {
    let mut at = HEADER;
    let mut broken = false;
    core::iter::from_fn(move || {
        while !broken && at < table.len() {
            let here = at;
            let step = table.get(here..).and_then(|rest| {
                let len = usize::from(word(rest, 2)?);
                let body = rest.get(..len).filter(|_| len >= 4)?;
                at += len;
                read(body)
            });
            match step {
                None => {
                    broken = true;
                    return Some(Err(Malformed {
                        table: name,
                        at: here,
                    }));
                }
                Some(None) => {}
                Some(Some(found)) => return Some(Ok(found)),
            }
        }
        None
    })
}

#[cfg(test)]
pub mod testing {
    //! What the tests of the tables share.

    use super::HEADER;
    use std::vec;
    use std::vec::Vec;

    /// A table of these structures, its header all zeros.
    pub fn table(parts: &[Vec<u8>]) -> Vec<u8> {
        let mut table = vec![0; HEADER];
        for part in parts {
            table.extend(part);
        }
        table
    }
}
