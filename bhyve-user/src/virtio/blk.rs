//! virtio-blk: a disk (virtio 1.2 §5.2).
//!
//! [`options`] is the command line, [`request`] what the guest asks, [`device`]
//! the answer; the host's side is [`crate::disk`].

pub mod device;
pub mod options;
pub mod request;

use super::{Built, Group};

/// A disk, as the options ask for it, for a machine of `cpus` vCPUs.
///
/// # Errors
/// What is wrong with the options or the disk.
pub fn build(conf: &str, cpus: u32) -> Result<Built, String> {
    let options: options::Options = conf.parse()?;
    let (identity, queues) = device::Blk::open(&options, cpus)
        .map_err(|e| format!("{}: {e}", options.disk.path.display()))?;
    // A thread and a lock each: requests of different vCPUs do not wait for
    // each other.
    let groups = queues.into_iter().enumerate().map(|(n, blk)| Group {
        queues: vec![n],
        device: Box::new(blk),
    });
    Ok(Built {
        identity,
        groups: groups.collect(),
    })
}
