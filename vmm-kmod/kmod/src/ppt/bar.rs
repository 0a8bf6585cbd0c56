//! Base address registers, as the host has set them up.

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// I/O ports.
    Io,
    /// Memory whose reads have side effects.
    Memory,
    /// Memory that may be prefetched, and written in bursts.
    Prefetchable,
}

/// A BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Host-physical address, or port.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// What is there.
    pub kind: Kind,
}

impl Bar {
    /// Whether all of `[at, at + len)` is memory of this BAR.
    pub fn has(&self, at: u64, len: u64) -> bool {
        self.kind != Kind::Io
            && at
                .checked_sub(self.base)
                .and_then(|off| off.checked_add(len))
                .is_some_and(|end| end <= self.len)
    }
}
