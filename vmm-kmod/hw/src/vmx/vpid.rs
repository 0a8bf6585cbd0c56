//! Virtual-processor identifiers (SDM Vol. 3C §28.1).

use core::sync::atomic::{AtomicU64, Ordering};

const WORDS: usize = 64;

/// Hands out VPIDs 1 to 4095; 0 is the host's own.
pub struct VpidAllocator {
    used: [AtomicU64; WORDS],
}

impl Default for VpidAllocator {
    fn default() -> Self {
        Self::new()
    }
}

impl VpidAllocator {
    /// All free.
    pub const fn new() -> Self {
        let mut used = [const { AtomicU64::new(0) }; WORDS];
        #[allow(clippy::indexing_slicing)] // a constant index into a non-empty array
        {
            used[0] = AtomicU64::new(1);
        }
        VpidAllocator { used }
    }

    /// A free VPID, or `None`: the vCPU then runs without one, and every
    /// transition flushes its translations.
    pub fn alloc(&self) -> Option<u16> {
        for (i, word) in self.used.iter().enumerate() {
            let mut bits = word.load(Ordering::Relaxed);
            while bits != u64::MAX {
                let bit = bits.trailing_ones();
                match word.compare_exchange_weak(
                    bits,
                    bits | 1 << bit,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => return Some((i * 64) as u16 + bit as u16),
                    Err(now) => bits = now,
                }
            }
        }
        None
    }

    /// Gives one back.
    pub fn free(&self, vpid: u16) {
        if vpid != 0
            && let Some(word) = self.used.get(usize::from(vpid) / 64)
        {
            word.fetch_and(!(1 << (vpid % 64)), Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vpids_are_distinct_nonzero_bounded_and_reused() {
        let a = VpidAllocator::new();
        let mut seen = std::collections::BTreeSet::new();
        while let Some(v) = a.alloc() {
            assert_ne!(v, 0);
            assert!(seen.insert(v));
        }
        assert_eq!(seen.len(), 4095);
        a.free(77);
        a.free(0);
        assert_eq!(a.alloc(), Some(77));
        assert_eq!(a.alloc(), None);
    }
}
