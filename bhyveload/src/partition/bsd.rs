//! BSD disklabels (sys/sys/disklabel.h of FreeBSD).

use super::{Kind, Partition};
use crate::disk::{Fault, Read, ReadAt, array};
use crate::layout::{le16, le32};

const MAGIC: u32 = 0x8256_4557;
/// The label is in the slice's second sector.
const LABEL: u64 = 512;
/// `d_partitions`.
const PARTITIONS: usize = 148;
/// Most that a label can hold here; FreeBSD's own limit is 20.
const MOST: usize = 20;
/// The partition `c`, which is the whole slice.
const RAW: usize = 2;

/// The partitions `a`, `b`, … of a slice that starts at byte `absolute` of its
/// disk; `start` is in bytes from the slice's. `None`: there is no label.
///
/// # Errors
/// The label is damaged, or the host cannot read the image.
pub fn partitions(slice: &dyn ReadAt, absolute: u64) -> Read<Option<Vec<Partition>>> {
    if slice.size() < LABEL + 512 {
        return Ok(None);
    }
    let label = array::<512>(slice, LABEL)?;
    let word = |at| le32(&label, at).unwrap_or_default();
    if word(0) != MAGIC || word(132) != MAGIC {
        return Ok(None);
    }
    let count = usize::from(le16(&label, 138).unwrap_or_default());
    if count == 0 || count > MOST {
        return Err(Fault::new("d_npartitions", format!("is {count}")));
    }
    // The sum makes the XOR of all 16-bit words zero.
    let sum = (0..PARTITIONS + 16 * count)
        .step_by(2)
        .fold(0, |sum, at| sum ^ le16(&label, at).unwrap_or_default());
    if sum != 0 {
        return Err(Fault::new("d_checksum", "does not match the label"));
    }
    let sector = match word(40) {
        size @ (512 | 1024 | 2048 | 4096) => u64::from(size),
        size => return Err(Fault::new("d_secsize", format!("is {size}"))),
    };
    let entry = |i: usize| {
        let at = PARTITIONS + 16 * i;
        (u64::from(word(at)), u64::from(word(at + 4)), label[at + 12])
    };
    // Offsets count from the disk's start where `c` says that the slice does.
    let raw = if count > RAW { entry(RAW).1 } else { 0 };
    let base = if raw * sector == absolute { raw } else { 0 };
    let mut found = Vec::new();
    for i in 0..count {
        let (sectors, offset, kind) = entry(i);
        let Some(start) = offset.checked_sub(base).map(|sectors| sectors * sector) else {
            continue;
        };
        if i == RAW || sectors == 0 || start >= slice.size() {
            continue;
        }
        found.push(Partition {
            name: char::from(b'a' + i as u8).to_string(),
            kind: match kind {
                7 => Kind::Ufs,
                1 => Kind::Swap,
                27 => Kind::Zfs,
                _ => Kind::Other,
            },
            start,
            size: (sectors * sector).min(slice.size() - start),
            preferred: false,
        });
    }
    Ok(Some(found))
}
