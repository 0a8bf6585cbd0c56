//! Directory records (ECMA-119 §9.1).

use crate::layout::le32;

/// Bytes before the name.
const HEADER: usize = 33;

/// A directory record.
#[derive(Debug, Clone)]
pub struct Record {
    /// First logical block.
    pub extent: u32,
    /// Logical blocks of extended attributes before the contents.
    pub attributes: u8,
    /// Bytes.
    pub size: u32,
    flags: u8,
    interleaved: bool,
    /// The name: a byte 0 is the directory itself, a byte 1 the one above.
    pub name: Vec<u8>,
    /// The system use area.
    pub system_use: Vec<u8>,
}

impl Record {
    /// Decodes the `bytes` of a record.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let header = bytes.get(..HEADER)?;
        let name_length = usize::from(header[32]);
        let name = bytes.get(HEADER..HEADER + name_length)?;
        // A name of even length is padded, so that what follows is even.
        let after = (HEADER + name_length).next_multiple_of(2);
        Some(Self {
            extent: le32(header, 2)?,
            attributes: header[1],
            size: le32(header, 10)?,
            flags: header[25],
            interleaved: header[26] != 0 || header[27] != 0,
            name: name.to_vec(),
            system_use: bytes.get(after..).unwrap_or_default().to_vec(),
        })
    }

    /// Whether it is a directory's.
    pub fn is_directory(&self) -> bool {
        self.flags & 0x02 != 0
    }

    /// Whether the contents are not in one piece.
    pub fn is_scattered(&self) -> bool {
        self.flags & 0x80 != 0 || self.interleaved
    }

    /// The name without version and without the dot of an empty extension, in
    /// small letters, as FreeBSD shows it.
    pub fn plain_name(&self) -> Vec<u8> {
        let name = self.name.split(|&b| b == b';').next().unwrap_or_default();
        name.strip_suffix(b".").unwrap_or(name).to_ascii_lowercase()
    }
}
