//! GUID partition tables (UEFI 2.10 §5.3).
//!
//! Our own because tables come from whoever made the image: the `gpt` crate wants a
//! device it can write to, and believes the header's number and size of entries.

use super::{Kind, Partition};
use crate::disk::{Fault, Read, ReadAt};
use crate::layout::{le32, le64};
use flate2::Crc;

const SIGNATURE: &[u8] = b"EFI PART";
/// Bytes of the header that are defined.
const HEADER: usize = 92;
/// Most bytes of a table that is believed; UEFI's least is 16 KiB, and nobody has more.
const LARGEST_TABLE: u64 = 1 << 20;

/// The `bootme` attribute of FreeBSD's gpart(8).
const BOOTME: u64 = 1 << 59;

/// A type as it stands on disk: the first three fields little-endian.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [
        a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6],
        d[7],
    ]
}

const BSD: [u8; 8] = [0x8f, 0xf8, 0x00, 0x02, 0x2d, 0x09, 0x71, 0x2b];
const BOOT_NODE: [u8; 8] = [0xbe, 0x0b, 0x00, 0x15, 0x60, 0xb8, 0x4f, 0x0f];
const EFI_NODE: [u8; 8] = [0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];

/// Types that matter here (sys/sys/gpt.h of FreeBSD).
const TYPES: [([u8; 16], Kind); 6] = [
    (guid(0x516e_7cb4, 0x6ecf, 0x11d6, BSD), Kind::FreeBsd),
    (guid(0x516e_7cb5, 0x6ecf, 0x11d6, BSD), Kind::Swap),
    (guid(0x516e_7cb6, 0x6ecf, 0x11d6, BSD), Kind::Ufs),
    (guid(0x516e_7cba, 0x6ecf, 0x11d6, BSD), Kind::Zfs),
    (guid(0x83bd_6b9d, 0x7f41, 0x11dc, BOOT_NODE), Kind::Boot),
    (guid(0xc12a_7328, 0xf81f, 0x11d2, EFI_NODE), Kind::Efi),
];

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

struct Header {
    table: u64,
    entries: u32,
    entry_size: u32,
    table_crc: u32,
}

/// Reads the header in the sector at byte `offset`. `None`: there is none.
fn header(disk: &dyn ReadAt, offset: u64, sector: u64) -> Read<Option<Header>> {
    if offset
        .checked_add(sector)
        .is_none_or(|end| end > disk.size())
    {
        return Ok(None);
    }
    let mut bytes = vec![0; sector as usize];
    disk.read_at(offset, &mut bytes)?;
    if !bytes.starts_with(SIGNATURE) {
        return Ok(None);
    }
    let word = |at| le32(&bytes, at).unwrap_or_default();
    let bad = |field: &str, problem: String| Err(Fault::new(format!("GPT {field}"), problem));
    let size = word(12) as usize;
    if size < HEADER || size > bytes.len() {
        return bad("HeaderSize", format!("is {size}"));
    }
    let mut zeroed = bytes[..size].to_vec();
    zeroed[16..20].fill(0);
    if crc(&zeroed) != word(16) {
        return bad("HeaderCRC32", "does not match the header".to_owned());
    }
    let header = Header {
        table: le64(&bytes, 72)
            .and_then(|lba| lba.checked_mul(sector))
            .unwrap_or(u64::MAX),
        entries: word(80),
        entry_size: word(84),
        table_crc: word(88),
    };
    if header.entry_size < 128 || !header.entry_size.is_power_of_two() {
        return bad("SizeOfPartitionEntry", format!("is {}", header.entry_size));
    }
    Ok(Some(header))
}

fn table(disk: &dyn ReadAt, header: &Header, sector: u64) -> Read<Vec<Partition>> {
    let bytes = u64::from(header.entries) * u64::from(header.entry_size);
    if bytes > LARGEST_TABLE {
        return Err(Fault::new(
            "GPT NumberOfPartitionEntries",
            format!("is {}", header.entries),
        ));
    }
    let mut table = vec![0; bytes as usize];
    disk.read_at(header.table, &mut table)
        .map_err(|fault| Fault::new("GPT PartitionEntryLBA", fault.problem))?;
    if crc(&table) != header.table_crc {
        return Err(Fault::new(
            "GPT PartitionEntryArrayCRC32",
            "does not match the table",
        ));
    }
    let mut found = Vec::new();
    for (index, entry) in table.chunks_exact(header.entry_size as usize).enumerate() {
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        let (Some(first), Some(last)) = (first, last) else {
            continue;
        };
        if entry[..16] == [0; 16] || first > last {
            continue;
        }
        let Some(start) = first.checked_mul(sector).filter(|&s| s < disk.size()) else {
            continue;
        };
        let size = (last - first).saturating_add(1).saturating_mul(sector);
        let kind = TYPES
            .iter()
            .find(|(guid, _)| entry[..16] == *guid)
            .map_or(Kind::Other, |&(_, kind)| kind);
        found.push(Partition {
            name: format!("p{}", index + 1),
            kind,
            start,
            size: size.min(disk.size() - start),
            preferred: le64(entry, 48).unwrap_or_default() & BOOTME != 0,
        });
    }
    Ok(found)
}

/// The partitions of a disk's GPT, by the backup table where the first is
/// damaged. `None`: the disk has no GPT.
///
/// # Errors
/// Both tables are damaged, or the host cannot read the image.
pub fn partitions(disk: &dyn ReadAt) -> Read<Option<Vec<Partition>>> {
    let mut damage = None;
    for sector in [512, 4096] {
        let last = (disk.size() / sector).saturating_sub(1) * sector;
        for offset in [sector, last] {
            let tried = header(disk, offset, sector)
                .and_then(|found| found.map(|h| table(disk, &h, sector)).transpose());
            match tried {
                Ok(Some(partitions)) => return Ok(Some(partitions)),
                Ok(None) => {}
                Err(fault) => {
                    damage.get_or_insert(fault);
                }
            }
        }
    }
    damage.map_or(Ok(None), Err)
}
