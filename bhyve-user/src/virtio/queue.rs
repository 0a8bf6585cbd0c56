//! A split virtqueue, the device's side (virtio 1.2 §2.7).
//!
//! Written here and not taken from `virtio-queue`: that crate ends a chain
//! quietly where a descriptor makes no sense, and a device here has to tell
//! the driver so (NEEDS_RESET). Every descriptor is read once, into a value of
//! ours, and checked before a device sees it.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vmmapi::GuestMemory;

use crate::status::RingCounter;

/// Descriptor flags (§2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Available ring flag: the driver wants no interrupts (§2.7.6).
const NO_INTERRUPT: u16 = 1;
/// Used ring flag: the device wants no notifications (§2.7.8).
const NO_NOTIFY: u16 = 1;
/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;
/// Most descriptors of one chain. §2.7.5.3.1 has the queue's size as the most,
/// but drivers exceed a small queue with indirect tables.
pub const MAX_CHAIN: usize = 1024;
/// The largest queue (§2.7).
pub const MAX_SIZE: u16 = 32768;

/// What a driver did that no driver may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A ring or table is not in guest memory.
    #[error("a ring or descriptor table is not in guest memory")]
    Ring,
    /// More available than there are descriptors.
    #[error("more buffers are available than the queue has entries")]
    AvailIndex,
    /// An index beyond the table.
    #[error("a descriptor index is beyond its table")]
    Index,
    /// A chain that does not end.
    #[error("a descriptor chain is a loop or too long")]
    Length,
    /// A buffer that is not in guest memory.
    #[error("a buffer is not in guest memory")]
    Buffer,
    /// Something to read behind something to write.
    #[error("a readable buffer is behind a writable one")]
    Order,
    /// Empty, odd-sized, nested or continued indirect table.
    #[error("an indirect descriptor table breaks the rules")]
    Indirect,
    /// A chain that lacks what the device's requests consist of.
    #[error("a request lacks its header or its status")]
    Request,
}

/// A piece of guest memory that was checked to exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes, not 0.
    pub len: u32,
}

/// One request's buffers. Kept and refilled, so that no request allocates.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    /// Bytes that it had for the device to read.
    given: u64,
    /// What the device may read, in order.
    pub readable: Vec<Buffer>,
    /// What the device may write, in order.
    pub writable: Vec<Buffer>,
}

/// All bytes of some buffers.
pub fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|b| u64::from(b.len)).sum()
}

/// Takes bytes off the front of `buffers`; false if there are too few.
pub fn take_front(buffers: &mut Vec<Buffer>, memory: &GuestMemory, into: &mut [u8]) -> bool {
    let mut rest = into;
    let mut used = 0;
    while !rest.is_empty() {
        let Some(first) = buffers.get_mut(used) else {
            return false;
        };
        let n = rest.len().min(first.len as usize);
        let (now, later) = rest.split_at_mut(n);
        if memory.read_bytes(first.addr, now).is_err() {
            return false;
        }
        rest = later;
        first.addr += n as u64;
        first.len -= n as u32;
        if first.len == 0 {
            used += 1;
        }
    }
    buffers.drain(..used);
    true
}

/// Writes bytes to the front of `buffers` and takes that part off; false if
/// there is too little room.
pub fn put_front(buffers: &mut Vec<Buffer>, memory: &GuestMemory, from: &[u8]) -> bool {
    let mut rest = from;
    let mut used = 0;
    while !rest.is_empty() {
        let Some(first) = buffers.get_mut(used) else {
            return false;
        };
        let n = rest.len().min(first.len as usize);
        let (now, later) = rest.split_at(n);
        if memory.write_bytes(first.addr, now).is_err() {
            return false;
        }
        rest = later;
        first.addr += n as u64;
        first.len -= n as u32;
        if first.len == 0 {
            used += 1;
        }
    }
    buffers.drain(..used);
    true
}

/// Takes `n` bytes off the front of `buffers`, or all there are.
pub fn skip_front(buffers: &mut Vec<Buffer>, n: u64) {
    let (mut left, mut used) = (n, 0);
    while left > 0
        && let Some(first) = buffers.get_mut(used)
    {
        let now = left.min(first.len.into());
        left -= now;
        first.addr += now;
        first.len -= now as u32;
        if first.len == 0 {
            used += 1;
        }
    }
    buffers.drain(..used);
}

/// Leaves the first `n` bytes of `buffers`, or all there are.
pub fn keep_front(buffers: &mut Vec<Buffer>, n: u64) {
    let mut left = n;
    for b in buffers.iter_mut() {
        let now = left.min(b.len.into());
        left -= now;
        b.len = now as u32;
    }
    buffers.retain(|b| b.len > 0);
}

/// Takes the last byte off `buffers`: its address.
pub fn take_last(buffers: &mut Vec<Buffer>) -> Option<u64> {
    let last = buffers.last_mut()?;
    last.len -= 1;
    let at = last.addr + u64::from(last.len);
    if last.len == 0 {
        buffers.pop();
    }
    Some(at)
}

#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn descriptor(memory: &GuestMemory, table: u64, index: u16) -> Result<Descriptor, Malformed> {
    let at = table.checked_add(u64::from(index) * DESCRIPTOR);
    let [addr, rest]: [u64; 2] = at
        .and_then(|at| memory.read(at).ok())
        .ok_or(Malformed::Ring)?;
    Ok(Descriptor {
        addr,
        len: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    })
}

impl Chain {
    fn push(&mut self, memory: &GuestMemory, d: Descriptor) -> Result<(), Malformed> {
        if !memory.contains(d.addr, d.len.into()) {
            return Err(Malformed::Buffer);
        }
        let list = if d.flags & WRITE != 0 {
            &mut self.writable
        } else if self.writable.is_empty() {
            &mut self.readable
        } else {
            return Err(Malformed::Order);
        };
        if d.len == 0 {
            return Ok(());
        }
        // Neighbours become one buffer: one call to the host instead of two.
        if let Some(last) = list.last_mut()
            && last.addr + u64::from(last.len) == d.addr
            && let Some(len) = last.len.checked_add(d.len)
        {
            last.len = len;
            return Ok(());
        }
        list.push(Buffer {
            addr: d.addr,
            len: d.len,
        });
        Ok(())
    }
}

/// Where a queue is, as the driver programmed it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Entries, a power of two.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring ("driver area").
    pub avail: u64,
    /// Used ring ("device area").
    pub used: u64,
}

impl Layout {
    /// The legacy interface's: all three in a row from page `pfn` on, the used
    /// ring at the next page (virtio 1.2 §2.7.2).
    pub fn legacy(pfn: u32, size: u16) -> Layout {
        let desc = u64::from(pfn) << 12;
        let avail = desc + DESCRIPTOR * u64::from(size);
        // Flags, index, ring, used_event.
        let end = avail + 6 + 2 * u64::from(size);
        Layout {
            size,
            desc,
            avail,
            used: end.next_multiple_of(4096),
        }
    }
}

/// A queue that runs.
#[derive(Debug)]
pub struct Queue {
    layout: Layout,
    event_idx: bool,
    indirect: bool,
    next_avail: u16,
    next_used: u16,
    /// `next_used` when the driver was last considered for an interrupt.
    signalled: u16,
    counter: Option<Arc<RingCounter>>,
}

impl Queue {
    /// Starts a queue from its beginning.
    ///
    /// # Errors
    /// [`Malformed::Ring`] where size, alignment (§2.7) or place is impossible.
    pub fn new(
        memory: &GuestMemory,
        layout: Layout,
        event_idx: bool,
        indirect: bool,
    ) -> Result<Queue, Malformed> {
        let n = u64::from(layout.size);
        let fits = layout.size.is_power_of_two()
            && layout.size <= MAX_SIZE
            && layout.desc.is_multiple_of(16)
            && layout.avail.is_multiple_of(2)
            && layout.used.is_multiple_of(4)
            && memory.contains(layout.desc, DESCRIPTOR * n)
            && memory.contains(layout.avail, 6 + 2 * n)
            && memory.contains(layout.used, 6 + 8 * n);
        if !fits {
            return Err(Malformed::Ring);
        }
        Ok(Queue {
            layout,
            event_idx,
            indirect,
            next_avail: 0,
            next_used: 0,
            signalled: 0,
            counter: None,
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    fn read16(memory: &GuestMemory, at: u64) -> Result<u16, Malformed> {
        memory.read(at).map_err(|_| Malformed::Ring)
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index & (self.layout.size - 1))
    }

    /// How many chains wait.
    ///
    /// # Errors
    /// [`Malformed`]; the queue is then to be used no more.
    pub fn waiting(&self, memory: &GuestMemory) -> Result<u16, Malformed> {
        let idx = Self::read16(memory, self.layout.avail + 2)?;
        let n = idx.wrapping_sub(self.next_avail);
        if n > self.layout.size {
            return Err(Malformed::AvailIndex);
        }
        Ok(n)
    }

    /// Tells a driver without event index whether to notify of what it adds.
    /// (With event index it only does after [`Queue::pop`] found nothing.)
    ///
    /// # Errors
    /// [`Malformed::Ring`].
    pub fn set_notify(&mut self, memory: &GuestMemory, wanted: bool) -> Result<(), Malformed> {
        if self.event_idx {
            return Ok(());
        }
        let flags = if wanted { 0 } else { NO_NOTIFY };
        memory
            .write(self.layout.used, &flags)
            .map_err(|_| Malformed::Ring)?;
        // What was added before the driver could see it is found by looking.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Reads the next chain into `chain`; false if there is none, and then the
    /// driver will notify of the next.
    ///
    /// # Errors
    /// [`Malformed`]; the queue is then to be used no more.
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, Malformed> {
        if self.waiting(memory)? == 0 {
            if !self.event_idx {
                return Ok(false);
            }
            // avail_event: notify of the entry that comes next. What was added
            // before the driver could see that is found by looking again.
            let at = self.layout.used + 4 + 8 * u64::from(self.layout.size);
            memory
                .write(at, &self.next_avail)
                .map_err(|_| Malformed::Ring)?;
            fence(Ordering::SeqCst);
            if self.waiting(memory)? == 0 {
                return Ok(false);
            }
        }
        // The index before what it announces.
        fence(Ordering::Acquire);
        let at = self.layout.avail + 4 + 2 * self.slot(self.next_avail);
        let head = Self::read16(memory, at)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        self.walk(memory, chain)?;
        chain.given = total(&chain.readable);
        Ok(true)
    }

    /// Takes back the last [`Queue::pop`]: the chain is there again.
    pub fn unpop(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    fn walk(&self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), Malformed> {
        let (mut table, mut entries) = (self.layout.desc, u64::from(self.layout.size));
        let (mut index, mut inside) = (chain.head, false);
        // The table's own number of entries bounds a chain without a loop.
        let mut left = entries;
        loop {
            if u64::from(index) >= entries {
                return Err(Malformed::Index);
            }
            left = left.checked_sub(1).ok_or(Malformed::Length)?;
            let d = descriptor(memory, table, index)?;
            if d.flags & INDIRECT != 0 {
                let count = u64::from(d.len) / DESCRIPTOR;
                let legal = self.indirect
                    && !inside
                    && d.flags & NEXT == 0
                    && count > 0
                    && u64::from(d.len).is_multiple_of(DESCRIPTOR)
                    && memory.contains(d.addr, d.len.into());
                if !legal {
                    return Err(Malformed::Indirect);
                }
                (table, entries, index, inside) = (d.addr, count, 0, true);
                left = count.min(MAX_CHAIN as u64);
                continue;
            }
            chain.push(memory, d)?;
            if d.flags & NEXT == 0 {
                return Ok(());
            }
            index = d.next;
        }
    }

    /// Gives a chain back with `written` bytes in its writable part.
    ///
    /// # Errors
    /// [`Malformed::Ring`].
    pub fn push(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        written: u32,
    ) -> Result<(), Malformed> {
        self.put(memory, chain, written)?;
        self.publish(memory)
    }

    /// As [`Queue::push`], but the driver sees it with the next
    /// [`Queue::publish`] only: for what belongs together.
    ///
    /// # Errors
    /// [`Malformed::Ring`].
    pub fn put(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        written: u32,
    ) -> Result<(), Malformed> {
        let at = self.layout.used + 4 + 8 * self.slot(self.next_used);
        let element = u64::from(chain.head) | u64::from(written) << 32;
        // Only 4-byte aligned, so two writes; nobody looks before the index.
        memory.write(at, &element).map_err(|_| Malformed::Ring)?;
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(counter) = &self.counter {
            counter.count(chain.given + u64::from(written));
        }
        Ok(())
    }

    /// Has what it does counted.
    pub fn count_by(&mut self, counter: Arc<RingCounter>) {
        self.counter = Some(counter);
    }

    /// Shows the driver what was put into the used ring.
    ///
    /// # Errors
    /// [`Malformed::Ring`].
    pub fn publish(&mut self, memory: &GuestMemory) -> Result<(), Malformed> {
        fence(Ordering::Release);
        memory
            .write(self.layout.used + 2, &self.next_used)
            .map_err(|_| Malformed::Ring)
    }

    /// Whether the driver wants an interrupt for what was given back since the
    /// last call (§2.7.7).
    ///
    /// # Errors
    /// [`Malformed::Ring`].
    pub fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, Malformed> {
        let old = std::mem::replace(&mut self.signalled, self.next_used);
        if old == self.next_used {
            return Ok(false);
        }
        // The used index must be out before the driver's wish is read.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags = Self::read16(memory, self.layout.avail)?;
            return Ok(flags & NO_INTERRUPT == 0);
        }
        let at = self.layout.avail + 4 + 2 * u64::from(self.layout.size);
        let event = Self::read16(memory, at)?;
        let passed = self.next_used.wrapping_sub(event).wrapping_sub(1);
        Ok(passed < self.next_used.wrapping_sub(old))
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
