//! A disk or a CD drive doing commands.

use std::io;

use vmmapi::GuestMemory;

use super::atapi::{self, CDB, Scsi, Sense};
use super::identify::{self, Facts};
use super::options::{CD_SECTOR, Drive, Kind};
use super::request::{Ata, Disk, Fis, RANGE, Way, cut, error};
use crate::disk::backend::{Backend, Error};
use crate::virtio::queue::{Buffer, total};

/// The status register: ready, and what a disk adds (ATA8-ACS §6.2).
pub const READY: u8 = 0x50;
/// The error bit of the status register.
pub const ERR: u8 = 0x01;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Status register.
    pub status: u8,
    /// Error register.
    pub error: u8,
    /// LBA registers, where the command says something there.
    pub lba: Option<u64>,
    /// Count register.
    pub count: u16,
    /// Bytes moved.
    pub moved: u32,
    /// How it completes.
    pub way: Way,
}

impl Ending {
    fn ok(moved: u64, way: Way) -> Ending {
        Ending {
            status: READY,
            error: 0,
            lba: None,
            count: 0,
            moved: moved as u32,
            way,
        }
    }
    fn failed(error: u8, way: Way) -> Ending {
        Ending {
            status: READY | ERR,
            error,
            ..Ending::ok(0, way)
        }
    }
}

/// What is at a port.
pub struct Media {
    kind: Kind,
    backend: Backend,
    facts: Facts,
    disk: Disk,
    sense: Sense,
    /// The queued command that failed last: tag, error, LBA.
    log: Option<(u8, u8, u64)>,
}

impl Media {
    /// Opens the `n`th drive's image.
    ///
    /// # Errors
    /// As for a virtio disk.
    pub fn open(drive: &Drive, n: usize) -> Result<Media, Error> {
        let mut options = drive.disk.clone();
        let cd = drive.kind == Kind::Cd;
        let (logical, physical) = match options.sector_size {
            _ if cd => (CD_SECTOR, CD_SECTOR),
            Some(sizes) => sizes,
            None => (512, 512),
        };
        options.sector_size = Some((logical, physical));
        let backend = Backend::open(&options)?;
        let path = options.path.as_os_str().as_encoded_bytes();
        let facts = Facts {
            serial: options
                .serial
                .clone()
                .unwrap_or_else(|| crate::disk::serial_of(path)),
            revision: drive.revision.clone().unwrap_or_else(|| "001".into()),
            model: drive.model.clone().unwrap_or_else(|| {
                let kind = if cd { "DVD ROM" } else { "SATA DISK" };
                let number = if n > 0 {
                    format!(" {n}")
                } else {
                    String::new()
                };
                format!("BHYVE {kind}{number}")
            }),
            // Files do not rotate.
            rotation: drive.rotation.unwrap_or(1),
            exponent: (physical / logical).trailing_zeros() as u8,
        };
        let disk = Disk {
            size: backend.size(),
            sector: logical,
            read_only: backend.read_only(),
            trim: backend.can_discard(),
        };
        Ok(Media {
            kind: drive.kind,
            backend,
            facts,
            disk,
            sense: Sense::NONE,
            log: None,
        })
    }

    /// Its disk.
    #[cfg(test)]
    pub fn backend(&mut self) -> &mut Backend {
        &mut self.backend
    }

    /// A disk or a drive.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// It was reset.
    pub fn reset(&mut self) {
        self.log = None;
        if self.kind == Kind::Cd {
            self.sense = Sense::RESET;
        }
    }

    /// Does a command with its data in `buffers`.
    pub fn command(
        &mut self,
        fis: &Fis,
        cdb: Option<&[u8; CDB]>,
        buffers: &mut Vec<Buffer>,
        memory: &GuestMemory,
    ) -> Ending {
        match (self.kind, fis.command, cdb) {
            (Kind::Cd, 0xa0, Some(cdb)) => self.packet(cdb, buffers, memory),
            (Kind::Cd, 0xa1, _) => give(&identify::drive(&self.facts), buffers, memory, Way::Pio),
            // Transfer modes, power: as a disk.
            (Kind::Cd, 0xef | 0xe5 | 0xe0..=0xe3, _) | (Kind::Hd, ..) => {
                self.ata(fis, buffers, memory)
            }
            _ => Ending::failed(error::ABRT, Way::Dma),
        }
    }

    fn ata(&mut self, fis: &Fis, buffers: &mut Vec<Buffer>, memory: &GuestMemory) -> Ending {
        // What a queued command is, its number says, whatever else is wrong.
        let queued = matches!(fis.command, 0x60 | 0x61);
        let way = if queued {
            Way::Queued((fis.count >> 3) as u8 & 31)
        } else {
            Way::Dma
        };
        let ending = match self.disk.parse(fis) {
            Ok(command) => self.perform(command, buffers, memory),
            Err(error) => Ending::failed(error, way),
        };
        if let Way::Queued(tag) = ending.way
            && ending.status & ERR != 0
        {
            self.log = Some((tag, ending.error, fis.lba));
        }
        ending
    }

    fn perform(&mut self, command: Ata, buffers: &mut Vec<Buffer>, memory: &GuestMemory) -> Ending {
        let host = |e: io::Error, write: bool| match e.kind() {
            // A range of guest memory that is none.
            io::ErrorKind::InvalidInput => error::ABRT,
            _ if write => error::ABRT,
            _ => error::UNC,
        };
        match command {
            Ata::Identify => give(
                &identify::disk(&self.facts, &self.disk),
                buffers,
                memory,
                Way::Pio,
            ),
            Ata::Read { offset, len, way } => {
                let len = cut(buffers, len);
                match self.backend.read(memory, buffers, offset) {
                    Ok(()) => Ending::ok(len, way),
                    Err(e) => Ending::failed(host(e, false), way),
                }
            }
            Ata::Write {
                offset,
                len,
                fua,
                way,
            } => {
                let len = cut(buffers, len);
                match self.backend.write(memory, buffers, offset, fua) {
                    Ok(()) => Ending::ok(len, way),
                    Err(e) => Ending::failed(host(e, true), way),
                }
            }
            Ata::Flush => match self.backend.flush() {
                Ok(()) => Ending::ok(0, Way::Dma),
                Err(e) => Ending::failed(host(e, true), Way::Dma),
            },
            Ata::Trim { len, way } => match self.trim(len, buffers, memory) {
                Ok(moved) => Ending::ok(moved, way),
                Err(error) => Ending::failed(error, way),
            },
            Ata::ReadLog { log: 0x10, len } => {
                let page = self.error_log();
                let len = cut(buffers, len.min(page.len() as u64));
                let page = page.get(..len as usize).unwrap_or(&page);
                give(page, buffers, memory, Way::Pio)
            }
            Ata::ReadLog { .. } => Ending::failed(error::ABRT, Way::Pio),
            Ata::SmartStatus => Ending {
                lba: Some(0xc2_4f00),
                ..Ending::ok(0, Way::Dma)
            },
            Ata::Nothing => Ending::ok(0, Way::Dma),
            Ata::PowerMode => Ending {
                count: 0xff,
                ..Ending::ok(0, Way::Dma)
            },
            Ata::MaxAddress => Ending {
                lba: Some(self.disk.blocks().saturating_sub(1)),
                ..Ending::ok(0, Way::Dma)
            },
        }
    }

    fn trim(&self, len: u64, buffers: &mut Vec<Buffer>, memory: &GuestMemory) -> Result<u64, u8> {
        let len = cut(buffers, len);
        let mut list = vec![0; len as usize];
        let mut rest = list.as_mut_slice();
        for b in buffers.iter() {
            let (now, later) = rest.split_at_mut(rest.len().min(b.len as usize));
            memory.read_bytes(b.addr, now).map_err(|_| error::ABRT)?;
            rest = later;
        }
        let (list, _) = list.as_chunks::<RANGE>();
        // All are looked at before any is given up.
        for range in list {
            self.disk.trim_range(*range)?;
        }
        for range in list {
            if let Some((offset, len)) = self.disk.trim_range(*range)? {
                self.backend
                    .discard(offset, len, false)
                    .map_err(|_| error::ABRT)?;
            }
        }
        Ok(len)
    }

    /// NCQ Command Error log (ATA8-ACS §A.14).
    fn error_log(&mut self) -> Vec<u8> {
        let mut page = [0; 512];
        match self.log.take() {
            Some((tag, error, lba)) => {
                let [l0, l1, l2, l3, l4, l5, ..] = lba.to_le_bytes();
                let head = [tag, 0, READY | ERR, error, l0, l1, l2, 0, l3, l4, l5];
                for (to, from) in page.iter_mut().zip(head) {
                    *to = from;
                }
            }
            // The last command was not queued.
            None => page[0] = 0x80,
        }
        let sum = page.iter().fold(0_u8, |a, b| a.wrapping_add(*b));
        page[511] = sum.wrapping_neg();
        page.to_vec()
    }

    fn packet(
        &mut self,
        cdb: &[u8; CDB],
        buffers: &mut Vec<Buffer>,
        memory: &GuestMemory,
    ) -> Ending {
        let sectors = self.disk.blocks();
        let result = match atapi::parse(cdb, sectors) {
            // A unit attention is told by the first command that asks.
            Ok(Scsi::TestUnitReady | Scsi::Read { .. } | Scsi::ReadCapacity)
                if self.sense == Sense::RESET =>
            {
                Err(Sense::RESET)
            }
            Ok(command) => self.scsi(command, sectors, buffers, memory),
            Err(sense) => Err(sense),
        };
        match result {
            Ok(moved) => {
                if cdb[0] != 0x12 {
                    self.sense = Sense::NONE;
                }
                // Interrupt reason: command complete, data to the host.
                Ending {
                    count: 3,
                    ..Ending::ok(moved, Way::Dma)
                }
            }
            Err(sense) => {
                // It was told: the next command does not fail for it.
                self.sense = if sense == Sense::RESET {
                    Sense::NONE
                } else {
                    sense
                };
                Ending {
                    count: 3,
                    ..Ending::failed(sense.key << 4 | error::ABRT, Way::Dma)
                }
            }
        }
    }

    fn scsi(
        &mut self,
        command: Scsi,
        sectors: u64,
        buffers: &mut Vec<Buffer>,
        memory: &GuestMemory,
    ) -> Result<u64, Sense> {
        let (data, len) = match command {
            Scsi::TestUnitReady | Scsi::Nothing => return Ok(0),
            Scsi::Read { lba, sectors } => {
                let sector = u64::from(CD_SECTOR);
                let len = cut(buffers, u64::from(sectors) * sector);
                self.backend
                    .read(memory, buffers, u64::from(lba) * sector)
                    .map_err(|_| Sense::READ)?;
                return Ok(len);
            }
            Scsi::RequestSense { len } => (atapi::sense(self.sense).to_vec(), len),
            Scsi::Inquiry { page, len } => {
                let data = identify::inquiry(&self.facts, page).ok_or(Sense::FIELD)?;
                (data, len)
            }
            Scsi::ReadCapacity => {
                let last = u32::try_from(sectors.saturating_sub(1)).unwrap_or(u32::MAX);
                let mut data = last.to_be_bytes().to_vec();
                data.extend(CD_SECTOR.to_be_bytes());
                (data, 8)
            }
            Scsi::ReadToc {
                format,
                msf,
                track,
                len,
            } => (atapi::toc(format, msf, track, sectors)?, len),
            Scsi::ModeSense { page, len } => match page & 0x3f {
                // Read error recovery.
                0x01 | 0x3f => (
                    vec![0, 14, 0x05, 0, 0, 0, 0, 0, 1, 6, 0, 5, 0, 0, 0, 0],
                    len,
                ),
                // Capabilities: reads audio no, locks no, tray.
                0x2a => {
                    let mut data = vec![0, 26, 0, 0, 0, 0, 0, 0, 0x2a, 18];
                    data.resize(28, 0);
                    (data, len)
                }
                _ => return Err(Sense::FIELD),
            },
            Scsi::GetConfiguration { len } => {
                // Profile list: CD-ROM, current.
                let data = vec![0, 0, 0, 12, 0, 0, 0, 8, 0, 0, 3, 4, 0, 8, 1, 0];
                (data, len)
            }
            // No event of the media class.
            Scsi::EventStatus { len } => (vec![0, 2, 0x80, 0x10], len),
            Scsi::ReportLuns { len } => {
                let mut data = vec![0, 0, 0, 8];
                data.resize(16, 0);
                (data, len)
            }
        };
        let data = data.get(..data.len().min(len as usize)).unwrap_or(&data);
        let ending = give(data, buffers, memory, Way::Dma);
        if ending.status & ERR != 0 {
            return Err(Sense::FIELD);
        }
        Ok(ending.moved.into())
    }
}

/// Copies an answer into the guest's buffers, as far as they go.
fn give(data: &[u8], buffers: &mut Vec<Buffer>, memory: &GuestMemory, way: Way) -> Ending {
    let len = cut(buffers, data.len() as u64);
    let mut rest = data;
    for b in buffers.iter() {
        let (now, later) = rest.split_at(rest.len().min(b.len as usize));
        if memory.write_bytes(b.addr, now).is_err() {
            return Ending::failed(error::ABRT, way);
        }
        rest = later;
    }
    debug_assert_eq!(total(buffers), len);
    Ending::ok(len, way)
}
