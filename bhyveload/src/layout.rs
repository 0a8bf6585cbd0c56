//! Sums and bounds for addresses that come out of files.

use crate::error::LoadError;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// The least multiple of `align` (a power of two, or 0 and 1 for none) that is not below `value`.
#[must_use]
pub fn round_up(value: u64, align: u64) -> Option<u64> {
    if align <= 1 {
        return Some(value);
    }
    let mask = align - 1;
    Some(value.checked_add(mask)? & !mask)
}

/// The bytes `[offset, offset + len)` of a file.
///
/// # Errors
/// They are not all there: the error names `field` of `file`.
pub fn slice<'a>(
    file: &str,
    field: &str,
    data: &'a [u8],
    offset: u64,
    len: u64,
) -> Result<&'a [u8], LoadError> {
    offset
        .checked_add(len)
        .and_then(|end| data.get(usize::try_from(offset).ok()?..usize::try_from(end).ok()?))
        .ok_or_else(|| {
            LoadError::new(
                file,
                field,
                format!(
                    "{len:#x} bytes at offset {offset:#x} lie outside the file of {:#x} bytes",
                    data.len()
                ),
            )
            .hint("the file is truncated or damaged")
        })
}

/// Checks that `[gpa, gpa + len)` lies in `[floor, limit)`.
///
/// # Errors
/// It does not: the error names `field` of `file` and what would be enough memory.
pub fn fits(
    file: &str,
    field: &str,
    gpa: u64,
    len: u64,
    floor: u64,
    limit: u64,
) -> Result<(), LoadError> {
    let Some(end) = gpa.checked_add(len) else {
        return Err(LoadError::new(
            file,
            field,
            format!("address {gpa:#x} and size {len:#x} overflow"),
        ));
    };
    if gpa < floor {
        return Err(LoadError::new(
            file,
            field,
            format!("wants guest address {gpa:#x}, below {floor:#x}"),
        ));
    }
    if end > limit {
        return Err(LoadError::new(
            file,
            field,
            format!("wants guest memory up to {end:#x}, and there is {limit:#x}"),
        )
        .hint("give the VM more memory with -m"));
    }
    Ok(())
}

/// A little-endian `u16` at `offset`, if it is there.
#[must_use]
pub fn le16(data: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(
        data.get(offset..offset.checked_add(2)?)?.try_into().ok()?,
    ))
}

/// A little-endian `u32` at `offset`, if it is there.
#[must_use]
pub fn le32(data: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        data.get(offset..offset.checked_add(4)?)?.try_into().ok()?,
    ))
}

/// A little-endian `u64` at `offset`, if it is there.
#[must_use]
pub fn le64(data: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(
        data.get(offset..offset.checked_add(8)?)?.try_into().ok()?,
    ))
}
