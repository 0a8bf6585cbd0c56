//! Rings that take the bytes of OUTs to a port, so that a guest's output costs
//! no exit to userland a byte. A ring is a page that userland has mapped; it
//! opens and closes it, and takes bytes out, without a request.

use alloc::boxed::Box;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

use vmm_abi::layout::{
    EXT_OUT_RING_COUNT, OUT_RING_DATA, OUT_RING_HEAD, OUT_RING_LEN, OUT_RING_OPEN, OUT_RING_TAIL,
};
use vmm_hw::page::Pages;

use crate::errno;
use crate::os::Os;
use crate::sync::{self, Mutex, NoMemory};

const MASK: u32 = OUT_RING_LEN as u32 - 1;
/// A ring is in use; its port is in the low 16 bits.
const ON: u32 = 1 << 16;

struct Ring {
    page: Pages<Os>,
    /// What the page shows as the head: userland can write to that.
    head: AtomicU32,
    /// A vCPU puts a byte in. Others' bytes go to userland meanwhile.
    busy: AtomicBool,
}

impl Ring {
    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: the offsets are constants within the page, aligned, and the
        // page lives as long as self; all access to it is atomic.
        unsafe { AtomicU32::from_ptr(self.page.as_ptr().add(offset).cast()) }
    }

    #[inline]
    fn push(&self, byte: u8) -> bool {
        if self.busy.swap(true, Ordering::Acquire) {
            return false;
        }
        let head = self.head.load(Ordering::Relaxed);
        // A tail that makes no sense leaves no room.
        let used = head.wrapping_sub(self.word(OUT_RING_TAIL).load(Ordering::Acquire));
        let room = used <= MASK && self.word(OUT_RING_OPEN).load(Ordering::Relaxed) != 0;
        if room {
            let at = OUT_RING_DATA + (head & MASK) as usize;
            // SAFETY: within the page, which lives as long as self.
            let cell = unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(at)) };
            cell.store(byte, Ordering::Relaxed);
            let head = head.wrapping_add(1);
            self.head.store(head, Ordering::Relaxed);
            self.word(OUT_RING_HEAD).store(head, Ordering::Release);
        }
        self.busy.store(false, Ordering::Release);
        room
    }

    fn clear(&self) {
        for offset in [OUT_RING_OPEN, OUT_RING_HEAD, OUT_RING_TAIL] {
            self.word(offset).store(0, Ordering::Relaxed);
        }
        self.head.store(0, Ordering::Release);
    }
}

// SAFETY: the page is only reached through atomics.
unsafe impl Sync for Ring {}
// SAFETY: it is not tied to a thread.
unsafe impl Send for Ring {}

/// A VM's rings; each is made when first used and lives as long as the VM.
pub struct OutRings {
    /// Bit n: a ring may be for a port that is n modulo 64.
    perhaps: AtomicU64,
    ports: [AtomicU32; EXT_OUT_RING_COUNT],
    rings: [AtomicPtr<Ring>; EXT_OUT_RING_COUNT],
    writer: Mutex<()>,
}

impl OutRings {
    /// No ring is used.
    pub fn new() -> Result<OutRings, NoMemory> {
        Ok(OutRings {
            perhaps: AtomicU64::new(0),
            ports: [const { AtomicU32::new(0) }; EXT_OUT_RING_COUNT],
            rings: [const { AtomicPtr::new(ptr::null_mut()) }; EXT_OUT_RING_COUNT],
            writer: Mutex::new(())?,
        })
    }

    fn ring(&self, n: usize) -> Option<&Ring> {
        let p = self.rings.get(n)?.load(Ordering::Acquire);
        // SAFETY: once made, a ring lives as long as self.
        unsafe { p.as_ref() }
    }

    /// Connects ring `n` with a port (`None`: with none), empty and closed.
    /// EINVAL: no such ring, or another has the port. ENOMEM.
    pub fn set(&self, n: usize, port: Option<u16>) -> Result<(), i32> {
        let _writer = self.writer.lock();
        let slot = self.ports.get(n).ok_or(errno::EINVAL)?;
        let cell = self.rings.get(n).ok_or(errno::EINVAL)?;
        slot.store(0, Ordering::SeqCst);
        let Some(port) = port else {
            return Ok(());
        };
        let key = ON | u32::from(port);
        if self.ports.iter().any(|p| p.load(Ordering::Relaxed) == key) {
            return Err(errno::EINVAL);
        }
        if let Some(ring) = self.ring(n) {
            ring.clear();
        } else {
            let page = Pages::new(0).map_err(|_| errno::ENOMEM)?;
            let ring = sync::try_box(Ring {
                page,
                head: AtomicU32::new(0),
                busy: AtomicBool::new(false),
            })
            .map_err(|_| errno::ENOMEM)?;
            cell.store(Box::into_raw(ring), Ordering::Release);
        }
        slot.store(key, Ordering::Release);
        self.perhaps.fetch_or(1 << (port % 64), Ordering::Release);
        Ok(())
    }

    /// Physical address of a ring's page.
    pub fn pa(&self, n: usize) -> Option<u64> {
        self.ring(n).map(|r| r.page.pa())
    }

    /// Takes the byte of an OUT if a ring for the port is open.
    #[inline]
    pub fn push(&self, port: u16, byte: u8) -> bool {
        if self.perhaps.load(Ordering::Acquire) & 1 << (port % 64) == 0 {
            return false;
        }
        let key = ON | u32::from(port);
        let at = self
            .ports
            .iter()
            .position(|p| p.load(Ordering::Acquire) == key);
        at.and_then(|n| self.ring(n)).is_some_and(|r| r.push(byte))
    }

    /// Disconnects all.
    pub fn clear(&self) {
        let _writer = self.writer.lock();
        for port in &self.ports {
            port.store(0, Ordering::SeqCst);
        }
        self.perhaps.store(0, Ordering::SeqCst);
    }
}

impl Drop for OutRings {
    fn drop(&mut self) {
        for cell in &self.rings {
            let p = cell.swap(ptr::null_mut(), Ordering::AcqRel);
            if !p.is_null() {
                // SAFETY: made by `set` from a Box; nobody uses it any more.
                drop(unsafe { Box::from_raw(p) });
            }
        }
    }
}
