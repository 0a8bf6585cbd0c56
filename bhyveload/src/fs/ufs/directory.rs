//! Directory blocks.

use crate::fs::Visit;
use crate::layout::{le16, le32};

/// Entries do not cross blocks of this size (DIRBLKSIZ).
const BLOCK: usize = 512;
/// An entry's inode, length, type and length of name.
const HEADER: usize = 8;

/// Visits the entries of a directory's contents but `.` and `..`.
///
/// # Errors
/// An entry is damaged; says how.
pub fn entries(data: &[u8], visit: Visit<'_>) -> Result<(), String> {
    for (number, block) in data.chunks(BLOCK).enumerate() {
        let mut at = 0;
        while at < block.len() {
            let place = number * BLOCK + at;
            let bad = || format!("the entry at {place:#x} is damaged");
            let length = usize::from(le16(block, at + 4).ok_or_else(bad)?);
            let entry = at
                .checked_add(length)
                .and_then(|end| block.get(at..end))
                .filter(|entry| entry.len() >= HEADER && length.is_multiple_of(4))
                .ok_or_else(bad)?;
            let name_length = usize::from(entry[7]);
            let name = entry.get(HEADER..HEADER + name_length).ok_or_else(bad)?;
            let inode = le32(entry, 0).unwrap_or_default();
            at += length;
            if inode == 0 || name == b"." || name == b".." {
                continue;
            }
            if name.is_empty() || name.iter().any(|&b| b == 0 || b == b'/') {
                return Err(bad());
            }
            if visit(name, u64::from(inode)).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}
