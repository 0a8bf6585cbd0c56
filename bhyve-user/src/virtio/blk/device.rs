//! The device: its configuration space, and requests served one by one.

use std::io;

use vmmapi::GuestMemory;

use super::options::{MOST_QUEUES, Options};
use super::request::{Disk, HEADER, ID, MOST_SECTORS, Refused, Request, SEGMENT};
use crate::disk::backend::{Backend, Error};
use crate::disk::{SECTOR, serial_of};
use crate::virtio::queue::{Chain, Malformed, take_front, take_last, total};
use crate::virtio::{Attempt, Cx, Device, Identity};

/// Feature bits (virtio 1.2 §5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Request status (§5.2.6).
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Entries of a queue, and segments of a request beside header and status.
const QUEUE: u16 = 128;
const SEG_MAX: u32 = QUEUE as u32 - 2;

/// The longest read that a vCPU does itself, bytes: some microseconds of
/// copying.
const MOST_AT_ONCE: u64 = 64 << 10;

/// One queue of a disk.
pub struct Blk {
    backend: Backend,
    serial: [u8; ID as usize],
}

/// The configuration structure (§5.2.4).
fn config(backend: &Backend, options: &Options, queues: u16) -> Vec<u8> {
    let (logical, physical) = options
        .disk
        .sector_size
        .unwrap_or((SECTOR as u32, SECTOR as u32));
    let exponent = physical.trailing_zeros() - logical.trailing_zeros();
    let mut c = Vec::with_capacity(60);
    let put = |c: &mut Vec<u8>, v: u32| c.extend(v.to_le_bytes());
    c.extend((backend.size() / SECTOR).to_le_bytes());
    // size_max is not offered.
    put(&mut c, 0);
    put(&mut c, SEG_MAX);
    // No geometry.
    put(&mut c, 0);
    put(&mut c, logical);
    // Physical block exponent, alignment offset, and in logical blocks the
    // least and the best I/O size.
    let least = (physical / logical) as u16;
    c.extend([exponent as u8, 0]);
    c.extend(least.to_le_bytes());
    put(&mut c, 0);
    // Writeback, not offered.
    c.extend([0, 0]);
    c.extend(queues.to_le_bytes());
    put(&mut c, MOST_SECTORS);
    put(&mut c, 1);
    put(&mut c, (logical / SECTOR as u32).max(1));
    put(&mut c, MOST_SECTORS);
    put(&mut c, 1);
    // Write-zeroes may unmap.
    put(&mut c, backend.can_discard().into());
    c
}

impl Blk {
    /// Opens the disk: its queues, at least one.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(options: &Options, cpus: u32) -> Result<(Identity, Vec<Blk>), Error> {
        let backend = Backend::open(&options.disk)?;
        let one_each = u16::try_from(cpus).unwrap_or(MOST_QUEUES);
        let queues = options.queues.unwrap_or(one_each).clamp(1, MOST_QUEUES);
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH;
        if backend.read_only() {
            features |= F_RO;
        } else {
            features |= F_WRITE_ZEROES;
        }
        if backend.can_discard() {
            features |= F_DISCARD;
        }
        if queues > 1 {
            features |= F_MQ;
        }
        let disk = &options.disk;
        let name = match &disk.serial {
            Some(name) => name.clone(),
            None => serial_of(disk.path.as_os_str().as_encoded_bytes()),
        };
        let mut serial = [0; ID as usize];
        for (to, from) in serial.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        let identity = Identity {
            kind: 2,
            // Mass storage, SCSI, as in bhyve.
            class: (1, 0),
            features,
            queues: vec![QUEUE; queues.into()],
            config: config(&backend, options, queues),
            writable: 0..0,
        };
        let more = (1..queues).map(|_| backend.share());
        let mut backends: Vec<Backend> = more.collect::<Result<_, _>>()?;
        backends.push(backend);
        let parts = backends.into_iter().map(|mut backend| {
            backend.map();
            Blk { backend, serial }
        });
        Ok((identity, parts.collect()))
    }

    /// Does what a request asks; returns the bytes written to the guest.
    fn perform(
        &mut self,
        request: Request,
        disk: &Disk,
        chain: &mut Chain,
        memory: &GuestMemory,
        durable: bool,
    ) -> Result<u64, Failure> {
        match request {
            Request::In { offset, len } => {
                self.backend.read(memory, &chain.writable, offset)?;
                Ok(len)
            }
            Request::Out { offset, .. } => {
                self.backend
                    .write(memory, &chain.readable, offset, durable)?;
                Ok(0)
            }
            Request::Flush => {
                self.backend.flush()?;
                Ok(0)
            }
            Request::GetId => {
                let mut rest = self.serial.as_slice();
                for b in &chain.writable {
                    let (now, later) = rest.split_at(rest.len().min(b.len as usize));
                    memory.write_bytes(b.addr, now).map_err(io::Error::other)?;
                    rest = later;
                }
                Ok(ID - rest.len() as u64)
            }
            Request::Discard | Request::WriteZeroes => {
                let mut segment = [0; SEGMENT];
                if !take_front(&mut chain.readable, memory, &mut segment) {
                    return Err(Failure::Refused(Refused::IoError));
                }
                let (offset, len, may_unmap) =
                    disk.segment(request, segment).map_err(Failure::Refused)?;
                if request == Request::Discard {
                    self.backend.discard(offset, len, durable)?;
                } else {
                    self.backend.write_zeroes(offset, len, may_unmap, durable)?;
                }
                Ok(0)
            }
        }
    }
}

enum Failure {
    Refused(Refused),
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        Failure::Host(e)
    }
}

impl Blk {
    /// Serves a request; with `at_once` only if that needs no waiting, and
    /// else says `None`.
    fn request(
        &mut self,
        chain: &mut Chain,
        memory: &GuestMemory,
        features: u64,
        at_once: bool,
    ) -> Result<Option<u32>, Malformed> {
        let mut header = [0; HEADER];
        if !take_front(&mut chain.readable, memory, &mut header) {
            return Err(Malformed::Request);
        }
        let status = take_last(&mut chain.writable).ok_or(Malformed::Request)?;
        let disk = Disk {
            size: self.backend.size(),
            read_only: self.backend.read_only(),
            discard: features & F_DISCARD != 0,
            write_zeroes: features & F_WRITE_ZEROES != 0,
        };
        // A driver without flush takes a write for durable when it is
        // acknowledged (§5.2.6.2).
        let durable = features & F_FLUSH == 0;
        let (readable, writable) = (total(&chain.readable), total(&chain.writable));
        let request = disk.parse(header, readable, writable);
        if at_once {
            let Ok(Request::In { offset, len }) = request else {
                return Ok(None);
            };
            if len > MOST_AT_ONCE
                || !self
                    .backend
                    .read_at_once(memory, &chain.writable, offset, len)
            {
                return Ok(None);
            }
            let done = memory.write(status, &S_OK);
            done.map_err(|_| Malformed::Buffer)?;
            return Ok(Some(len as u32 + 1));
        }
        let result = request
            .map_err(Failure::Refused)
            .and_then(|r| self.perform(r, &disk, chain, memory, durable));
        let (code, written) = match result {
            Ok(written) => (S_OK, written),
            Err(Failure::Refused(Refused::Unsupported)) => (S_UNSUPP, 0),
            Err(Failure::Host(e)) if e.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {
                (S_UNSUPP, 0)
            }
            Err(_) => (S_IOERR, 0),
        };
        memory.write(status, &code).map_err(|_| Malformed::Buffer)?;
        // The status is the last byte, so what is before it counts as written
        // when it is.
        let all = if code == S_OK {
            written.saturating_add(1)
        } else {
            writable.saturating_add(1)
        };
        Ok(Some(u32::try_from(all).unwrap_or(u32::MAX)))
    }
}

impl Device for Blk {
    fn serve(
        &mut self,
        _: usize,
        chain: &mut Chain,
        memory: &GuestMemory,
        features: u64,
    ) -> Result<u32, Malformed> {
        let written = self.request(chain, memory, features, false)?;
        written.ok_or(Malformed::Request)
    }

    fn at_once(&self) -> bool {
        self.backend.reads_at_once()
    }

    fn try_turn(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<Attempt, Malformed> {
        cx.try_serve_one(queue, |chain, memory, features| {
            self.request(chain, memory, features, true)
        })
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
