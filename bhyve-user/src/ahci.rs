//! An AHCI host bus adapter with disks and CD drives (Serial ATA AHCI 1.3.1,
//! ATA8-ACS, MMC): what installers and old guests drive without virtio.
//!
//! [`options`] is the command line; [`request`] what the guest wrote for a
//! disk, [`atapi`] for a drive; [`identify`] what they say of themselves;
//! [`media`] does the commands; [`port`] is a port with its thread; [`device`]
//! the adapter's registers. The host's side is
//! [`crate::disk`].

pub mod atapi;
pub mod device;
pub mod identify;
pub mod media;
pub mod options;
pub mod port;
pub mod request;

use vmmapi::GuestMemory;

use crate::pci::catalog::Plan;
use options::Kind;

/// An adapter with what `conf` lists; `only` is what `ahci-hd` and `ahci-cd`
/// are short for.
///
/// # Errors
/// What is wrong with the options or a disk.
pub fn build(
    conf: &str,
    only: Option<Kind>,
    name: &str,
    memory: &GuestMemory,
) -> Result<Plan, String> {
    let mut media = Vec::new();
    for (n, drive) in options::parse(conf, only)?.iter().enumerate() {
        let path = drive.disk.path.display();
        let open = media::Media::open(drive, n).map_err(|e| format!("{path}: {e}"))?;
        media.push(open);
    }
    device::Ahci::plan(name, media, memory).map_err(|e| e.to_string())
}
