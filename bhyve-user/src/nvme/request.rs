//! What the guest puts into a submission queue, parsed and checked; nothing
//! here touches the disk.

use crate::virtio::queue::Buffer;

/// Bytes of a submission entry (NVMe 1.4 §4.2).
pub const ENTRY: usize = 64;
/// The only memory page size there is (CAP.MPSMIN = CAP.MPSMAX = 0).
pub const PAGE: u64 = 4096;
/// Largest transfer, as MDTS says: pages, a power of two.
pub const MDTS: u8 = 8;
/// The same in bytes.
pub const MOST_BYTES: u64 = PAGE << MDTS;
/// Ranges of one Dataset Management command.
pub const RANGES: u32 = 256;

/// A status: type and code (§4.6.1), and whether a retry is pointless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Status code type.
    pub kind: u8,
    /// Status code.
    pub code: u8,
    /// Do not retry.
    pub final_: bool,
}

impl Status {
    const fn generic(code: u8) -> Status {
        Status {
            kind: 0,
            code,
            final_: code != 0,
        }
    }
    const fn specific(code: u8) -> Status {
        Status {
            kind: 1,
            code,
            final_: true,
        }
    }
    const fn media(code: u8) -> Status {
        Status {
            kind: 2,
            code,
            final_: false,
        }
    }
    /// Success.
    pub const OK: Status = Status::generic(0);
    /// Invalid Command Opcode.
    pub const OPCODE: Status = Status::generic(1);
    /// Invalid Field in Command.
    pub const FIELD: Status = Status::generic(2);
    /// Data Transfer Error: a buffer that is not in guest memory.
    pub const TRANSFER: Status = Status::generic(4);
    /// Invalid Namespace or Format.
    pub const NAMESPACE: Status = Status::generic(0x0b);
    /// PRP Offset Invalid.
    pub const PRP_OFFSET: Status = Status::generic(0x13);
    /// LBA Out of Range.
    pub const LBA: Status = Status::generic(0x80);
    /// Capacity Exceeded.
    pub const CAPACITY: Status = Status::generic(0x81);
    /// Completion Queue Invalid.
    pub const CQ_INVALID: Status = Status::specific(0);
    /// Invalid Queue Identifier.
    pub const QUEUE_ID: Status = Status::specific(1);
    /// Invalid Queue Size.
    pub const QUEUE_SIZE: Status = Status::specific(2);
    /// Asynchronous Event Request Limit Exceeded.
    pub const EVENT_LIMIT: Status = Status::specific(5);
    /// Invalid Interrupt Vector.
    pub const VECTOR: Status = Status::specific(8);
    /// Invalid Log Page.
    pub const LOG_PAGE: Status = Status::specific(9);
    /// Invalid Queue Deletion: its completion queue is in use.
    pub const QUEUE_DELETION: Status = Status::specific(0x0c);
    /// Feature Identifier Not Saveable.
    pub const NOT_SAVEABLE: Status = Status::specific(0x0d);
    /// Attempted Write to Read Only Range.
    pub const READ_ONLY: Status = Status::specific(0x82);
    /// Write Fault.
    pub const WRITE_FAULT: Status = Status::media(0x80);
    /// Unrecovered Read Error.
    pub const READ_ERROR: Status = Status::media(0x81);

    /// The status field of a completion entry, phase bit 0 (§4.6).
    pub const fn field(self) -> u16 {
        (self.code as u16) << 1 | (self.kind as u16) << 9 | (self.final_ as u16) << 15
    }
}

/// A submission entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Opcode.
    pub opcode: u8,
    /// Fused operation and the choice between PRP and SGL.
    pub flags: u8,
    /// Command identifier.
    pub id: u16,
    /// Namespace.
    pub nsid: u32,
    /// First PRP entry.
    pub prp1: u64,
    /// Second PRP entry, or the address of a list of them.
    pub prp2: u64,
    /// Command dwords 10 to 15.
    pub dw: [u32; 6],
}

impl Command {
    /// Reads an entry.
    pub fn parse(entry: &[u8; ENTRY]) -> Command {
        let mut words = [0_u32; 16];
        for (word, bytes) in words.iter_mut().zip(entry.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        let [d0, nsid, _, _, _, _, p1, p1h, p2, p2h, rest @ ..] = words;
        let wide = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        Command {
            opcode: d0 as u8,
            flags: (d0 >> 8) as u8,
            id: (d0 >> 16) as u16,
            nsid,
            prp1: wide(p1, p1h),
            prp2: wide(p2, p2h),
            dw: rest,
        }
    }

    /// Dword 10 + `n`.
    pub fn dword(&self, n: usize) -> u32 {
        self.dw.get(n).copied().unwrap_or(0)
    }

    /// First logical block (dwords 10 and 11).
    pub fn slba(&self) -> u64 {
        u64::from(self.dword(0)) | u64::from(self.dword(1)) << 32
    }
}

/// What an I/O command asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// Make writes durable.
    Flush,
    /// Read into the buffers.
    Read {
        /// Bytes from the disk's start.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Write from the buffers.
    Write {
        /// Bytes from the disk's start.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Durable when it completes.
        fua: bool,
    },
    /// Make blocks read as zeroes.
    WriteZeroes {
        /// Bytes from the disk's start.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The space may be given back.
        deallocate: bool,
    },
    /// Give back the space of so many ranges in the buffers.
    Deallocate {
        /// 16-byte ranges.
        ranges: u32,
    },
    /// Hints of other kinds, which may be ignored.
    Hint,
}

/// The namespace that commands are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Namespace {
    /// Bytes.
    pub size: u64,
    /// Bytes of a logical block, as a power of two.
    pub shift: u8,
    /// Nothing can be written.
    pub read_only: bool,
}

impl Namespace {
    /// Logical blocks.
    pub fn blocks(&self) -> u64 {
        self.size >> self.shift
    }

    /// The bytes of `count` blocks from `first` on.
    ///
    /// # Errors
    /// [`Status::LBA`].
    pub fn range(&self, first: u64, count: u64) -> Result<(u64, u64), Status> {
        let end = first.checked_add(count).ok_or(Status::LBA)?;
        if end > self.blocks() {
            return Err(Status::LBA);
        }
        Ok((first << self.shift, count << self.shift))
    }

    /// Parses a command of an I/O queue (§6).
    ///
    /// # Errors
    /// The status that it completes with.
    pub fn parse(&self, c: &Command) -> Result<Io, Status> {
        // PRPs only, nothing fused.
        if c.flags & 0xc3 != 0 {
            return Err(Status::FIELD);
        }
        let here = c.nsid == 1 || c.opcode == 0 && c.nsid == u32::MAX;
        if !here {
            return Err(Status::NAMESPACE);
        }
        let count = u64::from(c.dword(2) & 0xffff) + 1;
        let fua = c.dword(2) & 1 << 30 != 0;
        let transfer = || {
            let (offset, len) = self.range(c.slba(), count)?;
            if len > MOST_BYTES {
                return Err(Status::FIELD);
            }
            Ok((offset, len))
        };
        match c.opcode {
            0x00 => Ok(Io::Flush),
            0x01 | 0x08 | 0x09 if self.read_only => Err(Status::READ_ONLY),
            0x01 => transfer().map(|(offset, len)| Io::Write { offset, len, fua }),
            0x02 => transfer().map(|(offset, len)| Io::Read { offset, len }),
            0x08 => {
                let (offset, len) = self.range(c.slba(), count)?;
                let deallocate = c.dword(2) & 1 << 25 != 0;
                Ok(Io::WriteZeroes {
                    offset,
                    len,
                    deallocate,
                })
            }
            0x09 if c.dword(1) & 4 != 0 => Ok(Io::Deallocate {
                ranges: (c.dword(0) & 0xff) + 1,
            }),
            0x09 => Ok(Io::Hint),
            _ => Err(Status::OPCODE),
        }
    }

    /// Parses a range of Dataset Management (§6.7).
    ///
    /// # Errors
    /// [`Status::LBA`].
    pub fn dsm_range(&self, range: &[u8; 16]) -> Result<(u64, u64), Status> {
        let v = u128::from_le_bytes(*range);
        self.range((v >> 64) as u64, (v >> 32) as u32 as u64)
    }
}

/// The buffers that a command's PRP entries name, `len` bytes in all (§4.3).
/// `read` reads one entry of a list. Neighbouring pages become one buffer.
///
/// # Errors
/// The status that the command completes with.
pub fn buffers(
    command: &Command,
    len: u64,
    out: &mut Vec<Buffer>,
    mut read: impl FnMut(u64) -> Option<u64>,
) -> Result<(), Status> {
    out.clear();
    if len > MOST_BYTES {
        return Err(Status::FIELD);
    }
    let mut left = len;
    let mut push = |addr: u64, left: &mut u64| -> Result<(), Status> {
        let n = (PAGE - addr % PAGE).min(*left) as u32;
        *left -= u64::from(n);
        match out.last_mut() {
            Some(last) if last.addr.checked_add(last.len.into()) == Some(addr) => {
                last.len += n;
            }
            _ => out.push(Buffer { addr, len: n }),
        }
        Ok(())
    };
    if left == 0 {
        return Ok(());
    }
    // Dwords are the unit (§4.3).
    if !command.prp1.is_multiple_of(4) {
        return Err(Status::PRP_OFFSET);
    }
    push(command.prp1, &mut left)?;
    if left == 0 {
        return Ok(());
    }
    if left <= PAGE {
        if !command.prp2.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET);
        }
        return push(command.prp2, &mut left);
    }
    let mut at = command.prp2;
    if !at.is_multiple_of(8) {
        return Err(Status::PRP_OFFSET);
    }
    // Each round takes a page off what is left, or follows a link, of which a
    // page of entries has one at its end.
    while left > 0 {
        let entry = read(at).ok_or(Status::TRANSFER)?;
        if at % PAGE == PAGE - 8 && left > PAGE {
            // The last entry of a page is where the list goes on, which it
            // does at a page's start: a list that only links never ends else.
            if !entry.is_multiple_of(PAGE) {
                return Err(Status::PRP_OFFSET);
            }
            at = entry;
            continue;
        }
        if !entry.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET);
        }
        push(entry, &mut left)?;
        at += 8;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const DISK: Namespace = Namespace {
        size: 1 << 20,
        shift: 9,
        read_only: false,
    };

    fn command(opcode: u8, slba: u64, dw12: u32) -> Command {
        Command {
            opcode,
            flags: 0,
            id: 7,
            nsid: 1,
            prp1: 0,
            prp2: 0,
            dw: [slba as u32, (slba >> 32) as u32, dw12, 0, 0, 0],
        }
    }

    #[test]
    fn an_entry_is_read_as_the_specification_lays_it_out() {
        let mut entry = [0; ENTRY];
        entry[0] = 2;
        entry[2..4].copy_from_slice(&0x1234_u16.to_le_bytes());
        entry[4..8].copy_from_slice(&1_u32.to_le_bytes());
        entry[24..32].copy_from_slice(&0x1_0000_1000_u64.to_le_bytes());
        entry[32..40].copy_from_slice(&0x2000_u64.to_le_bytes());
        entry[40..48].copy_from_slice(&0x1_0000_0005_u64.to_le_bytes());
        entry[48..52].copy_from_slice(&7_u32.to_le_bytes());
        let c = Command::parse(&entry);
        assert_eq!((c.opcode, c.id, c.nsid), (2, 0x1234, 1));
        assert_eq!((c.prp1, c.prp2), (0x1_0000_1000, 0x2000));
        assert_eq!((c.slba(), c.dword(2)), (0x1_0000_0005, 7));
    }

    #[test]
    fn transfers_stay_on_the_disk_and_below_mdts() {
        assert_eq!(
            DISK.parse(&command(2, 2047, 0)),
            Ok(Io::Read {
                offset: 2047 * 512,
                len: 512
            })
        );
        for slba in [2048, u64::MAX, 1 << 55] {
            assert_eq!(DISK.parse(&command(2, slba, 0)), Err(Status::LBA));
            assert_eq!(DISK.parse(&command(1, slba, 0)), Err(Status::LBA));
            assert_eq!(DISK.parse(&command(8, slba, 0)), Err(Status::LBA));
        }
        assert_eq!(DISK.parse(&command(2, 2047, 1)), Err(Status::LBA));
        let large = Namespace {
            size: 1 << 40,
            ..DISK
        };
        assert_eq!(large.parse(&command(2, 0, 0xffff)), Err(Status::FIELD));
        assert!(large.parse(&command(8, 0, 0xffff)).is_ok());
    }

    #[test]
    fn other_namespaces_opcodes_and_sgls_are_refused() {
        let c = Command {
            nsid: 2,
            ..command(2, 0, 0)
        };
        assert_eq!(DISK.parse(&c), Err(Status::NAMESPACE));
        let all = Command {
            nsid: u32::MAX,
            ..command(0, 0, 0)
        };
        assert_eq!(DISK.parse(&all), Ok(Io::Flush));
        assert_eq!(DISK.parse(&command(0x55, 0, 0)), Err(Status::OPCODE));
        let sgl = Command {
            flags: 0x40,
            ..command(2, 0, 0)
        };
        assert_eq!(DISK.parse(&sgl), Err(Status::FIELD));
        let ro = Namespace {
            read_only: true,
            ..DISK
        };
        for opcode in [1, 8, 9] {
            assert_eq!(ro.parse(&command(opcode, 0, 0)), Err(Status::READ_ONLY));
        }
    }

    fn prps(prp1: u64, prp2: u64, len: u64, lists: &[(u64, u64)]) -> Result<Vec<Buffer>, Status> {
        let map: BTreeMap<u64, u64> = lists.iter().copied().collect();
        let c = Command {
            prp1,
            prp2,
            ..command(2, 0, 0)
        };
        let mut out = Vec::new();
        buffers(&c, len, &mut out, |at| map.get(&at).copied())?;
        Ok(out)
    }

    #[test]
    fn prp_entries_name_pages() {
        let b = |addr, len| Buffer { addr, len };
        assert_eq!(prps(0x1004, 0, 512, &[]), Ok(vec![b(0x1004, 512)]));
        assert_eq!(
            prps(0x1e00, 0x8000, 1024, &[]),
            Ok(vec![b(0x1e00, 512), b(0x8000, 512)])
        );
        assert_eq!(
            prps(0x1000, 0x2000, 8192, &[]),
            Ok(vec![b(0x1000, 8192)]),
            "neighbours are one"
        );
        let list = [(0x9008, 0x3000), (0x9010, 0x5000)];
        assert_eq!(
            prps(0x1000, 0x9008, 3 * 4096, &list),
            Ok(vec![b(0x1000, 4096), b(0x3000, 4096), b(0x5000, 4096)])
        );
        // The last entry of a page goes on elsewhere.
        let list = [
            (0x9ff0, 0x3000),
            (0x9ff8, 0xa000),
            (0xa000, 0x5000),
            (0xa008, 0x7000),
        ];
        assert_eq!(
            prps(0x1000, 0x9ff0, 4 * 4096, &list).map(|b| b.len()),
            Ok(4)
        );
        // Where it is the last of all, it is a page.
        let list = [(0x9ff0, 0x3000), (0x9ff8, 0x5000)];
        assert_eq!(
            prps(0x1000, 0x9ff0, 3 * 4096, &list).map(|b| b.len()),
            Ok(3)
        );
    }

    #[test]
    fn bad_prp_entries_are_refused_and_loops_end() {
        assert_eq!(prps(0x1001, 0, 512, &[]), Err(Status::PRP_OFFSET));
        assert_eq!(prps(0x1000, 0x2004, 8192, &[]), Err(Status::PRP_OFFSET));
        assert_eq!(prps(0x1000, 0x2004, 12288, &[]), Err(Status::PRP_OFFSET));
        assert_eq!(prps(0x1000, 0x9000, 12288, &[]), Err(Status::TRANSFER));
        assert_eq!(prps(0, 0, MOST_BYTES + 1, &[]), Err(Status::FIELD));
        // A page whose list links to itself is read once a round, and every
        // round but the link takes a page off.
        let looped: Vec<(u64, u64)> = (0..512)
            .map(|i| (0x9000 + 8 * i, if i == 511 { 0x9000 } else { 0x20_0000 }))
            .collect();
        assert!(prps(0x1000, 0x9000, MOST_BYTES, &looped).is_ok());
        let link = [(0x9ff8, 0x9000)];
        assert_eq!(prps(0x1000, 0x9ff8, 12288, &link), Err(Status::TRANSFER));
    }
}
