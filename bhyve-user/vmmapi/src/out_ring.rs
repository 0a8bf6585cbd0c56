//! Rings into which the kernel puts the bytes of OUTs to a port.

use crate::error::{Error, Result};
use crate::sys::Page;
use crate::vm::Vm;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use vmm_abi::layout::{
    EXT_F_OUT_RING, EXT_OUT_RINGS, OUT_RING_DATA, OUT_RING_HEAD, OUT_RING_LEN, OUT_RING_OPEN,
    OUT_RING_TAIL, VmExtOutRing,
};
use vmm_abi::request::VM_EXT_OUT_RING;

/// A ring of a VM, mapped. While it is open, one-byte OUTs to its port end in
/// it instead of in an exit, as long as there is room.
#[derive(Debug)]
pub struct OutRing {
    page: Page,
}

impl Vm {
    /// Connects ring `n` with a port, closed; `None` where the kernel piece
    /// has no such rings (FreeBSD's own, for one).
    ///
    /// # Errors
    /// EINVAL: there is no such ring. What mapping it says.
    pub fn out_ring(&self, n: u32, port: u16) -> Result<Option<OutRing>> {
        if !self.has(EXT_F_OUT_RING) {
            return Ok(None);
        }
        let mut arg = VmExtOutRing {
            port,
            on: 1,
            ring: n,
        };
        self.request(VM_EXT_OUT_RING, &mut arg)?;
        let offset = EXT_OUT_RINGS + u64::from(n) * Page::SIZE as u64;
        let page = Page::map(self.fd(), offset).map_err(|e| Error::Map {
            vm: self.name().into(),
            gpa: offset,
            len: Page::SIZE as u64,
            source: e,
        })?;
        Ok(Some(OutRing { page }))
    }
}

impl OutRing {
    fn word(&self, offset: usize) -> &AtomicU32 {
        self.page.word(offset)
    }

    fn byte(&self, n: u32) -> &AtomicU8 {
        self.page.byte(OUT_RING_DATA + n as usize % OUT_RING_LEN)
    }

    /// Opens or closes it. A byte that is on its way when it closes may still
    /// arrive some microseconds later.
    pub fn set_open(&self, open: bool) {
        self.word(OUT_RING_OPEN)
            .store(u32::from(open), Ordering::SeqCst);
    }

    /// Takes out what is in it, in order; says how many bytes that were.
    pub fn take(&self, mut sink: impl FnMut(u8)) -> usize {
        let head = self.word(OUT_RING_HEAD).load(Ordering::Acquire);
        let tail = self.word(OUT_RING_TAIL);
        let from = tail.load(Ordering::Relaxed);
        let n = (head.wrapping_sub(from) as usize).min(OUT_RING_LEN);
        for i in 0..n {
            sink(
                self.byte(from.wrapping_add(i as u32))
                    .load(Ordering::Relaxed),
            );
        }
        tail.store(head, Ordering::Release);
        n
    }
}
