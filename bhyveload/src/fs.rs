//! File systems, read-only: UFS and ISO 9660.
//!
//! A file system answers for nodes and directories; paths, with their symlinks and
//! `..`, are followed here, so that no image decides how long that takes.

pub mod iso9660;
pub mod ufs;

use crate::disk::{Fault, Read};
use std::collections::VecDeque;
use std::ops::ControlFlow;

/// Most bytes of a directory: about half a million entries.
pub const LARGEST_DIRECTORY: u64 = 16 << 20;
/// Most symlinks on the way to a file (MAXSYMLINKS of FreeBSD).
pub const MOST_LINKS: usize = 32;
/// Most bytes of a symlink's target or of a path (MAXPATHLEN of FreeBSD).
pub const LONGEST_PATH: u64 = 1024;

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symlink.
    Symlink,
    /// A device, a FIFO or a socket.
    Other,
}

/// What a node says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// What it is.
    pub kind: FileType,
    /// Bytes of a file.
    pub size: u64,
}

/// Takes the entries of a directory one by one: name and node.
pub type Visit<'a> = &'a mut dyn FnMut(&[u8], u64) -> ControlFlow<()>;

/// A file system of some kind. A node is a number that only the file system
/// understands (an inode number, an offset).
pub trait FileSystem {
    /// The name by which FreeBSD mounts it: `ufs`, `cd9660`.
    fn kind(&self) -> &'static str;

    /// The root directory.
    fn root(&self) -> u64;

    /// What a node is.
    ///
    /// # Errors
    /// The image is damaged or cannot be read.
    fn attributes(&self, node: u64) -> Read<Attributes>;

    /// Visits a directory's entries but `.` and `..`, until told to stop.
    ///
    /// # Errors
    /// The image is damaged or cannot be read.
    fn entries(&self, directory: u64, visit: Visit<'_>) -> Read<()>;

    /// A file's contents, if they are not more than `limit` bytes.
    ///
    /// # Errors
    /// There are more; or the image is damaged or cannot be read.
    fn read(&self, file: u64, limit: u64) -> Read<Vec<u8>>;

    /// A symlink's target.
    ///
    /// # Errors
    /// The image is damaged or cannot be read.
    fn target(&self, link: u64) -> Read<Vec<u8>>;

    /// Whether an entry's name is the wanted one.
    fn same(&self, entry: &[u8], wanted: &[u8]) -> bool {
        entry == wanted
    }
}

/// The error for a file of more than `limit` bytes.
#[must_use]
pub fn too_large(size: u64, limit: u64) -> Fault {
    Fault::new(
        "size",
        format!("{size:#x} bytes are more than the {limit:#x} that fit into the guest's memory"),
    )
    .hint("give the VM more memory with -m")
}

fn lookup(fs: &dyn FileSystem, directory: u64, name: &[u8]) -> Read<Option<u64>> {
    let mut found = None;
    fs.entries(directory, &mut |entry, node| {
        if fs.same(entry, name) {
            found = Some(node);
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    Ok(found)
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> + '_ {
    path.split(|&b| b == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .map(<[u8]>::to_vec)
}

/// Follows `path` from the root, symlinks included. `None`: there is no such file.
///
/// # Errors
/// Symlinks go round in a circle, or the image is damaged or cannot be read.
pub fn resolve(fs: &dyn FileSystem, path: &[u8]) -> Read<Option<(u64, Attributes)>> {
    if path.len() as u64 > LONGEST_PATH {
        return Ok(None);
    }
    let mut rest: VecDeque<Vec<u8>> = components(path).collect();
    // The directories from the root to where we are: `..` is the one before.
    let mut way = vec![fs.root()];
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        let here = way.last().copied().unwrap_or_else(|| fs.root());
        if name == b".." {
            if way.len() > 1 {
                way.pop();
            }
            continue;
        }
        if fs.attributes(here)?.kind != FileType::Directory {
            return Ok(None);
        }
        let Some(node) = lookup(fs, here, &name)? else {
            return Ok(None);
        };
        if fs.attributes(node)?.kind != FileType::Symlink {
            way.push(node);
            continue;
        }
        links += 1;
        if links > MOST_LINKS {
            return Err(Fault::new(
                "symlink",
                format!("more than {MOST_LINKS} on the way, perhaps in a circle"),
            ));
        }
        let target = fs.target(node)?;
        if target.starts_with(b"/") {
            way.truncate(1);
        }
        for name in components(&target).rev() {
            rest.push_front(name);
        }
    }
    let node = way.last().copied().unwrap_or_else(|| fs.root());
    Ok(Some((node, fs.attributes(node)?)))
}
