//! Image formats and file systems that are recognised in order to be refused in
//! words.

use super::{Read, ReadAt, array};
use crate::layout::{le32, le64};

/// Container formats that start with something of their own: offset, bytes, name,
/// and the command that makes a raw image.
const CONTAINERS: [(u64, &[u8], &str, &str); 14] = [
    (0, b"QFI\xfb", "a qcow2 image", QEMU_IMG),
    (0, b"QED\0", "a QED image", QEMU_IMG),
    (0, b"KDMV", "a VMDK image", QEMU_IMG),
    (0, b"COWD", "a VMDK image", QEMU_IMG),
    (
        0,
        b"# Disk DescriptorFile",
        "the descriptor of a VMDK image",
        QEMU_IMG,
    ),
    (0, b"conectix", "a dynamic VHD image", QEMU_IMG),
    (0, b"vhdxfile", "a VHDX image", QEMU_IMG),
    (
        0x40,
        &0xbeda_107f_u32.to_le_bytes(),
        "a VDI image",
        QEMU_IMG,
    ),
    (0, b"WithoutFreeSpace", "a Parallels image", QEMU_IMG),
    (
        0,
        &0xed26_ff3a_u32.to_le_bytes(),
        "an Android sparse image",
        "simg2img IMAGE RAW",
    ),
    (0, b"\x1f\x8b", "compressed with gzip", "gunzip"),
    (0, b"\xfd7zXZ\0", "compressed with xz", "unxz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "unzstd"),
    (0, b"BZh", "compressed with bzip2", "bunzip2"),
];

const QEMU_IMG: &str = "qemu-img convert -O raw IMAGE RAW";

/// Says what container an image is in, and how to get a raw image out of it.
///
/// # Errors
/// The image cannot be read.
pub fn container(image: &(impl ReadAt + ?Sized)) -> Read<Option<(&'static str, &'static str)>> {
    let mut head = [0; 0x80];
    let len = image.size().min(head.len() as u64) as usize;
    image.read_at(0, &mut head[..len])?;
    Ok(CONTAINERS
        .iter()
        .find(|(at, magic, _, _)| {
            // Shorter images have no such place.
            head.get(*at as usize..len)
                .is_some_and(|rest| rest.starts_with(magic))
        })
        .map(|&(_, _, name, remedy)| (name, remedy)))
}

/// Something on a partition that cannot be booted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    /// A ZFS pool.
    Zfs,
    /// A GELI provider (geli(8)).
    Geli,
    /// FAT.
    Fat,
    /// An ext2, ext3 or ext4 file system.
    Ext,
    /// A LUKS provider.
    Luks,
}

impl Foreign {
    /// What it is, in words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zfs => "ZFS",
            Self::Geli => "encrypted with GELI",
            Self::Fat => "FAT",
            Self::Ext => "ext2/3/4",
            Self::Luks => "encrypted with LUKS",
        }
    }
}

/// Where the uberblocks of the first vdev label are, and how far apart
/// (vdev_label_t: 128 KiB into it, at least 1 KiB each).
const UBERBLOCKS: std::ops::Range<u64> = 128 * 1024..256 * 1024;
const UBERBLOCK: u64 = 0x00ba_b10c;

/// Recognises what is on a partition by its magic numbers.
///
/// # Errors
/// The image cannot be read.
pub fn foreign(part: &(impl ReadAt + ?Sized)) -> Read<Option<Foreign>> {
    let size = part.size();
    // GELI keeps its metadata in the provider's last sector.
    for sector in [512, 4096] {
        if size >= sector && array::<16>(part, size - sector)?.starts_with(b"GEOM::ELI") {
            return Ok(Some(Foreign::Geli));
        }
    }
    if size >= UBERBLOCKS.end {
        let mut ring = vec![0; (UBERBLOCKS.end - UBERBLOCKS.start) as usize];
        part.read_at(UBERBLOCKS.start, &mut ring)?;
        let found = ring.chunks_exact(1024).any(|block| {
            let magic = le64(block, 0);
            magic == Some(UBERBLOCK) || magic == Some(UBERBLOCK.swap_bytes())
        });
        if found {
            return Ok(Some(Foreign::Zfs));
        }
    }
    if size >= 4096 {
        let head = array::<4096>(part, 0)?;
        if head.starts_with(b"LUKS\xba\xbe") {
            return Ok(Some(Foreign::Luks));
        }
        if le32(&head, 0x438).is_some_and(|word| word & 0xffff == 0xef53) {
            return Ok(Some(Foreign::Ext));
        }
        let fat = [&head[54..57], &head[82..85]].contains(&&b"FAT"[..]);
        if fat && head[510..512] == [0x55, 0xaa] {
            return Ok(Some(Foreign::Fat));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_named_with_the_way_out_and_raw_images_are_none() {
        let qcow = [b"QFI\xfb".as_slice(), &[0; 500]].concat();
        let (name, remedy) = container(&qcow).unwrap().unwrap();
        assert!(name.contains("qcow2") && remedy.contains("qemu-img"));
        let mut vdi = vec![0; 512];
        vdi[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        assert!(container(&vdi).unwrap().unwrap().0.contains("VDI"));
        for raw in [vec![0; 512], vec![0xeb, 0x3c], vec![1], vec![0; 0x42]] {
            assert_eq!(container(&raw).unwrap(), None);
        }
    }

    #[test]
    fn pools_and_encrypted_partitions_are_recognised() {
        let mut part = vec![0u8; 1 << 20];
        assert_eq!(foreign(&part).unwrap(), None);
        part[132 * 1024..132 * 1024 + 8].copy_from_slice(&UBERBLOCK.to_le_bytes());
        assert_eq!(foreign(&part).unwrap(), Some(Foreign::Zfs));
        let end = part.len();
        part[end - 4096..end - 4087].copy_from_slice(b"GEOM::ELI");
        assert_eq!(foreign(&part).unwrap(), Some(Foreign::Geli));
        assert_eq!(foreign(&vec![0; 100]).unwrap(), None);
    }
}
