//! Sets of vCPUs that any thread may change.

use core::sync::atomic::{AtomicU64, Ordering};

/// vCPUs a VM can have: the width of these sets. Beyond FreeBSD 12's 16; all
/// that a vCPU needs is allocated when it is first named, so memory is what
/// runs out in practice.
pub const MAX_VCPUS: usize = 1024;

/// A set of vCPU numbers.
pub struct CpuSet([AtomicU64; MAX_VCPUS / 64]);

impl CpuSet {
    /// The empty set.
    #[inline(never)]
    #[optimize(speed)]
    pub const fn new() -> Self {
        CpuSet([const { AtomicU64::new(0) }; MAX_VCPUS / 64])
    }

    /// Puts a vCPU in; true if it was there before.
    pub fn set(&self, cpu: usize) -> bool {
        self.0
            .get(cpu / 64)
            .is_some_and(|w| w.fetch_or(1 << (cpu % 64), Ordering::SeqCst) & (1 << (cpu % 64)) != 0)
    }

    /// Takes a vCPU out; true if it was there.
    pub fn clear(&self, cpu: usize) -> bool {
        self.0.get(cpu / 64).is_some_and(|w| {
            w.fetch_and(!(1 << (cpu % 64)), Ordering::SeqCst) & (1 << (cpu % 64)) != 0
        })
    }

    /// Whether a vCPU is in it.
    pub fn contains(&self, cpu: usize) -> bool {
        self.0
            .get(cpu / 64)
            .is_some_and(|w| w.load(Ordering::SeqCst) & (1 << (cpu % 64)) != 0)
    }

    /// Empties the set.
    pub fn zero(&self) {
        for w in &self.0 {
            w.store(0, Ordering::SeqCst);
        }
    }

    /// Whether both hold the same vCPUs.
    pub fn same(&self, other: &CpuSet) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .all(|(a, b)| a.load(Ordering::SeqCst) == b.load(Ordering::SeqCst))
    }

    /// Whether every vCPU of `self` is in `other`.
    pub fn subset_of(&self, other: &CpuSet) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .all(|(a, b)| a.load(Ordering::SeqCst) & !b.load(Ordering::SeqCst) == 0)
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|w| w.load(Ordering::SeqCst) == 0)
    }

    /// The set as bytes, least significant bit first; as many as fit.
    pub fn bytes(&self, to: &mut [u8]) {
        for (chunk, w) in to.chunks_mut(8).zip(&self.0) {
            for (to, from) in chunk.iter_mut().zip(w.load(Ordering::SeqCst).to_le_bytes()) {
                *to = from;
            }
        }
    }

    /// Bytes up to the highest vCPU in it.
    pub fn bytes_needed(&self) -> usize {
        let top = self.0.iter().enumerate().rev().find_map(|(i, w)| {
            let v = w.load(Ordering::SeqCst);
            (v != 0).then(|| i * 64 + 64 - v.leading_zeros() as usize)
        });
        top.unwrap_or(0).div_ceil(8)
    }
}
