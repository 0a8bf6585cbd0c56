//! What a CD drive is asked: the SCSI commands of MMC-6 and SPC-3 that
//! operating systems use, parsed and checked.

/// Bytes of a command.
pub const CDB: usize = 16;
/// Most sectors of one read.
const MOST_SECTORS: u32 = 0x4000;

/// Sense: key, additional code and its qualifier (SPC-3 §4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sense {
    /// Sense key.
    pub key: u8,
    /// Additional sense code.
    pub asc: u8,
}

impl Sense {
    /// Nothing is wrong.
    pub const NONE: Sense = Sense { key: 0, asc: 0 };
    /// Unrecovered read error.
    pub const READ: Sense = Sense { key: 3, asc: 0x11 };
    /// Invalid command operation code.
    pub const OPCODE: Sense = Sense { key: 5, asc: 0x20 };
    /// Logical block address out of range.
    pub const LBA: Sense = Sense { key: 5, asc: 0x21 };
    /// Invalid field in CDB.
    pub const FIELD: Sense = Sense { key: 5, asc: 0x24 };
    /// The drive was reset.
    pub const RESET: Sense = Sense { key: 6, asc: 0x29 };
}

/// A command; `len` is always what the guest has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scsi {
    /// Are you ready?
    TestUnitReady,
    /// What went wrong?
    RequestSense {
        /// Bytes.
        len: u64,
    },
    /// Who are you?
    Inquiry {
        /// Vital product data page, if one is asked for.
        page: Option<u8>,
        /// Bytes.
        len: u64,
    },
    /// Tray and spindle, prevention of removal: nothing moves.
    Nothing,
    /// How large is the medium?
    ReadCapacity,
    /// Sectors.
    Read {
        /// First sector.
        lba: u32,
        /// How many.
        sectors: u32,
    },
    /// Table of contents.
    ReadToc {
        /// Format: 0 tracks, 1 sessions, 2 all.
        format: u8,
        /// Addresses as minutes, seconds and frames.
        msf: bool,
        /// First track.
        track: u8,
        /// Bytes.
        len: u64,
    },
    /// Mode page.
    ModeSense {
        /// Page.
        page: u8,
        /// Bytes.
        len: u64,
    },
    /// Profile: CD-ROM.
    GetConfiguration {
        /// Bytes.
        len: u64,
    },
    /// Events: none, asked for without waiting.
    EventStatus {
        /// Bytes.
        len: u64,
    },
    /// Logical units: one.
    ReportLuns {
        /// Bytes.
        len: u64,
    },
}

/// Parses a command for a medium of `sectors`.
///
/// # Errors
/// The sense that it fails with.
pub fn parse(cdb: &[u8; CDB], sectors: u64) -> Result<Scsi, Sense> {
    let [op, b1, b2, b3, b4, b5, b6, b7, b8, b9, ..] = *cdb;
    let be16 = |a: u8, b: u8| u64::from(u16::from_be_bytes([a, b]));
    let read = |lba: u32, count: u32| {
        if u64::from(lba) + u64::from(count) > sectors {
            return Err(Sense::LBA);
        }
        if count > MOST_SECTORS {
            return Err(Sense::FIELD);
        }
        Ok(Scsi::Read {
            lba,
            sectors: count,
        })
    };
    let lba = u32::from_be_bytes([b2, b3, b4, b5]);
    match op {
        0x00 => Ok(Scsi::TestUnitReady),
        0x03 => Ok(Scsi::RequestSense { len: b4.into() }),
        0x12 => Ok(Scsi::Inquiry {
            page: (b1 & 1 != 0).then_some(b2),
            len: be16(b3, b4),
        }),
        // Ejecting (LoEj without Start) is not to be had.
        0x1b if b4 & 3 == 2 => Err(Sense::FIELD),
        0x1b | 0x1e => Ok(Scsi::Nothing),
        0x25 => Ok(Scsi::ReadCapacity),
        0x28 => read(lba, be16(b7, b8) as u32),
        0xa8 => read(lba, u32::from_be_bytes([b6, b7, b8, b9])),
        0x43 => Ok(Scsi::ReadToc {
            format: if b2 & 0xf != 0 { b2 & 0xf } else { b9 >> 6 },
            msf: b1 & 2 != 0,
            track: b6,
            len: be16(b7, b8),
        }),
        0x5a => Ok(Scsi::ModeSense {
            page: b2,
            len: be16(b7, b8),
        }),
        0x46 => Ok(Scsi::GetConfiguration { len: be16(b7, b8) }),
        // Asynchronous operation is not offered.
        0x4a if b1 & 1 == 0 => Err(Sense::FIELD),
        0x4a => Ok(Scsi::EventStatus { len: be16(b7, b8) }),
        0xa0 => Ok(Scsi::ReportLuns {
            len: u32::from_be_bytes([b6, b7, b8, b9]).into(),
        }),
        _ => Err(Sense::OPCODE),
    }
}

/// Fixed-format sense data (SPC-3 §4.5.3).
pub fn sense(s: Sense) -> [u8; 18] {
    let mut b = [0; 18];
    [b[0], b[2], b[7], b[12]] = [0x70, s.key, 10, s.asc];
    b
}

/// Minutes, seconds and frames of a sector, as far as they go.
fn msf(lba: u32) -> [u8; 4] {
    let n = lba.saturating_add(150);
    [
        0,
        (n / 75 / 60).min(255) as u8,
        (n / 75 % 60) as u8,
        (n % 75) as u8,
    ]
}

/// The table of contents (MMC-6 §6.27): one data track.
///
/// # Errors
/// A track or a format that there is not.
pub fn toc(format: u8, as_msf: bool, track: u8, sectors: u64) -> Result<Vec<u8>, Sense> {
    let end = u32::try_from(sectors).unwrap_or(u32::MAX);
    let address = |lba: u32| if as_msf { msf(lba) } else { lba.to_be_bytes() };
    let mut t = vec![0, 0, 1, 1];
    let add = |t: &mut Vec<u8>, number: u8, lba: u32| {
        t.extend([0, 0x14, number, 0]);
        t.extend(address(lba));
    };
    match format {
        0 => {
            if track > 1 && track != 0xaa {
                return Err(Sense::FIELD);
            }
            if track <= 1 {
                add(&mut t, 1, 0);
            }
            add(&mut t, 0xaa, end);
        }
        1 => add(&mut t, 1, 0),
        2 => {
            for point in [0xa0, 0xa1, 0xa2, 1] {
                let at = if point == 0xa2 { end } else { 0 };
                t.extend([1, 0x14, 0, point, 0, 0, 0]);
                match point {
                    0xa0 | 0xa1 => t.extend([0, 1, 0, 0]),
                    _ => t.extend(address(at)),
                }
            }
        }
        _ => return Err(Sense::FIELD),
    }
    let len = (t.len() - 2) as u16;
    t.splice(..2, len.to_be_bytes());
    Ok(t)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cdb(bytes: &[u8]) -> [u8; CDB] {
        let mut c = [0; CDB];
        c[..bytes.len()].copy_from_slice(bytes);
        c
    }

    #[test]
    fn reads_stay_on_the_medium() {
        let read = |lba: u32, n: u16| {
            let [a, b, c, d] = lba.to_be_bytes();
            let [x, y] = n.to_be_bytes();
            parse(&cdb(&[0x28, 0, a, b, c, d, 0, x, y]), 100)
        };
        assert_eq!(
            read(90, 10),
            Ok(Scsi::Read {
                lba: 90,
                sectors: 10
            })
        );
        assert_eq!(read(91, 10), Err(Sense::LBA));
        assert_eq!(read(u32::MAX, 0xffff), Err(Sense::LBA));
        let all = cdb(&[0xa8, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(parse(&all, u64::MAX), Err(Sense::FIELD));
        assert_eq!(parse(&cdb(&[0xff]), 1), Err(Sense::OPCODE));
    }

    #[test]
    fn the_contents_are_one_data_track() {
        let t = toc(0, false, 0, 1000).unwrap();
        assert_eq!(t[..4], [0, 18, 1, 1]);
        assert_eq!(t[4..12], [0, 0x14, 1, 0, 0, 0, 0, 0]);
        assert_eq!(t[12..20], [0, 0x14, 0xaa, 0, 0, 0, 3, 0xe8]);
        assert_eq!(toc(0, true, 1, 4350).unwrap()[16..20], [0, 1, 0, 0]);
        assert_eq!(toc(0, false, 5, 1), Err(Sense::FIELD));
        assert_eq!(toc(9, false, 0, 1), Err(Sense::FIELD));
        assert!(toc(2, true, 0, u64::MAX).is_ok());
    }
}
