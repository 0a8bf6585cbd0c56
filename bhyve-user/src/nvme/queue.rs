//! Submission and completion queues in guest memory (NVMe 1.4 §4.1).

use vmmapi::GuestMemory;

use super::request::{Command, ENTRY, Status};

/// Bytes of a completion entry (§4.6).
const COMPLETION: u64 = 16;

/// A submission queue, the controller's side.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Guest-physical address.
    pub base: u64,
    /// Entries.
    pub size: u32,
    /// The completion queue that its commands go to.
    pub cq: u16,
    /// Next entry to fetch.
    pub head: u32,
}

/// A completion queue, the controller's side.
#[derive(Clone, Debug)]
pub struct Completion {
    /// Guest-physical address.
    pub base: u64,
    /// Entries.
    pub size: u32,
    /// MSI-X vector; `None` where the driver polls.
    pub vector: Option<u16>,
    /// Next entry to write.
    pub tail: u32,
    /// Phase tag of this round.
    pub phase: bool,
}

impl Submission {
    /// The next command, if the driver's tail `tail` is beyond it.
    ///
    /// # Errors
    /// The queue is not in guest memory.
    pub fn pop(&mut self, tail: u32, memory: &GuestMemory) -> Result<Option<Command>, Status> {
        if tail >= self.size || tail == self.head {
            return Ok(None);
        }
        let mut entry = [0; ENTRY];
        let at = u64::from(self.head) * ENTRY as u64;
        memory
            .read_bytes(self.base.saturating_add(at), &mut entry)
            .map_err(|_| Status::TRANSFER)?;
        self.head = (self.head + 1) % self.size;
        Ok(Some(Command::parse(&entry)))
    }
}

impl Completion {
    /// No entry is free, as the driver has left its head at `head`.
    pub fn is_full(&self, head: u32) -> bool {
        (self.tail + 1) % self.size == head
    }

    /// Posts a completion: of command `id` from queue `sq`, whose head is now
    /// `sq_head`, with `result` in dword 0.
    ///
    /// # Errors
    /// The queue is not in guest memory.
    pub fn push(
        &mut self,
        memory: &GuestMemory,
        (sq, sq_head): (u16, u32),
        id: u16,
        result: u32,
        status: Status,
    ) -> Result<(), Status> {
        let at = self.base + u64::from(self.tail) * COMPLETION;
        let field = status.field() | u16::from(self.phase);
        let first = u64::from(result);
        let last = u64::from(sq_head as u16)
            | u64::from(sq) << 16
            | u64::from(id) << 32
            | u64::from(field) << 48;
        // The phase tag makes the entry valid: it comes last.
        memory.write(at, &first).map_err(|_| Status::TRANSFER)?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        memory.write(at + 8, &last).map_err(|_| Status::TRANSFER)?;
        self.tail += 1;
        if self.tail == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        }
        Ok(())
    }
}
