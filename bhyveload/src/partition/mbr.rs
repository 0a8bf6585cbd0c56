//! Master boot records and the logical drives of extended partitions.

use super::{Kind, Partition};
use crate::disk::{Read, ReadAt, array};
use crate::layout::le32;

const SECTOR: u64 = 512;
/// Most logical drives that are looked at; FreeBSD numbers slices up to 32 or so.
const LOGICAL: usize = 64;

struct Entry {
    active: bool,
    kind: u8,
    first: u64,
    sectors: u64,
}

impl Entry {
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

/// The four entries of the record at sector `lba`, if there is a record.
fn record(disk: &dyn ReadAt, lba: u64) -> Read<Option<[Entry; 4]>> {
    let Some(at) = lba
        .checked_mul(SECTOR)
        .filter(|&at| at.checked_add(SECTOR).is_some_and(|end| end <= disk.size()))
    else {
        return Ok(None);
    };
    let sector = array::<512>(disk, at)?;
    if sector[510..] != [0x55, 0xaa] {
        return Ok(None);
    }
    let entry = |i: usize| {
        let bytes = &sector[446 + 16 * i..462 + 16 * i];
        Entry {
            active: bytes[0] == 0x80,
            kind: bytes[4],
            first: u64::from(le32(bytes, 8).unwrap_or_default()),
            sectors: u64::from(le32(bytes, 12).unwrap_or_default()),
        }
    };
    let entries = [entry(0), entry(1), entry(2), entry(3)];
    // A file system's own boot sector ends in the same two bytes.
    let plausible = [0, 1, 2, 3]
        .iter()
        .all(|i| sector[446 + 16 * i] & 0x7f == 0);
    Ok(plausible.then_some(entries))
}

fn slice(disk: &dyn ReadAt, number: usize, base: u64, entry: &Entry) -> Option<Partition> {
    let start = base.checked_add(entry.first)?.checked_mul(SECTOR)?;
    if entry.kind == 0 || entry.sectors == 0 || start >= disk.size() {
        return None;
    }
    Some(Partition {
        name: format!("s{number}"),
        kind: match entry.kind {
            0xa5 => Kind::FreeBsd,
            0xef => Kind::Efi,
            _ => Kind::Other,
        },
        start,
        size: entry
            .sectors
            .saturating_mul(SECTOR)
            .min(disk.size() - start),
        preferred: entry.active,
    })
}

/// The slices of a disk: `s1` to `s4`, and `s5` and on within an extended one.
///
/// # Errors
/// The host cannot read the image.
pub fn partitions(disk: &dyn ReadAt) -> Read<Vec<Partition>> {
    let Some(entries) = record(disk, 0)? else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    let mut extended = None;
    for (i, entry) in entries.iter().enumerate() {
        // 0xee only guards a GPT.
        if entry.is_extended() {
            extended.get_or_insert(entry.first);
        } else if entry.kind != 0xee && entry.first != 0 {
            found.extend(slice(disk, i + 1, 0, entry));
        }
    }
    // Each logical drive has a record of its own, which names the next one
    // relative to the first. A chain that turns back ends by its count.
    if let Some(first) = extended {
        let mut at = first;
        for number in 5..5 + LOGICAL {
            let Some(entries) = record(disk, at)? else {
                break;
            };
            found.extend(slice(disk, number, at, &entries[0]));
            let next = &entries[1];
            if !next.is_extended() || next.first == 0 {
                break;
            }
            let Some(next) = first.checked_add(next.first) else {
                break;
            };
            at = next;
        }
    }
    Ok(found)
}
