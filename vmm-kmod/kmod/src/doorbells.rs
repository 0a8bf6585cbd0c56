//! Ports to which an OUT only rings: it completes here, and a thread of
//! userland's that waits for it wakes up. No vCPU leaves for userland.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::errno;
use crate::sync::{Event, SpinLock};

/// Doorbells a VM can have; more ring by exits, as without.
const MOST: usize = 64;
/// Bytes of an OUT that rings: a virtqueue's notification (virtio 1.2 §4.1.5.2).
const SIZE: u8 = 2;

struct Bell {
    port: u16,
    value: Option<u16>,
    event: Event,
}

impl Bell {
    fn is(&self, port: u16, value: Option<u16>) -> bool {
        self.port == port && self.value == value
    }
}

/// A doorbell that rings, or is to be rung.
#[cfg(not(feature = "freebsd"))]
pub type Rung = ();
/// A doorbell that rings, or is to be rung.
#[cfg(feature = "freebsd")]
pub type Rung = Event;

/// A VM's doorbells.
pub struct Doorbells {
    bells: SpinLock<[Option<Bell>; MOST]>,
    /// Least and greatest port, 16 bits each; the least is greater if there
    /// is no doorbell. What is outside is no doorbell for sure.
    range: AtomicU32,
}

const NONE: u32 = 0xffff;

impl Doorbells {
    /// None.
    #[inline(never)]
    #[optimize(speed)]
    pub const fn new() -> Self {
        Doorbells {
            bells: SpinLock::new([const { None }; MOST]),
            range: AtomicU32::new(NONE),
        }
    }

    /// Sets what rings on OUTs of `value`, or of any value, to `port`; or ends
    /// it (`None`). ENOSPC: too many.
    pub fn set(&self, port: u16, value: Option<u16>, event: Option<Event>) -> Result<(), i32> {
        let mut new = event.map(|event| Bell { port, value, event });
        let wanted = new.is_some();
        // What is replaced is dropped behind the lock.
        let mut _old = None;
        let mut bells = self.bells.lock();
        let mine = |b: &Option<Bell>| b.as_ref().is_some_and(|b| b.is(port, value));
        let at = bells.iter().position(mine);
        let at = at.or_else(|| bells.iter().position(|b| b.is_none() && wanted));
        if let Some(slot) = at.and_then(|n| bells.get_mut(n)) {
            _old = core::mem::replace(slot, new.take());
        }
        let ports = || bells.iter().flatten().map(|b| u32::from(b.port));
        let range = match (ports().min(), ports().max()) {
            (Some(least), Some(greatest)) => greatest << 16 | least,
            _ => NONE,
        };
        self.range.store(range, Ordering::Release);
        drop(bells);
        if new.is_some() {
            return Err(errno::ENOSPC);
        }
        Ok(())
    }

    /// Rings, if that is what an OUT does; or says what to ring where that may
    /// sleep.
    #[inline]
    pub fn ring(&self, port: u16, size: u8, value: u32) -> Option<Rung> {
        if size != SIZE {
            return None;
        }
        let range = self.range.load(Ordering::Acquire);
        if port < range as u16 || u32::from(port) > range >> 16 {
            return None;
        }
        self.find(port, value as u16)
    }

    #[inline(never)]
    #[optimize(speed)]
    fn find(&self, port: u16, value: u16) -> Option<Rung> {
        let bells = self.bells.lock();
        let mut found = bells.iter().flatten();
        let bell = found.find(|b| b.port == port && b.value.is_none_or(|v| v == value))?;
        #[cfg(not(feature = "freebsd"))]
        bell.event.signal();
        #[cfg(feature = "freebsd")]
        return Some(bell.event);
        #[cfg(not(feature = "freebsd"))]
        Some(())
    }

    /// Forgets all.
    pub fn clear(&self) {
        for n in 0..MOST {
            let mut bells = self.bells.lock();
            // Dropped behind the lock.
            let _old = bells.get_mut(n).and_then(Option::take);
            drop(bells);
        }
        self.range.store(NONE, Ordering::Release);
    }
}
