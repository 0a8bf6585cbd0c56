//! Host bridges: nothing but an identity that guests look for at slot 0.

use super::PciDevice;
use super::config::CAP_PCIE;
use super::function::{Blueprint, PciFunction};

/// A host bridge.
pub struct HostBridge;

/// `hostbridge` and `amd_hostbridge`.
pub fn plan(vendor: u16, device: u16) -> Blueprint {
    let mut plan = Blueprint::default();
    plan.config.identify(vendor, device, 6, 0);
    // A PCI Express capability, version 2, of a root port with a link of
    // 2.5 GT/s and one lane: guests use MSI only below PCI Express or
    // PCI 2.2 bridges.
    let mut body = [0; 58];
    body[0] = 0x42;
    body[10..12].copy_from_slice(&0x411_u16.to_le_bytes());
    body[16] = 0x11;
    plan.config.add_capability(CAP_PCIE, &body);
    plan
}

impl PciDevice for HostBridge {
    fn bar_read(&self, _: &PciFunction, _: usize, _: u64, _: u8) -> u64 {
        0
    }
    fn bar_write(&self, _: &PciFunction, _: usize, _: u64, _: u8, _: u64) {}
}
