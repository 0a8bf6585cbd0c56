//! virtio-blk: a disk (virtio 1.2 §5.2).
//!
//! [`options`] is the command line, [`backend`] the host's file or device,
//! [`request`] what the guest asks, [`device`] the answer.

pub mod backend;
pub mod device;
pub mod options;
pub mod request;

use super::Built;

/// A disk, as the options ask for it.
///
/// # Errors
/// What is wrong with the options or the disk.
pub fn build(conf: &str) -> Result<Built, String> {
    let options: options::Options = conf.parse()?;
    let (identity, blk) =
        device::Blk::open(&options).map_err(|e| format!("{}: {e}", options.path.display()))?;
    Ok(Built::single(identity, blk))
}

/// Bytes of a sector, the unit of the protocol whatever the disk's block size.
pub const SECTOR: u64 = 512;
