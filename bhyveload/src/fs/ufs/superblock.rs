//! The superblock, checked.

use crate::disk::{Fault, Read, ReadAt};
use crate::layout::{le32, le64};

/// Where a superblock can be, in the order in which it is looked for (SBLOCKSEARCH).
const PLACES: [u64; 4] = [65536, 8192, 0, 262_144];
/// Bytes of it that are looked at.
const SIZE: usize = 1376;

const UFS1_MAGIC: u32 = 0x0001_1954;
const UFS2_MAGIC: u32 = 0x1954_0119;
/// FS_44INODEFMT: directories with types, inodes with 32-bit owners.
const INODE_FORMAT: u32 = 2;

/// Which of the two layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 32-bit block pointers, inodes of 128 bytes.
    Ufs1,
    /// 64-bit block pointers, inodes of 256 bytes.
    Ufs2,
}

impl Version {
    /// Bytes of a block pointer.
    #[must_use]
    pub const fn pointer(self) -> u64 {
        match self {
            Self::Ufs1 => 4,
            Self::Ufs2 => 8,
        }
    }
}

/// What a superblock says, as far as reading needs it. Every value is within
/// what FreeBSD itself accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The layout.
    pub version: Version,
    /// Bytes of a block (`fs_bsize`), a power of two from 4096 to 65536.
    pub block_size: u64,
    /// Bytes of a fragment (`fs_fsize`), a power of two, at least an eighth of a block.
    pub fragment_size: u64,
    /// Fragments of the file system (`fs_size`).
    pub fragments: u64,
    /// Cylinder groups (`fs_ncg`).
    pub groups: u64,
    /// Inodes in a cylinder group (`fs_ipg`).
    pub inodes_per_group: u64,
    /// Fragments in a cylinder group (`fs_fpg`).
    pub fragments_per_group: u64,
    /// Fragments from a cylinder group's start to its inodes (`fs_iblkno`).
    pub inode_fragment: u64,
    /// UFS1: how far each group's start is shifted (`fs_old_cgoffset`, `fs_old_cgmask`).
    group_shift: (u64, u32),
    /// A symlink shorter than this stands in its inode (`fs_maxsymlinklen`).
    pub longest_inline_link: u64,
}

impl Superblock {
    /// Finds and checks the superblock. `None`: there is none.
    ///
    /// # Errors
    /// It is damaged, or of a kind that is not supported.
    pub fn find(image: &dyn ReadAt) -> Read<Option<Self>> {
        for place in PLACES {
            if place + SIZE as u64 > image.size() {
                continue;
            }
            let mut bytes = [0; SIZE];
            image.read_at(place, &mut bytes)?;
            let magic = le32(&bytes, 1372).unwrap_or_default();
            match magic {
                // At UFS2's place it can only be a copy, in a file system with large blocks.
                UFS1_MAGIC if place != PLACES[0] => {
                    return Self::parse(Version::Ufs1, &bytes).map(Some);
                }
                UFS2_MAGIC if le64(&bytes, 1000) == Some(place) => {
                    return Self::parse(Version::Ufs2, &bytes).map(Some);
                }
                _ if [UFS1_MAGIC, UFS2_MAGIC].contains(&magic.swap_bytes()) => {
                    return Err(Fault::new(
                        "fs_magic",
                        "is a big-endian machine's, which an amd64 kernel cannot mount either",
                    ));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// Decodes a superblock.
    ///
    /// # Errors
    /// A field is out of its range.
    pub fn parse(version: Version, bytes: &[u8; SIZE]) -> Read<Self> {
        let word = |at| le32(bytes, at).unwrap_or_default();
        let long = |at| le64(bytes, at).unwrap_or_default();
        let check = |good: bool, field: &str, value: u64| {
            if good {
                Ok(value)
            } else {
                Err(Fault::new(field, format!("is {value:#x}"))
                    .hint("the superblock is damaged; run fsck_ffs in a guest"))
            }
        };
        let range = |field: &str, value: u32, most: u32| {
            check((1..=most).contains(&value), field, u64::from(value))
        };
        let most = i32::MAX as u32;
        let block_size = u64::from(word(48));
        check(
            block_size.is_power_of_two() && (4096..=65536).contains(&block_size),
            "fs_bsize",
            block_size,
        )?;
        let fragment_size = u64::from(word(52));
        check(
            fragment_size.is_power_of_two()
                && (512..=block_size).contains(&fragment_size)
                && block_size / fragment_size <= 8,
            "fs_fsize",
            fragment_size,
        )?;
        let fragments = match version {
            Version::Ufs1 => u64::from(word(36)),
            Version::Ufs2 => long(1080),
        };
        check(
            fragments != 0 && fragments < i64::MAX as u64 / fragment_size,
            "fs_size",
            fragments,
        )?;
        let format = word(1324);
        if version == Version::Ufs1 && format != INODE_FORMAT {
            return Err(Fault::new(
                "fs_old_inodefmt",
                format!("is {format}: a file system from before 4.4BSD"),
            ));
        }
        Ok(Self {
            version,
            block_size,
            fragment_size,
            fragments,
            groups: range("fs_ncg", word(44), most)?,
            inodes_per_group: range("fs_ipg", word(184), most)?,
            fragments_per_group: range("fs_fpg", word(188), most)?,
            inode_fragment: range("fs_iblkno", word(16), most)?,
            group_shift: match version {
                Version::Ufs1 => (u64::from(word(24)), word(28)),
                Version::Ufs2 => (0, 0),
            },
            longest_inline_link: u64::from(word(1320)).min(match version {
                Version::Ufs1 => 60,
                Version::Ufs2 => 120,
            }),
        })
    }

    /// Bytes of an inode.
    #[must_use]
    pub const fn inode_size(&self) -> u64 {
        match self.version {
            Version::Ufs1 => 128,
            Version::Ufs2 => 256,
        }
    }

    /// Where an inode is in the image (`ino_to_fsba`, `ino_to_fsbo`).
    ///
    /// # Errors
    /// There is no such inode.
    pub fn inode_offset(&self, number: u64) -> Read<u64> {
        let group = number / self.inodes_per_group;
        if number == 0 || group >= self.groups {
            return Err(Fault::new(
                format!("inode {number}"),
                "is not in the file system",
            ));
        }
        let (offset, mask) = self.group_shift;
        let shifted = u64::from(group as u32 & !mask).saturating_mul(offset);
        let fragment = self
            .fragments_per_group
            .saturating_mul(group)
            .saturating_add(shifted)
            .saturating_add(self.inode_fragment);
        let within = number % self.inodes_per_group * self.inode_size();
        self.fragment_offset(fragment, 0)
            .and_then(|at| at.checked_add(within))
            .ok_or_else(|| Fault::new(format!("inode {number}"), "lies outside the file system"))
    }

    /// Where `len` bytes from a fragment on are in the image, if they are all in
    /// the file system.
    #[must_use]
    pub fn fragment_offset(&self, fragment: u64, len: u64) -> Option<u64> {
        let end = self.fragments * self.fragment_size;
        let offset = fragment.checked_mul(self.fragment_size)?;
        (offset < end && offset.checked_add(len)? <= end).then_some(offset)
    }
}
