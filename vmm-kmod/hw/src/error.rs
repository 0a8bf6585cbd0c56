//! Errors that the boundary turns into an errno.

use core::fmt;

/// Why a backend operation could not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The host is out of memory (ENOMEM).
    NoMemory,
    /// An argument is out of range or unaligned (EINVAL).
    Invalid,
    /// The named range is already in use or wraps around (EINVAL).
    OutOfRange,
    /// No CPU could run the request: it is offline or VMX is off there
    /// (ENXIO).
    NoCpu,
    /// The CPU refused to load a VMCS; a VM-instruction error number
    /// (SDM Vol. 3C §30.4), 0 if it gave none (ENXIO).
    Vmcs(u32),
    /// The vCPU's state is still cached on another CPU: call
    /// `prepare_migration` with interrupts on, and try again (EAGAIN).
    NeedsMigration,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NoMemory => f.write_str("out of memory"),
            Error::Invalid => f.write_str("invalid or unaligned argument"),
            Error::OutOfRange => f.write_str("address range out of bounds"),
            Error::NoCpu => f.write_str("no CPU with VMX enabled could be used"),
            Error::Vmcs(n) => write!(f, "the CPU refused the VMCS (VM-instruction error {n})"),
            Error::NeedsMigration => f.write_str("vCPU state is cached on another CPU"),
        }
    }
}
