//! virtio-blk: a disk (virtio 1.2 §5.2).
//!
//! [`options`] is the command line, [`backend`] the host's file or device,
//! [`request`] what the guest asks, [`device`] the answer.

pub mod backend;
pub mod device;
pub mod options;
pub mod request;

/// Bytes of a sector, the unit of the protocol whatever the disk's block size.
pub const SECTOR: u64 = 512;
