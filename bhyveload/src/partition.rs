//! Partition schemes: GPT, MBR with its slices, and BSD disklabels.
//!
//! Pure: a scheme reads its tables through [`ReadAt`] and answers what they say.
//! What they say may be wrong: a partition is only ever seen through a
//! [`Window`], which ends where the image ends.

pub mod bsd;
pub mod gpt;
pub mod mbr;

use crate::disk::{Read, ReadAt, Window};

/// What a table says is on a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A UFS file system (freebsd-ufs, 4.2BSD).
    Ufs,
    /// A FreeBSD slice, which may hold a disklabel.
    FreeBsd,
    /// A ZFS pool.
    Zfs,
    /// Swap.
    Swap,
    /// Boot code.
    Boot,
    /// An EFI system partition.
    Efi,
    /// Something of another system's.
    Other,
}

impl Kind {
    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ufs => "freebsd-ufs",
            Self::FreeBsd => "freebsd",
            Self::Zfs => "freebsd-zfs",
            Self::Swap => "freebsd-swap",
            Self::Boot => "freebsd-boot",
            Self::Efi => "efi",
            Self::Other => "other",
        }
    }
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// The name behind the disk's: `p2`, `s1`, `s1a`, `a`; nothing for the whole disk.
    pub name: String,
    /// What the table says it is.
    pub kind: Kind,
    /// First byte.
    pub start: u64,
    /// Bytes, not more than there are.
    pub size: u64,
    /// Whether the table prefers it: GPT's `bootme`, MBR's active slice.
    pub preferred: bool,
}

/// Everything on a disk that a file system may be on: the partitions, slices
/// and their disklabels' partitions, and the whole disk first. The second value says
/// what is wrong with a table that was given up.
///
/// # Errors
/// The host cannot read the image.
pub fn all(disk: &dyn ReadAt) -> Read<(Vec<Partition>, Vec<String>)> {
    let mut found = vec![Partition {
        name: String::new(),
        kind: Kind::Other,
        start: 0,
        size: disk.size(),
        preferred: false,
    }];
    let mut damage = Vec::new();
    let gpt = match gpt::partitions(disk) {
        Ok(partitions) => partitions,
        Err(fault) => {
            damage.push(fault.to_string());
            None
        }
    };
    let table = match gpt {
        Some(partitions) => partitions,
        None => mbr::partitions(disk)?,
    };
    for partition in table {
        let label = if partition.kind == Kind::FreeBsd {
            labelled(disk, &partition, &mut damage)?
        } else {
            Vec::new()
        };
        found.push(partition);
        found.extend(label);
    }
    // "Dangerously dedicated": a label with no slice around it.
    if found.len() == 1 {
        let whole = found[0].clone();
        found.extend(labelled(disk, &whole, &mut damage)?);
    }
    Ok((found, damage))
}

fn labelled(
    disk: &dyn ReadAt,
    slice: &Partition,
    damage: &mut Vec<String>,
) -> Read<Vec<Partition>> {
    let window = Window::new(disk, slice.start, slice.size);
    match bsd::partitions(&window, slice.start) {
        Ok(Some(list)) => Ok(list
            .into_iter()
            .map(|p| Partition {
                name: format!("{}{}", slice.name, p.name),
                start: slice.start + p.start,
                preferred: slice.preferred,
                ..p
            })
            .collect()),
        Ok(None) => Ok(Vec::new()),
        Err(fault) => {
            damage.push(format!("{}: {fault}", slice.name));
            Ok(Vec::new())
        }
    }
}
