//! What the guest put into a command slot: the header, the FIS, the list of
//! buffers, and the ATA command in it. Parsed and checked; nothing here
//! touches a disk.

use crate::virtio::queue::Buffer;

/// Bytes of a command header (AHCI 1.3.1 §4.2.2).
pub const HEADER: usize = 32;
/// Bytes of a command FIS.
pub const CFIS: usize = 64;
/// Where a command table's ATAPI command and its buffers are (§4.2.3).
pub const ACMD: u64 = 0x40;
/// See [`ACMD`].
pub const PRDT: u64 = 0x80;
/// Most buffers of a command that are looked at; FreeBSD's and Linux's
/// drivers stay far below.
pub const MOST_BUFFERS: u32 = 1024;
/// Largest transfer of one command: 65536 sectors of 512 bytes, or as much of
/// larger ones.
pub const MOST_BYTES: u64 = 32 << 20;
/// Bytes of a Data Set Management range.
pub const RANGE: usize = 8;

/// A command header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// An ATAPI command is in the table.
    pub atapi: bool,
    /// Buffers of the list.
    pub buffers: u32,
    /// The command table's guest-physical address.
    pub table: u64,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER]) -> Header {
        let mut words = [0_u32; 8];
        for (word, b) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*b);
        }
        let [d0, _, base, high, ..] = words;
        Header {
            atapi: d0 & 1 << 5 != 0,
            buffers: d0 >> 16,
            table: u64::from(base & !0x7f) | u64::from(high) << 32,
        }
    }
}

/// A buffer of the list: 16 bytes (§4.2.3.3).
pub fn buffer(entry: [u8; 16]) -> Buffer {
    let v = u128::from_le_bytes(entry);
    Buffer {
        // Bit 0 is reserved: words are the unit.
        addr: v as u64 & !1,
        len: ((v >> 96) as u32 & 0x3f_ffff | 1) + 1,
    }
}

/// Cuts `buffers` to `len` bytes; the bytes that are left, at most `len`.
pub fn cut(buffers: &mut Vec<Buffer>, len: u64) -> u64 {
    let mut left = len;
    let mut keep = 0;
    for b in buffers.iter_mut() {
        if left == 0 {
            break;
        }
        b.len = u64::from(b.len).min(left) as u32;
        left -= u64::from(b.len);
        keep += 1;
    }
    buffers.truncate(keep);
    len - left
}

/// A register host-to-device FIS (SATA 3.0 §10.3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fis {
    /// It carries a command, not the control register.
    pub is_command: bool,
    /// Command.
    pub command: u8,
    /// Features, both bytes.
    pub features: u16,
    /// LBA, 48 bits.
    pub lba: u64,
    /// Device.
    pub device: u8,
    /// Count, both bytes.
    pub count: u16,
    /// Control.
    pub control: u8,
}

impl Fis {
    /// Reads a FIS; `None` if it is of another type.
    pub fn parse(b: &[u8; CFIS]) -> Option<Fis> {
        let [
            kind,
            flags,
            command,
            f0,
            l0,
            l1,
            l2,
            device,
            l3,
            l4,
            l5,
            f1,
            c0,
            c1,
            _,
            control,
            ..,
        ] = *b;
        (kind == 0x27).then(|| Fis {
            is_command: flags & 0x80 != 0,
            command,
            features: u16::from_le_bytes([f0, f1]),
            lba: u64::from_le_bytes([l0, l1, l2, l3, l4, l5, 0, 0]),
            device,
            count: u16::from_le_bytes([c0, c1]),
            control,
        })
    }
}

/// Error register bits (ATA8-ACS §6.3).
pub mod error {
    /// Aborted.
    pub const ABRT: u8 = 0x04;
    /// No such block.
    pub const IDNF: u8 = 0x10;
    /// The data cannot be read.
    pub const UNC: u8 = 0x40;
}

/// What a disk is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ata {
    /// Say what you are.
    Identify,
    /// Read blocks.
    Read {
        /// Bytes from the disk's start.
        offset: u64,
        /// Bytes.
        len: u64,
        /// How it completes.
        way: Way,
    },
    /// Write blocks.
    Write {
        /// Bytes from the disk's start.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Durable when it completes.
        fua: bool,
        /// How it completes.
        way: Way,
    },
    /// Make writes durable.
    Flush,
    /// Give back the space of the ranges in so many bytes.
    Trim {
        /// Bytes of the list of ranges.
        len: u64,
        /// How it completes.
        way: Way,
    },
    /// Page of the log at that address: only that of the last queued error.
    ReadLog {
        /// Log address.
        log: u8,
        /// Bytes.
        len: u64,
    },
    /// SMART: whether the disk is well.
    SmartStatus,
    /// Things that a disk of files has nothing to do for.
    Nothing,
    /// Whether it sleeps: it does not.
    PowerMode,
    /// The largest block.
    MaxAddress,
}

/// How a command moves its data and completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// DMA.
    Dma,
    /// PIO, which AHCI does as DMA after a PIO Setup FIS.
    Pio,
    /// Queued, with this tag.
    Queued(u8),
}

/// The disk that commands are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Bytes.
    pub size: u64,
    /// Bytes of a logical block.
    pub sector: u32,
    /// Nothing can be written.
    pub read_only: bool,
    /// Space can be given back.
    pub trim: bool,
}

impl Disk {
    /// Logical blocks.
    pub fn blocks(&self) -> u64 {
        self.size / u64::from(self.sector)
    }

    /// The bytes of `count` blocks from `lba` on.
    ///
    /// # Errors
    /// They are not all there.
    pub fn range(&self, lba: u64, count: u64) -> Result<(u64, u64), u8> {
        let end = lba.checked_add(count).ok_or(error::IDNF)?;
        if end > self.blocks() {
            return Err(error::IDNF);
        }
        let sector = u64::from(self.sector);
        Ok((lba * sector, count * sector))
    }

    /// Parses a command (ATA8-ACS §7).
    ///
    /// # Errors
    /// The error register's bits.
    pub fn parse(&self, f: &Fis) -> Result<Ata, u8> {
        let queued = Way::Queued((f.count >> 3) as u8 & 31);
        let ext = |n: u16| if n == 0 { 0x1_0000 } else { u64::from(n) };
        let short = |n: u16| match n & 0xff {
            0 => 256,
            n => u64::from(n),
        };
        let lba28 = f.lba & 0xff_ffff | u64::from(f.device & 0xf) << 24;
        let io = |write: bool, lba: u64, count: u64, fua: bool, way: Way| {
            if write && self.read_only {
                return Err(error::ABRT);
            }
            let (offset, len) = self.range(lba, count)?;
            if len > MOST_BYTES {
                return Err(error::ABRT);
            }
            Ok(if write {
                Ata::Write {
                    offset,
                    len,
                    fua,
                    way,
                }
            } else {
                Ata::Read { offset, len, way }
            })
        };
        let fua = f.device & 0x80 != 0;
        match f.command {
            0xec => Ok(Ata::Identify),
            0x20 => io(false, lba28, short(f.count), false, Way::Pio),
            0x24 | 0x29 => io(false, f.lba, ext(f.count), false, Way::Pio),
            0xc4 => io(false, lba28, short(f.count), false, Way::Pio),
            0xc8 => io(false, lba28, short(f.count), false, Way::Dma),
            0x25 => io(false, f.lba, ext(f.count), false, Way::Dma),
            0x60 => io(false, f.lba, ext(f.features), false, queued),
            0x30 | 0xc5 => io(true, lba28, short(f.count), false, Way::Pio),
            0x34 | 0x39 => io(true, f.lba, ext(f.count), false, Way::Pio),
            0xca => io(true, lba28, short(f.count), false, Way::Dma),
            0x35 => io(true, f.lba, ext(f.count), false, Way::Dma),
            0x3d => io(true, f.lba, ext(f.count), true, Way::Dma),
            0x61 => io(true, f.lba, ext(f.features), fua, queued),
            0xe7 | 0xea => Ok(Ata::Flush),
            // Data Set Management with TRIM: 512-byte pages of ranges.
            0x06 if f.features & 1 != 0 && self.trim && !self.read_only => Ok(Ata::Trim {
                len: ext(f.count).min(MOST_BYTES / 512) * 512,
                way: Way::Dma,
            }),
            0x2f | 0x47 => Ok(Ata::ReadLog {
                log: f.lba as u8,
                len: ext(f.count) * 512,
            }),
            // SMART RETURN STATUS, ENABLE and DISABLE with their signature.
            0xb0 if f.lba & 0xff_ff00 == 0xc2_4f00 => match f.features & 0xff {
                0xda => Ok(Ata::SmartStatus),
                0xd8 | 0xd9 | 0xd2 => Ok(Ata::Nothing),
                _ => Err(error::ABRT),
            },
            // SET FEATURES: write cache, read-ahead, transfer mode, reverting.
            0xef => match f.features & 0xff {
                0x02 | 0x03 | 0x05 | 0x10 | 0x66 | 0x82 | 0x85 | 0x90 | 0xaa | 0x55 | 0xcc => {
                    Ok(Ata::Nothing)
                }
                _ => Err(error::ABRT),
            },
            0xe5 => Ok(Ata::PowerMode),
            0xf8 | 0x27 => Ok(Ata::MaxAddress),
            // SET MULTIPLE, IDLE and STANDBY, READ VERIFY, SEEK, SLEEP.
            0xc6 | 0xe0..=0xe3 | 0x40 | 0x42 | 0x70 | 0xe6 => Ok(Ata::Nothing),
            _ => Err(error::ABRT),
        }
    }

    /// Parses a range of a trim; `None` if it is empty.
    ///
    /// # Errors
    /// Blocks that are not there.
    pub fn trim_range(&self, range: [u8; RANGE]) -> Result<Option<(u64, u64)>, u8> {
        let v = u64::from_le_bytes(range);
        match v >> 48 {
            0 => Ok(None),
            count => self.range(v & 0xffff_ffff_ffff, count).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Disk = Disk {
        size: 1 << 20,
        sector: 512,
        read_only: false,
        trim: true,
    };

    fn fis(command: u8, lba: u64, count: u16, features: u16) -> Fis {
        let mut b = [0; CFIS];
        b[0] = 0x27;
        b[1] = 0x80;
        b[2] = command;
        let l = lba.to_le_bytes();
        b[3] = features as u8;
        b[4..7].copy_from_slice(&l[..3]);
        b[8..11].copy_from_slice(&l[3..6]);
        b[11] = (features >> 8) as u8;
        b[12..14].copy_from_slice(&count.to_le_bytes());
        Fis::parse(&b).unwrap()
    }

    #[test]
    fn reads_and_writes_stay_on_the_disk() {
        let read = |lba, count| DISK.parse(&fis(0x25, lba, count, 0));
        assert_eq!(
            read(2040, 8),
            Ok(Ata::Read {
                offset: 2040 * 512,
                len: 4096,
                way: Way::Dma
            })
        );
        assert_eq!(read(2040, 9), Err(error::IDNF));
        assert_eq!(read(0xffff_ffff_ffff, 1), Err(error::IDNF));
        assert_eq!(read(0, 0), Err(error::IDNF), "65536 blocks");
        assert_eq!(
            DISK.parse(&fis(0x61, 8, 5 << 3, 8)),
            Ok(Ata::Write {
                offset: 4096,
                len: 4096,
                fua: false,
                way: Way::Queued(5)
            })
        );
        assert_eq!(
            DISK.parse(&fis(0xc8, 0, 0, 0)),
            Ok(Ata::Read {
                offset: 0,
                len: 256 * 512,
                way: Way::Dma
            })
        );
        let large = Disk {
            size: 1 << 40,
            sector: 4096,
            ..DISK
        };
        assert_eq!(large.parse(&fis(0x25, 0, 0, 0)), Err(error::ABRT));
    }

    #[test]
    fn what_is_not_known_or_not_allowed_is_aborted() {
        for (command, features) in [
            (0, 0),
            (0xff, 0),
            (0xa0, 0),
            (0xa1, 0),
            (0xb0, 0xd0),
            (0xef, 0),
        ] {
            assert_eq!(
                DISK.parse(&fis(command, 0, 1, features)),
                Err(error::ABRT),
                "{command:#x}"
            );
        }
        let ro = Disk {
            read_only: true,
            ..DISK
        };
        for command in [0x30, 0x35, 0x61, 0xca, 0x06] {
            assert_eq!(ro.parse(&fis(command, 0, 1, 1)), Err(error::ABRT));
        }
        assert!(Fis::parse(&[0; CFIS]).is_none());
    }

    #[test]
    fn buffers_are_even_and_can_be_cut() {
        let mut e = [0; 16];
        e[..8].copy_from_slice(&0x1_0000_1001_u64.to_le_bytes());
        e[12..].copy_from_slice(&0x8000_0fff_u32.to_le_bytes());
        assert_eq!(
            buffer(e),
            Buffer {
                addr: 0x1_0000_1000,
                len: 4096
            }
        );
        let mut list = vec![buffer(e), buffer(e), buffer(e)];
        assert_eq!(cut(&mut list, 5000), 5000);
        assert_eq!((list.len(), list[1].len), (2, 904));
        assert_eq!(cut(&mut list, 9000), 5000);
        assert_eq!(cut(&mut list, 0), 0);
        assert!(list.is_empty());
    }

    #[test]
    fn ranges_of_a_trim() {
        let range = |lba: u64, n: u64| DISK.trim_range((lba | n << 48).to_le_bytes());
        assert_eq!(range(8, 2), Ok(Some((4096, 1024))));
        assert_eq!(range(8, 0), Ok(None));
        assert_eq!(range(2047, 2), Err(error::IDNF));
    }
}
