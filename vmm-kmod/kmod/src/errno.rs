//! Error numbers: those that both hosts number alike, and those they do not.
#![allow(missing_docs)]

pub const EPERM: i32 = 1;
pub const ENOENT: i32 = 2;
pub const EINTR: i32 = 4;
pub const EIO: i32 = 5;
pub const ENXIO: i32 = 6;
pub const E2BIG: i32 = 7;
pub const ENOMEM: i32 = 12;
pub const EFAULT: i32 = 14;
pub const EBUSY: i32 = 16;
pub const EEXIST: i32 = 17;
pub const ENODEV: i32 = 19;
pub const EINVAL: i32 = 22;
pub const ENOTTY: i32 = 25;
pub const ENOSPC: i32 = 28;
pub const ERANGE: i32 = 34;

#[cfg(not(feature = "freebsd"))]
mod host {
    pub const ENAMETOOLONG: i32 = 36;
    pub const EOPNOTSUPP: i32 = 95;
    pub const EALREADY: i32 = 114;
}
#[cfg(feature = "freebsd")]
mod host {
    pub const EALREADY: i32 = 37;
    pub const EOPNOTSUPP: i32 = 45;
    pub const ENAMETOOLONG: i32 = 63;
}
pub use host::*;
