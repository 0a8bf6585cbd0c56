//! What the guest wrote: one block request, parsed and checked against the
//! disk, without touching the disk (virtio 1.2 §5.2.6).

use crate::disk::SECTOR;

/// Bytes of a request's header.
pub const HEADER: usize = 16;
/// Bytes of a discard or write-zeroes segment.
pub const SEGMENT: usize = 16;
/// Bytes of the answer to GET_ID (§5.2.6.1).
pub const ID: u64 = 20;
/// Most sectors of one discard or write-zeroes: 32 MiB, so that none keeps
/// the worker for long.
pub const MOST_SECTORS: u32 = 65536;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// A request. Offsets and lengths are bytes and lie within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read `len` bytes at `offset`.
    In {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Write as much.
    Out {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Make all acknowledged writes durable.
    Flush,
    /// Tell the serial number.
    GetId,
    /// Throw the contents of a segment away; the segment is in the data.
    Discard,
    /// Make a segment read as zeroes.
    WriteZeroes,
}

/// A request that is answered with an error (§5.2.6: status 1 and 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It cannot be done: beyond the end, odd length, read-only.
    IoError,
    /// It is not known.
    Unsupported,
}

/// What there is on the other side.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Bytes, a multiple of [`SECTOR`].
    pub size: u64,
    /// Nothing may be written.
    pub read_only: bool,
    /// Discard was offered and accepted.
    pub discard: bool,
    /// Write-zeroes was offered and accepted.
    pub write_zeroes: bool,
}

impl Disk {
    /// `sectors` from `sector` on, in bytes, if they are on the disk.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Refused> {
        let offset = sector.checked_mul(SECTOR).ok_or(Refused::IoError)?;
        let end = offset.checked_add(len).ok_or(Refused::IoError)?;
        if !len.is_multiple_of(SECTOR) || end > self.size {
            return Err(Refused::IoError);
        }
        Ok(offset)
    }

    /// Parses a header; `readable` bytes follow it, and `writable` bytes come
    /// before the status.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn parse(
        &self,
        header: [u8; HEADER],
        readable: u64,
        writable: u64,
    ) -> Result<Request, Refused> {
        let v = u128::from_le_bytes(header);
        let (kind, sector) = (v as u32, (v >> 64) as u64);
        match kind {
            T_IN => Ok(Request::In {
                offset: self.range(sector, writable)?,
                len: writable,
            }),
            T_OUT | T_DISCARD | T_WRITE_ZEROES if self.read_only => Err(Refused::IoError),
            T_OUT => Ok(Request::Out {
                offset: self.range(sector, readable)?,
                len: readable,
            }),
            T_FLUSH => Ok(Request::Flush),
            T_GET_ID => Ok(Request::GetId),
            // One segment is all that was offered.
            T_DISCARD | T_WRITE_ZEROES if readable != SEGMENT as u64 => Err(Refused::IoError),
            T_DISCARD if self.discard => Ok(Request::Discard),
            T_WRITE_ZEROES if self.write_zeroes => Ok(Request::WriteZeroes),
            _ => Err(Refused::Unsupported),
        }
    }

    /// Parses the segment of a discard or write-zeroes: offset and length in
    /// bytes, and whether the space may be given back.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn segment(
        &self,
        request: Request,
        segment: [u8; SEGMENT],
    ) -> Result<(u64, u64, bool), Refused> {
        let v = u128::from_le_bytes(segment);
        let (sector, sectors, flags) = (v as u64, (v >> 64) as u32, (v >> 96) as u32);
        let allowed = if request == Request::WriteZeroes {
            1
        } else {
            0
        };
        if flags & !allowed != 0 {
            return Err(Refused::Unsupported);
        }
        if sectors > MOST_SECTORS {
            return Err(Refused::IoError);
        }
        let len = u64::from(sectors) * SECTOR;
        Ok((self.range(sector, len)?, len, flags & 1 != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Disk = Disk {
        size: 1 << 20,
        read_only: false,
        discard: true,
        write_zeroes: true,
    };

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        (u128::from(kind) | u128::from(sector) << 64).to_le_bytes()
    }

    #[test]
    fn reads_and_writes_stay_on_the_disk() {
        let read = |sector, len| DISK.parse(header(0, sector), 0, len);
        assert_eq!(
            read(2, 1024),
            Ok(Request::In {
                offset: 1024,
                len: 1024
            })
        );
        assert!(read(2047, 512).is_ok());
        for (sector, len) in [
            (2047, 1024),
            (2048, 512),
            (0, 511),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (1 << 55, 512),
        ] {
            assert_eq!(read(sector, len), Err(Refused::IoError), "{sector} {len}");
            let write = DISK.parse(header(1, sector), len, 0);
            assert_eq!(write, Err(Refused::IoError), "{sector} {len}");
        }
    }

    #[test]
    fn a_read_only_disk_takes_no_writes() {
        let disk = Disk {
            read_only: true,
            ..DISK
        };
        for kind in [1, 11, 13] {
            assert_eq!(
                disk.parse(header(kind, 0), 16, 0),
                Err(Refused::IoError),
                "{kind}"
            );
        }
        assert!(disk.parse(header(0, 0), 0, 512).is_ok());
        assert_eq!(disk.parse(header(4, 0), 0, 0), Ok(Request::Flush));
    }

    #[test]
    fn what_was_not_offered_is_unsupported() {
        let disk = Disk {
            discard: false,
            write_zeroes: false,
            ..DISK
        };
        for kind in [2, 3, 11, 13, 14, u32::MAX] {
            assert_eq!(
                disk.parse(header(kind, 0), 16, 0),
                Err(Refused::Unsupported),
                "{kind}"
            );
        }
    }

    #[test]
    fn segments_stay_on_the_disk_and_flags_are_known() {
        let segment = |request, sector: u64, sectors: u32, flags: u32| {
            let v = u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96;
            DISK.segment(request, v.to_le_bytes())
        };
        let zeroes = Request::WriteZeroes;
        assert_eq!(segment(zeroes, 8, 4, 1), Ok((4096, 2048, true)));
        assert_eq!(segment(zeroes, 8, 4, 2), Err(Refused::Unsupported));
        let discard = Request::Discard;
        assert_eq!(segment(discard, 8, 4, 1), Err(Refused::Unsupported));
        assert_eq!(segment(discard, 2047, 2, 0), Err(Refused::IoError));
        assert_eq!(segment(discard, u64::MAX, 1, 0), Err(Refused::IoError));
        assert_eq!(
            segment(discard, 0, u32::MAX, 0),
            Err(Refused::IoError),
            "more than was offered"
        );
    }
}
