//! UFS1 and UFS2, read-only (sys/ufs/ffs/fs.h, sys/ufs/ufs/dinode.h and dir.h of
//! FreeBSD). What soft updates or a journal have left undone is left alone: a file
//! that is there is whole.

mod directory;
mod inode;
mod superblock;

use super::{Attributes, FileSystem, FileType, LARGEST_DIRECTORY, LONGEST_PATH, Visit, too_large};
use crate::disk::{Fault, Read, ReadAt};
use crate::layout::{le32, le64};
use inode::Inode;
pub use superblock::{Superblock, Version};

/// Block pointers in an inode before the indirect ones.
const DIRECT: u64 = 12;
/// The root directory's inode.
const ROOT: u64 = 2;

/// A UFS file system on `image`.
#[derive(Debug)]
pub struct Ufs<R> {
    image: R,
    sb: Superblock,
}

impl<R: ReadAt> Ufs<R> {
    /// Looks for a superblock. `None`: there is none.
    ///
    /// # Errors
    /// The superblock is damaged, or the image cannot be read.
    pub fn open(image: R) -> Read<Option<Self>> {
        Ok(Superblock::find(&image)?.map(|sb| Self { image, sb }))
    }

    /// The superblock.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.sb
    }

    fn inode(&self, number: u64) -> Read<Inode> {
        let offset = self.sb.inode_offset(number)?;
        let mut bytes = [0; 256];
        let bytes = &mut bytes[..self.sb.inode_size() as usize];
        self.image.read_at(offset, bytes)?;
        Inode::parse(self.sb.version, bytes)
            .ok_or_else(|| Fault::new(format!("inode {number}"), "is damaged"))
    }

    /// The contents of a file or directory, without the holes' being read.
    fn contents(&self, number: u64, inode: &Inode, limit: u64) -> Read<Vec<u8>> {
        if inode.size > limit {
            return Err(too_large(inode.size, limit));
        }
        let mut map = BlockMap {
            fs: self,
            number,
            inode,
            cached: [const { None }; 3],
        };
        let mut data = Vec::new();
        let mut logical = 0;
        while (data.len() as u64) < inode.size {
            let start = data.len();
            let step = self.sb.block_size.min(inode.size - start as u64);
            data.resize(start + step as usize, 0);
            if let Some(fragment) = map.find(logical)? {
                let offset = self.sb.fragment_offset(fragment, step).ok_or_else(|| {
                    Fault::new(
                        format!("inode {number}"),
                        format!(
                            "block {logical} is at fragment {fragment}, outside the file system"
                        ),
                    )
                })?;
                self.image.read_at(offset, &mut data[start..])?;
            } else if inode.kind == FileType::Directory {
                return Err(Fault::new(
                    format!("inode {number}"),
                    "is a directory with a hole",
                ));
            }
            logical += 1;
        }
        Ok(data)
    }
}

/// Finds a file's blocks; keeps the indirect block of each level that it read last.
struct BlockMap<'a, R> {
    fs: &'a Ufs<R>,
    number: u64,
    inode: &'a Inode,
    cached: [Option<(u64, Vec<u8>)>; 3],
}

impl<R: ReadAt> BlockMap<'_, R> {
    /// The fragment at which a logical block starts; `None` for a hole.
    fn find(&mut self, logical: u64) -> Read<Option<u64>> {
        let per_block = self.fs.sb.block_size / self.fs.sb.version.pointer();
        let Some(mut index) = logical.checked_sub(DIRECT) else {
            return Ok(present(self.inode.direct[logical as usize]));
        };
        // How many blocks an indirect block of each level leads to.
        let mut reach = per_block;
        for level in 0..3 {
            if index >= reach {
                index -= reach;
                reach = reach.saturating_mul(per_block);
                continue;
            }
            let mut fragment = present(self.inode.indirect[level]);
            for depth in (0..=level).rev() {
                let Some(at) = fragment else {
                    return Ok(None);
                };
                let below = per_block.saturating_pow(depth as u32);
                fragment = present(self.pointer(depth, at, index / below % per_block)?);
            }
            return Ok(fragment);
        }
        Err(Fault::new(
            format!("inode {}", self.number),
            "is larger than a file can be",
        ))
    }

    fn pointer(&mut self, depth: usize, fragment: u64, index: u64) -> Read<u64> {
        let sb = &self.fs.sb;
        let block = match &mut self.cached[depth] {
            Some((at, block)) if *at == fragment => block,
            slot => {
                let offset = sb.fragment_offset(fragment, sb.block_size).ok_or_else(|| {
                    Fault::new(
                        format!("inode {}", self.number),
                        format!("an indirect block is at {fragment}, outside the file system"),
                    )
                })?;
                let mut block = vec![0; sb.block_size as usize];
                self.fs.image.read_at(offset, &mut block)?;
                &mut slot.insert((fragment, block)).1
            }
        };
        let at = (index * sb.version.pointer()) as usize;
        let pointer = match sb.version {
            Version::Ufs1 => le32(block, at).map(u64::from),
            Version::Ufs2 => le64(block, at),
        };
        Ok(pointer.unwrap_or_default())
    }
}

fn present(pointer: u64) -> Option<u64> {
    (pointer != 0).then_some(pointer)
}

impl<R: ReadAt> FileSystem for Ufs<R> {
    fn kind(&self) -> &'static str {
        "ufs"
    }

    fn root(&self) -> u64 {
        ROOT
    }

    fn attributes(&self, node: u64) -> Read<Attributes> {
        let inode = self.inode(node)?;
        Ok(Attributes {
            kind: inode.kind,
            size: inode.size,
        })
    }

    fn entries(&self, directory: u64, visit: Visit<'_>) -> Read<()> {
        let inode = self.inode(directory)?;
        if inode.kind != FileType::Directory {
            return Err(Fault::new(
                format!("inode {directory}"),
                "is not a directory",
            ));
        }
        if inode.size > LARGEST_DIRECTORY {
            return Err(Fault::new(
                format!("inode {directory}"),
                format!("is a directory of {:#x} bytes", inode.size),
            ));
        }
        let data = self.contents(directory, &inode, LARGEST_DIRECTORY)?;
        directory::entries(&data, visit)
            .map_err(|problem| Fault::new(format!("directory {directory}"), problem))
    }

    fn read(&self, file: u64, limit: u64) -> Read<Vec<u8>> {
        let inode = self.inode(file)?;
        if inode.kind != FileType::File {
            return Err(Fault::new("file", "is not a regular file"));
        }
        self.contents(file, &inode, limit)
    }

    fn target(&self, link: u64) -> Read<Vec<u8>> {
        let inode = self.inode(link)?;
        let bad = |problem| Fault::new(format!("inode {link}"), problem);
        if inode.kind != FileType::Symlink {
            return Err(bad("is not a symlink"));
        }
        if inode.size > LONGEST_PATH {
            return Err(bad("is a symlink longer than a path can be"));
        }
        // A short one stands where the block pointers would.
        if inode.size < self.sb.longest_inline_link {
            let text = inode.inline.get(..inode.size as usize);
            return text
                .map(<[u8]>::to_vec)
                .ok_or_else(|| bad("is a symlink longer than its inode"));
        }
        self.contents(link, &inode, LONGEST_PATH)
    }
}
