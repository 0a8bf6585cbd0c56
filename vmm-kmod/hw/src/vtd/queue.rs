//! Invalidation through a queue that is the host's (VT-d 4.1 §6.5.2).
//!
//! Where the host remaps interrupts by a unit it has the unit's queue, and with
//! that on no other way is there (§6.5). The host remembers where in the ring it
//! goes on, so that the ring is gone round once: what we want done, then waits
//! for nothing, until head and tail stand where they stood, and the ring is as
//! it was. The host must not be at it in the meantime.

use core::mem::ManuallyDrop;
use core::sync::atomic::{AtomicBool, Ordering, fence};

use vmm_core::host::Host;

use super::{FSTS, Refusal, Registers};
use crate::page::Pages;

// Offsets, §11.4.9.
pub(super) const IQH: usize = 0x80;
pub(super) const IQT: usize = 0x88;
pub(super) const IQA: usize = 0x90;

/// FSTS: a descriptor that it cannot do, or a device that did not answer.
const IQE: u32 = 1 << 4;
const ITE: u32 = 1 << 6;

// Descriptors, §6.5.2: of all contexts; of all translations; a wait that lets
// nothing after it begin before, and writes a 1 when all before it is done.
const CONTEXTS: u64 = 0x11;
const TRANSLATIONS: u64 = 0x12;
const WAIT: u64 = 0x65 | 1 << 32;

/// Reads of registers until it must be done: all of the host stands still.
const PATIENCE: u32 = 100_000;

/// What is needed for a queue.
pub(super) struct Queue<H: Host> {
    /// One half for what the ring has, the other for what waits write.
    spare: ManuallyDrop<Pages<H>>,
    /// It has not come round: the unit may write to `spare` still.
    stuck: AtomicBool,
}

impl<H: Host> Queue<H> {
    /// For the queue that a unit has.
    pub fn new(r: &impl Registers) -> Result<Self, Refusal> {
        Ok(Queue {
            spare: ManuallyDrop::new(Pages::new((r.read64(IQA) & 7) as u32 + 1)?),
            stuck: AtomicBool::new(false),
        })
    }

    /// Has the unit forget all contexts and translations; `drain`: the bits for
    /// DMA under way (§6.5.2.3) that it knows.
    ///
    /// Nobody else uses the queue before this returns.
    pub fn invalidate(&self, r: &impl Registers, drain: u64) -> Result<(), Refusal> {
        let address = r.read64(IQA);
        let len = 4096 << (address & 7);
        let size = 16 << (address >> 11 & 1);
        let start = r.read64(IQT) as usize;
        let spare = self.spare.as_ptr();
        let status = spare.wrapping_add(len).cast::<u64>();
        let idle = |at| r.read64(IQH) as usize == at && r.read32(FSTS) & (IQE | ITE) == 0;
        if len * 2 != self.spare.len()
            || start >= len
            || start & (size - 1) != 0
            || self.stuck.load(Ordering::Relaxed)
            || !(0..PATIENCE).any(|_| idle(start))
        {
            return Err(Refusal::Stuck);
        }
        let ring = H::phys_to_virt(address & !0xfff) as *mut u8;
        let put = |at: usize, low: u64, high: u64| {
            let to = ring.wrapping_add(at).cast::<u64>();
            // SAFETY: `at` is a descriptor's place in the ring, which is `len` bytes of
            // the host's memory, and by the caller's word nobody's now.
            unsafe {
                to.write_volatile(low);
                to.add(1).write_volatile(high);
            }
        };
        let waits = self.spare.pa() + len as u64;
        // SAFETY: as for `put`; `spare` is as long as two rings, and the unit writes
        // to it only as long as this lasts.
        unsafe {
            core::ptr::copy_nonoverlapping(ring, spare, len);
            core::ptr::write_bytes(ring, 0, len);
            status.add(1).write_volatile(0);
        }
        for n in (0..len).step_by(size) {
            let (low, high) = if n == 0 {
                (CONTEXTS, 0)
            } else if n == 2 * size {
                (TRANSLATIONS | drain, 0)
            } else {
                // The last has a word of its own.
                (WAIT, waits + if n == len - size { 8 } else { 0 })
            };
            put((start + n) & (len - 1), low, high);
        }
        fence(Ordering::SeqCst);
        let mut done = Ok(());
        // Head and tail at the same place are an empty ring: in two steps.
        for tail in [start ^ (len / 2), start] {
            r.write64(IQT, tail as u64);
            let there = |_| {
                let head = r.read64(IQH) as usize;
                if r.read32(FSTS) & IQE != 0 {
                    // It goes on, for the host's sake (§6.5.2.11).
                    put(head & (len - size), WAIT, waits);
                    r.write32(FSTS, IQE);
                    done = Err(Refusal::Stuck);
                    return false;
                }
                // SAFETY: within `spare`.
                head == tail && (tail != start || unsafe { status.add(1).read_volatile() } != 0)
            };
            if !(0..PATIENCE).any(there) {
                self.stuck.store(true, Ordering::Relaxed);
                return Err(Refusal::Stuck);
            }
        }
        // SAFETY: as above; the unit is through with it.
        unsafe { core::ptr::copy_nonoverlapping(spare, ring, len) };
        done
    }
}

impl<H: Host> Drop for Queue<H> {
    fn drop(&mut self) {
        // The unit may write there still.
        if !*self.stuck.get_mut() {
            // SAFETY: once, and nobody uses it after this.
            unsafe { ManuallyDrop::drop(&mut self.spare) }
        }
    }
}
