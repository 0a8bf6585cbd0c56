//! Disks, whatever a guest sees them as: [`options`] is what every emulation of
//! one takes, [`backend`] the host's file or device. virtio-blk, NVMe and AHCI
//! stand on it.

pub mod backend;
pub mod options;
#[cfg(test)]
pub(crate) mod rig;

/// Bytes of the unit in which sizes are counted, whatever a disk's block size.
pub const SECTOR: u64 = 512;

/// A serial number that is the same each time for the same path, in the shape
/// that bhyve gives it. FNV-1a, of which 48 bits are used.
pub fn serial_of(path: &[u8]) -> String {
    let hash = path.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    format!(
        "BHYVE-{:04X}-{:04X}-{:04X}",
        hash >> 48,
        hash >> 32 & 0xffff,
        hash >> 16 & 0xffff
    )
}
