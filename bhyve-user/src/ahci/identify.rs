//! What disks and drives say of themselves (ATA8-ACS §7.12, §7.13; SPC-3
//! §6.4).

use super::request::Disk;

/// Words of an IDENTIFY page.
const WORDS: usize = 256;

/// What differs from drive to drive.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Serial number, at most 20 characters.
    pub serial: String,
    /// Firmware revision, at most 8.
    pub revision: String,
    /// Model, at most 40.
    pub model: String,
    /// Nominal rotation rate; 1 for none.
    pub rotation: u16,
    /// Logical sectors of a physical one, as a power of two.
    pub exponent: u8,
}

/// ASCII in ATA's order: the first character is a word's upper byte.
fn text(page: &mut [u16; WORDS], at: usize, words: usize, text: &str) {
    let mut bytes: Vec<u8> = text.bytes().take(2 * words).collect();
    bytes.resize(2 * words, b' ');
    for (word, pair) in page.iter_mut().skip(at).zip(bytes.as_chunks::<2>().0) {
        *word = u16::from_be_bytes(*pair);
    }
}

fn bytes(page: &[u16; WORDS]) -> Vec<u8> {
    let mut out: Vec<u8> = page.iter().flat_map(|w| w.to_le_bytes()).collect();
    // Integrity word: signature and checksum.
    out.truncate(510);
    out.push(0xa5);
    let sum = out.iter().fold(0_u8, |a, b| a.wrapping_add(*b));
    out.push(sum.wrapping_neg());
    out
}

fn common(facts: &Facts) -> [u16; WORDS] {
    let mut w = [0; WORDS];
    text(&mut w, 10, 10, &facts.serial);
    text(&mut w, 23, 4, &facts.revision);
    text(&mut w, 27, 20, &facts.model);
    // LBA and DMA; IORDY.
    w[49] = 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11;
    w[50] = 1 << 14;
    // Words 64 to 70 and 88 are valid.
    w[53] = 1 << 1 | 1 << 2;
    // Multiword DMA 0 to 2, PIO 3 and 4, at 120 ns.
    w[63] = 7;
    w[64] = 3;
    w[65..69].fill(120);
    // ATA8-ACS, and those before.
    w[80] = 0x1f0;
    w[81] = 0x29;
    // Ultra DMA up to 6.
    w[88] = 0x7f;
    w
}

/// IDENTIFY DEVICE.
pub fn disk(facts: &Facts, disk: &Disk) -> Vec<u8> {
    let mut w = common(facts);
    let blocks = disk.blocks();
    let small = blocks.min(0x0fff_ffff) as u32;
    // Not removable; an old geometry that nobody uses.
    w[0] = 0x0040;
    w[1] = (blocks / (16 * 63)).min(16383) as u16;
    (w[3], w[6]) = (16, 63);
    w[47] = 0x8001;
    w[59] = 0x0101;
    [w[60], w[61]] = [small as u16, (small >> 16) as u16];
    w[69] = if disk.trim { 1 << 14 | 1 << 5 } else { 0 };
    // 32 commands at a time; NCQ, 1.5, 3 and 6 Gbit/s.
    w[75] = 31;
    w[76] = 1 << 8 | 7 << 1;
    // SMART, power management, write cache, read-ahead, NOP.
    w[82] = 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 14;
    // FLUSH CACHE, FLUSH CACHE EXT, 48 bits.
    w[83] = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 14;
    // General purpose logging, FUA.
    w[84] = 1 << 14 | 1 << 6 | 1 << 5;
    w[85] = w[82];
    w[86] = w[83] & !(1 << 14) | 1 << 15;
    w[87] = w[84];
    for (i, word) in w.iter_mut().skip(100).take(4).enumerate() {
        *word = (blocks >> (16 * i)) as u16;
    }
    // List pages of a trim.
    w[105] = if disk.trim { 64 } else { 0 };
    w[106] = 1 << 14;
    if facts.exponent > 0 {
        w[106] |= 1 << 13 | u16::from(facts.exponent);
    }
    if disk.sector > 512 {
        w[106] |= 1 << 12;
        let words = disk.sector / 2;
        [w[117], w[118]] = [words as u16, (words >> 16) as u16];
    }
    w[119] = 1 << 14;
    w[120] = 1 << 14;
    w[169] = u16::from(disk.trim);
    w[209] = 1 << 14;
    w[217] = facts.rotation;
    // SATA 3.0.
    w[222] = 0x103f;
    bytes(&w)
}

/// IDENTIFY PACKET DEVICE.
pub fn drive(facts: &Facts) -> Vec<u8> {
    let mut w = common(facts);
    // ATAPI, CD-ROM, removable, answers within 50 µs, 12-byte commands.
    w[0] = 2 << 14 | 5 << 8 | 1 << 7 | 2 << 5;
    w[76] = 7 << 1;
    // Packets, power management, NOP.
    w[82] = 1 << 14 | 1 << 4 | 1 << 3;
    w[83] = 1 << 14;
    w[84] = 1 << 14;
    w[85] = w[82];
    w[87] = 1 << 14;
    w[222] = 0x103f;
    bytes(&w)
}

/// A blank-filled field of SCSI.
fn field(out: &mut Vec<u8>, len: usize, text: &str) {
    let mut bytes: Vec<u8> = text.bytes().take(len).collect();
    bytes.resize(len, b' ');
    out.extend(bytes);
}

/// INQUIRY: standard data, or a vital product data page; `None` for a page
/// that there is not.
pub fn inquiry(facts: &Facts, page: Option<u8>) -> Option<Vec<u8>> {
    let mut out = match page {
        // CD-ROM, removable, SPC-3, response format 2 of ATAPI.
        None => vec![5, 0x80, 0, 0x21, 31, 0, 0, 0],
        Some(0) => return Some(vec![5, 0, 0, 2, 0, 0x80]),
        Some(0x80) => vec![5, 0x80, 0, 20],
        Some(_) => return None,
    };
    if page.is_none() {
        field(&mut out, 8, "BHYVE");
        field(&mut out, 16, "BHYVE DVD-ROM");
        field(&mut out, 4, &facts.revision);
    } else {
        field(&mut out, 20, &facts.serial);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identify_page_adds_up() {
        let facts = Facts {
            serial: "S".into(),
            revision: "001".into(),
            model: "BHYVE SATA DISK".into(),
            rotation: 1,
            exponent: 3,
        };
        let size = Disk {
            size: 3 << 40,
            sector: 512,
            read_only: false,
            trim: true,
        };
        let page = disk(&facts, &size);
        assert_eq!(page.len(), 512);
        assert_eq!(page.iter().fold(0_u8, |a, b| a.wrapping_add(*b)), 0);
        let word = |i: usize| u16::from_le_bytes([page[2 * i], page[2 * i + 1]]);
        let blocks = (0..4).fold(0_u64, |n, i| n | u64::from(word(100 + i)) << (16 * i));
        assert_eq!(blocks, (3 << 40) / 512);
        assert_eq!(u32::from(word(60)) | u32::from(word(61)) << 16, 0x0fff_ffff);
        assert_eq!(&page[54..58], b"HBVY");
        assert_eq!(drive(&facts).len(), 512);
        assert_eq!(inquiry(&facts, None).unwrap().len(), 36);
        assert!(inquiry(&facts, Some(0x83)).is_none());
    }
}
