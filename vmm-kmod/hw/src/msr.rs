//! What MSRs may hold, whoever keeps them.

/// What became of a WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrWrite {
    /// Done.
    Done,
    /// The value is not allowed: #GP(0).
    Fault,
    /// Not an MSR that the backend keeps.
    NotHere,
}

/// Whether bits 63 to 47 are equal.
pub const fn canonical(addr: u64) -> bool {
    (addr as i64) << 16 >> 16 == addr as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses() {
        for a in [0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX] {
            assert!(canonical(a));
        }
        for a in [0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63] {
            assert!(!canonical(a));
        }
    }
}
