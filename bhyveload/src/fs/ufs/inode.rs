//! Inodes of both layouts.

use super::Version;
use crate::fs::FileType;
use crate::layout::{le16, le32, le64};

/// What reading a file needs of its inode.
#[derive(Debug, Clone)]
pub struct Inode {
    pub kind: FileType,
    pub size: u64,
    pub direct: [u64; 12],
    pub indirect: [u64; 3],
    /// The bytes of the block pointers, which hold a short symlink's target.
    pub inline: Vec<u8>,
}

impl Inode {
    /// Decodes the `bytes` of an inode, 128 or 256.
    pub fn parse(version: Version, bytes: &[u8]) -> Option<Self> {
        let kind = match le16(bytes, 0)? & 0xf000 {
            0x4000 => FileType::Directory,
            0x8000 => FileType::File,
            0xa000 => FileType::Symlink,
            0 => return None,
            _ => FileType::Other,
        };
        let (size, first, pointer) = match version {
            Version::Ufs1 => (le64(bytes, 8)?, 40, 4),
            Version::Ufs2 => (le64(bytes, 16)?, 112, 8),
        };
        let pointers = bytes.get(first..first + 15 * pointer)?;
        let mut values = pointers.chunks_exact(pointer).map(|bytes| match version {
            Version::Ufs1 => le32(bytes, 0).map(u64::from).unwrap_or_default(),
            Version::Ufs2 => le64(bytes, 0).unwrap_or_default(),
        });
        let mut next = || values.next().unwrap_or_default();
        Some(Self {
            kind,
            size,
            direct: std::array::from_fn(|_| next()),
            indirect: std::array::from_fn(|_| next()),
            inline: pointers.to_vec(),
        })
    }
}
