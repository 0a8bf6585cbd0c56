//! The commands: queues that come and go, what the guest asks about, and the
//! disk's reads and writes.

use std::io;
use std::sync::Arc;

use vmmapi::GuestMemory;

use super::identify::{self, Facts};
use super::options::{MOST_QUEUES, Options};
use super::queue::{Completion, Submission};
use super::request::{self, Command, Io, Namespace, PAGE, Status};
use crate::disk::backend::{Backend, Error};
use crate::status::RingCounter;
use crate::virtio::queue::Buffer;

/// Features that are only remembered (NVMe 1.4 §5.21.1): arbitration to
/// asynchronous events.
const FEATURES: usize = 12;
/// FreeBSD's organisation identifier, as bhyve has it.
const EUI64_OUI: u64 = 0x0058_9cfc << 40;
const F_TEMPERATURE: usize = 4;
const F_CACHE: usize = 6;
const F_QUEUES: usize = 7;

/// How an admin or I/O command ends.
enum Answer {
    /// With this status, and this in dword 0.
    Done(Status, u32),
    /// When there is an event to tell of.
    Later,
}

impl From<Status> for Answer {
    fn from(status: Status) -> Answer {
        Answer::Done(status, 0)
    }
}

impl From<Result<(), Status>> for Answer {
    fn from(result: Result<(), Status>) -> Answer {
        Answer::Done(result.err().unwrap_or(Status::OK), 0)
    }
}

/// What came of a turn at a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing to do.
    Idle,
    /// A command was done; its completion may want an interrupt.
    Done(Option<u16>),
    /// A command was taken that completes some other time.
    Taken,
    /// A queue is not in guest memory: the controller is in a fatal state.
    Fatal,
}

/// What doorbells said last, by queue number.
pub trait Doorbells {
    /// A submission queue's tail.
    fn sq_tail(&self, queue: u16) -> u32;
    /// A completion queue's head.
    fn cq_head(&self, queue: u16) -> u32;
    /// Both are zero again: the queue is new.
    fn fresh_sq(&self, queue: u16);
    /// As above.
    fn fresh_cq(&self, queue: u16);
}

/// The controller behind its registers.
pub struct Controller {
    memory: GuestMemory,
    /// Its disk.
    pub(super) backend: Backend,
    /// One a queue, the admin queue's first.
    pub(super) counters: Vec<Arc<RingCounter>>,
    facts: Facts,
    /// I/O queue pairs that the driver may have.
    pub queues: u16,
    /// Most entries of a queue.
    pub entries: u16,
    sqs: Vec<Option<Submission>>,
    cqs: Vec<Option<Completion>>,
    /// Asynchronous Event Requests that wait.
    events: usize,
    features: [u32; FEATURES],
    buffers: Vec<Buffer>,
    /// Bytes that the command at hand has moved from or to the disk.
    moved: u64,
}

impl Controller {
    /// Opens the disk.
    ///
    /// # Errors
    /// As for a virtio disk.
    pub fn open(options: &Options, memory: GuestMemory) -> Result<Controller, Error> {
        let mut disk = options.disk.clone();
        let sector = disk.sector_size.map_or(512, |(logical, _)| logical);
        disk.sector_size = Some((sector, sector));
        let backend = Backend::open(&disk)?;
        let serial = match &disk.serial {
            Some(serial) => serial.clone(),
            None => crate::disk::serial_of(disk.path.as_os_str().as_encoded_bytes()),
        };
        // Unique where the serial number is.
        let eui64 = options.eui64.unwrap_or_else(|| {
            let hash = serial.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| {
                (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
            });
            EUI64_OUI | hash >> 24
        });
        let facts = Facts {
            namespace: Namespace {
                size: backend.size(),
                shift: sector.trailing_zeros() as u8,
                read_only: backend.read_only(),
            },
            serial,
            eui64,
            cache: !disk.sync,
            deallocate: backend.can_discard(),
        };
        let mut controller = Controller {
            memory,
            backend,
            counters: (0..=options.queues).map(|_| Arc::default()).collect(),
            facts,
            queues: options.queues.min(MOST_QUEUES),
            entries: options.entries,
            sqs: Vec::new(),
            cqs: Vec::new(),
            events: 0,
            features: [0; FEATURES],
            buffers: Vec::new(),
            moved: 0,
        };
        controller.reset();
        Ok(controller)
    }

    /// Every queue is gone, and so is what was set.
    pub fn reset(&mut self) {
        let n = usize::from(self.queues) + 1;
        self.sqs = (0..n).map(|_| None).collect();
        self.cqs = (0..n).map(|_| None).collect();
        self.events = 0;
        self.features = [0; FEATURES];
        // Kelvin; above it there would be an event.
        if let Some(f) = self.features.get_mut(F_TEMPERATURE) {
            *f = 353;
        }
        if let Some(f) = self.features.get_mut(F_CACHE) {
            *f = u32::from(self.facts.cache);
        }
    }

    /// Makes the admin queues (§7.6.1): base addresses, entries.
    pub fn enable(&mut self, (asq, asize): (u64, u32), (acq, csize): (u64, u32)) -> bool {
        let ok = |base: u64, size: u32, entry: u64| {
            base.is_multiple_of(PAGE)
                && size >= 2
                && self.memory.contains(base, u64::from(size) * entry)
        };
        if !ok(asq, asize, 64) || !ok(acq, csize, 16) {
            return false;
        }
        if let (Some(sq), Some(cq)) = (self.sqs.first_mut(), self.cqs.first_mut()) {
            *sq = Some(Submission {
                base: asq,
                size: asize,
                cq: 0,
                head: 0,
            });
            *cq = Some(Completion {
                base: acq,
                size: csize,
                vector: Some(0),
                tail: 0,
                phase: true,
            });
        }
        true
    }

    /// Makes what was written durable, as at shutdown.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        self.backend.flush()
    }

    /// Where a completion queue's next entry goes; `None` if there is none of
    /// that number, or nobody waits for an interrupt from it.
    pub fn cq_tail(&self, queue: u16) -> Option<u32> {
        let cq = self.cqs.get(usize::from(queue))?.as_ref()?;
        cq.vector.map(|_| cq.tail)
    }

    /// Does at most one command of a submission queue.
    pub fn turn(&mut self, queue: u16, doorbells: &dyn Doorbells) -> Turn {
        let Some(Some(sq)) = self.sqs.get_mut(usize::from(queue)) else {
            return Turn::Idle;
        };
        let cq_id = sq.cq;
        let Some(Some(cq)) = self.cqs.get(usize::from(cq_id)) else {
            return Turn::Idle;
        };
        if cq.is_full(doorbells.cq_head(cq_id)) {
            return Turn::Idle;
        }
        let command = match sq.pop(doorbells.sq_tail(queue), &self.memory) {
            Ok(Some(command)) => command,
            Ok(None) => return Turn::Idle,
            Err(_) => return Turn::Fatal,
        };
        let head = sq.head;
        self.moved = 0;
        let answer = if queue == 0 {
            self.admin(&command, doorbells)
        } else {
            self.io(&command).into()
        };
        let Answer::Done(status, result) = answer else {
            return Turn::Taken;
        };
        if let Some(counter) = self.counters.get(usize::from(queue)) {
            counter.count(self.moved);
        }
        let Some(Some(cq)) = self.cqs.get_mut(usize::from(cq_id)) else {
            return Turn::Taken;
        };
        match cq.push(&self.memory, (queue, head), command.id, result, status) {
            Ok(()) => Turn::Done(cq.vector),
            Err(_) => Turn::Fatal,
        }
    }

    fn buffers(&mut self, command: &Command, len: u64) -> Result<(), Status> {
        let memory = &self.memory;
        request::buffers(command, len, &mut self.buffers, |at| {
            memory.read::<u64>(at).ok()
        })?;
        if self
            .buffers
            .iter()
            .all(|b| memory.contains(b.addr, b.len.into()))
        {
            Ok(())
        } else {
            Err(Status::TRANSFER)
        }
    }

    /// Writes an answer to where a command wants it.
    fn give(&mut self, command: &Command, bytes: &[u8]) -> Result<(), Status> {
        self.buffers(command, bytes.len() as u64)?;
        let mut rest = bytes;
        for b in &self.buffers {
            let (now, later) = rest.split_at(rest.len().min(b.len as usize));
            self.memory
                .write_bytes(b.addr, now)
                .map_err(|_| Status::TRANSFER)?;
            rest = later;
        }
        Ok(())
    }

    /// Admin commands (§5).
    fn admin(&mut self, c: &Command, doorbells: &dyn Doorbells) -> Answer {
        if c.flags & 0xc3 != 0 {
            return Status::FIELD.into();
        }
        match c.opcode {
            0x00 => self.delete_sq(c.dword(0) as u16).into(),
            0x01 => self.create_sq(c, doorbells).into(),
            0x02 => self.log_page(c).into(),
            0x04 => self.delete_cq(c.dword(0) as u16).into(),
            0x05 => self.create_cq(c, doorbells).into(),
            0x06 => self.identify(c).into(),
            // Nothing waits long enough: not aborted.
            0x08 => Answer::Done(Status::OK, 1),
            0x09 => self.set_features(c),
            0x0a => self.get_features(c),
            0x0c if self.events > usize::from(identify::EVENTS) => Status::EVENT_LIMIT.into(),
            0x0c => {
                self.events += 1;
                Answer::Later
            }
            _ => Status::OPCODE.into(),
        }
    }

    /// Base, size and number of a queue that is to be made.
    fn new_queue(&self, c: &Command, entry: u64) -> Result<(u16, u32), Status> {
        let id = c.dword(0) as u16;
        let size = (c.dword(0) >> 16) + 1;
        if id == 0 || id > self.queues {
            return Err(Status::QUEUE_ID);
        }
        if size < 2 || size > u32::from(self.entries) {
            return Err(Status::QUEUE_SIZE);
        }
        // CAP.CQR: contiguous ones only.
        if c.dword(1) & 1 == 0 {
            return Err(Status::FIELD);
        }
        if !c.prp1.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET);
        }
        if !self.memory.contains(c.prp1, u64::from(size) * entry) {
            return Err(Status::TRANSFER);
        }
        Ok((id, size))
    }

    fn create_cq(&mut self, c: &Command, doorbells: &dyn Doorbells) -> Result<(), Status> {
        let (id, size) = self.new_queue(c, 16)?;
        let vector = (c.dword(1) >> 16) as u16;
        let interrupts = c.dword(1) & 2 != 0;
        if interrupts && vector > self.queues {
            return Err(Status::VECTOR);
        }
        let slot = self.cqs.get_mut(usize::from(id)).ok_or(Status::QUEUE_ID)?;
        if slot.is_some() {
            return Err(Status::QUEUE_ID);
        }
        doorbells.fresh_cq(id);
        *slot = Some(Completion {
            base: c.prp1,
            size,
            vector: interrupts.then_some(vector),
            tail: 0,
            phase: true,
        });
        Ok(())
    }

    fn create_sq(&mut self, c: &Command, doorbells: &dyn Doorbells) -> Result<(), Status> {
        let (id, size) = self.new_queue(c, 64)?;
        let cq = (c.dword(1) >> 16) as u16;
        if cq == 0 || !matches!(self.cqs.get(usize::from(cq)), Some(Some(_))) {
            return Err(Status::CQ_INVALID);
        }
        let slot = self.sqs.get_mut(usize::from(id)).ok_or(Status::QUEUE_ID)?;
        if slot.is_some() {
            return Err(Status::QUEUE_ID);
        }
        doorbells.fresh_sq(id);
        *slot = Some(Submission {
            base: c.prp1,
            size,
            cq,
            head: 0,
        });
        Ok(())
    }

    fn delete_sq(&mut self, id: u16) -> Result<(), Status> {
        match self.sqs.get_mut(usize::from(id)) {
            Some(slot) if id != 0 && slot.is_some() => {
                *slot = None;
                Ok(())
            }
            _ => Err(Status::QUEUE_ID),
        }
    }

    fn delete_cq(&mut self, id: u16) -> Result<(), Status> {
        if self.sqs.iter().flatten().any(|sq| sq.cq == id) && id != 0 {
            return Err(Status::QUEUE_DELETION);
        }
        match self.cqs.get_mut(usize::from(id)) {
            Some(slot) if id != 0 && slot.is_some() => {
                *slot = None;
                Ok(())
            }
            _ => Err(Status::QUEUE_ID),
        }
    }

    fn identify(&mut self, c: &Command) -> Result<(), Status> {
        let page = match (c.dword(0) as u8, c.nsid) {
            (0, 1 | u32::MAX) => identify::namespace(&self.facts),
            // An inactive namespace reads as zeroes.
            (0, n) if n != 0 => return Err(Status::NAMESPACE),
            (1, _) => identify::controller(&self.facts),
            (2, n) if n < u32::MAX - 1 => identify::active(n),
            (3, 1) => identify::descriptors(&self.facts),
            (0 | 2 | 3, _) => return Err(Status::NAMESPACE),
            _ => return Err(Status::FIELD),
        };
        self.give(c, &page)
    }

    fn log_page(&mut self, c: &Command) -> Result<(), Status> {
        let page = match c.dword(0) as u8 {
            // No errors.
            1 => vec![0; 64],
            2 => identify::health(),
            3 => identify::firmware(),
            _ => return Err(Status::LOG_PAGE),
        };
        // Dwords, less one; no offset, as LPA says.
        let dwords = (c.dword(0) >> 16 | (c.dword(1) & 0xffff) << 16).saturating_add(1);
        let len = page.len().min(dwords as usize * 4);
        let page = page.get(..len).unwrap_or(&page);
        self.give(c, page)
    }

    fn set_features(&mut self, c: &Command) -> Answer {
        if c.dword(0) & 1 << 31 != 0 {
            return Status::NOT_SAVEABLE.into();
        }
        let id = usize::from(c.dword(0) as u8);
        let value = c.dword(1);
        if id == F_QUEUES {
            // Whatever was asked, less one in each half; 65535 is not a number.
            if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                return Status::FIELD.into();
            }
            return Answer::Done(Status::OK, self.queue_count());
        }
        if id == F_CACHE {
            // It is always as the host has it: no is no, and yes is no change.
            return if self.facts.cache {
                Status::OK.into()
            } else {
                Status::FIELD.into()
            };
        }
        match self.features.get_mut(id) {
            // Range types and the reserved ones.
            Some(slot) if id != 0 && id != 3 => {
                *slot = value;
                Status::OK.into()
            }
            _ => Status::FIELD.into(),
        }
    }

    fn queue_count(&self) -> u32 {
        let n = u32::from(self.queues.saturating_sub(1));
        n | n << 16
    }

    fn get_features(&self, c: &Command) -> Answer {
        let id = usize::from(c.dword(0) as u8);
        match id {
            F_QUEUES => Answer::Done(Status::OK, self.queue_count()),
            0 | 3 => Status::FIELD.into(),
            id => match self.features.get(id) {
                Some(value) => Answer::Done(Status::OK, *value),
                None => Status::FIELD.into(),
            },
        }
    }

    /// Commands of I/O queues (§6).
    fn io(&mut self, c: &Command) -> Result<(), Status> {
        let namespace = self.facts.namespace;
        match namespace.parse(c)? {
            Io::Flush => self.backend.flush().map_err(|e| failed(&e, true)),
            Io::Read { offset, len } => {
                self.buffers(c, len)?;
                self.backend
                    .read(&self.memory, &self.buffers, offset)
                    .map_err(|e| failed(&e, false))?;
                self.moved = len;
                Ok(())
            }
            Io::Write { offset, len, fua } => {
                self.buffers(c, len)?;
                self.backend
                    .write(&self.memory, &self.buffers, offset, fua)
                    .map_err(|e| failed(&e, true))?;
                self.moved = len;
                Ok(())
            }
            Io::WriteZeroes {
                offset,
                len,
                deallocate,
            } => self
                .backend
                .write_zeroes(offset, len, deallocate, false)
                .map_err(|e| failed(&e, true)),
            Io::Deallocate { ranges } => self.deallocate(c, ranges, &namespace),
            Io::Hint => Ok(()),
        }
    }

    fn deallocate(&mut self, c: &Command, ranges: u32, disk: &Namespace) -> Result<(), Status> {
        let ranges = ranges.min(request::RANGES);
        let mut list = vec![0; ranges as usize * 16];
        self.buffers(c, list.len() as u64)?;
        let mut rest = list.as_mut_slice();
        for b in &self.buffers {
            let (now, later) = rest.split_at_mut(rest.len().min(b.len as usize));
            self.memory
                .read_bytes(b.addr, now)
                .map_err(|_| Status::TRANSFER)?;
            rest = later;
        }
        let (list, _) = list.as_chunks::<16>();
        // All are looked at before any is given up.
        for range in list {
            disk.dsm_range(range)?;
        }
        if !self.facts.deallocate {
            return Ok(());
        }
        for range in list {
            let (offset, len) = disk.dsm_range(range)?;
            self.backend
                .discard(offset, len, false)
                .map_err(|e| failed(&e, true))?;
        }
        Ok(())
    }
}

/// The host's error as the guest sees it.
fn failed(e: &io::Error, write: bool) -> Status {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Status::CAPACITY,
        _ if write => Status::WRITE_FAULT,
        _ => Status::READ_ERROR,
    }
}
