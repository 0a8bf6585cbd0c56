//! Ports whose reads userland has answered in advance: a status register that
//! a guest polls costs no exit to userland while it does not change.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::errno;
use crate::sync::SpinLock;

/// Ports that can be answered at once.
const PORTS: usize = 8;
/// An entry that answers; port in bits 23:8, value in bits 7:0.
const ON: u32 = 1 << 31;

/// What IN answers, by port.
pub struct ConstantPorts {
    entries: [AtomicU32; PORTS],
    /// Taken by writers.
    writer: SpinLock<()>,
}

impl ConstantPorts {
    /// No port is answered.
    pub const fn new() -> Self {
        ConstantPorts {
            entries: [const { AtomicU32::new(0) }; PORTS],
            writer: SpinLock::new(()),
        }
    }

    /// Sets or ends (`None`) the answer of a port. ENOSPC: too many ports.
    pub fn set(&self, port: u16, value: Option<u8>) -> Result<(), i32> {
        let _writer = self.writer.lock();
        let key = ON | u32::from(port) << 8;
        let is = |e: &&AtomicU32| e.load(Ordering::Relaxed) & !0xff == key;
        let old = self.entries.iter().find(is);
        let Some(value) = value else {
            if let Some(entry) = old {
                entry.store(0, Ordering::Release);
            }
            return Ok(());
        };
        let free = || self.entries.iter().find(|e| e.load(Ordering::Relaxed) == 0);
        let entry = old.or_else(free).ok_or(errno::ENOSPC)?;
        entry.store(key | u32::from(value), Ordering::Release);
        Ok(())
    }

    /// The answer of a port, if there is one.
    #[inline]
    pub fn get(&self, port: u16) -> Option<u8> {
        let key = ON | u32::from(port) << 8;
        self.entries.iter().find_map(|e| {
            let v = e.load(Ordering::Acquire);
            (v & !0xff == key).then_some(v as u8)
        })
    }

    /// Forgets all answers.
    pub fn clear(&self) {
        let _writer = self.writer.lock();
        for e in &self.entries {
            e.store(0, Ordering::Release);
        }
    }
}
