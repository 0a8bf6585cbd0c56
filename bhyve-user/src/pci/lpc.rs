//! The LPC bridge: PIRQ registers in its configuration space, and the legacy
//! devices that ACPI's namespace shows below it.

use std::sync::Arc;

use super::config::Config;
use super::function::{Blueprint, PciFunction};
use super::intx::Router;
use super::{Bdf, PciDevice};
use crate::tables::dsdt;

/// The bridge.
pub struct Lpc {
    router: Arc<Router>,
}

/// The link whose register is at `offset`.
fn link_at(offset: u16) -> Option<u8> {
    match offset {
        0x60..=0x63 => Some((offset - 0x60) as u8),
        0x68..=0x6b => Some((offset - 0x68) as u8 + 4),
        _ => None,
    }
}

impl Lpc {
    /// `lpc`; routes are read when the guest may first see them.
    pub fn new(router: Arc<Router>) -> (Blueprint, Lpc) {
        let mut plan = Blueprint::default();
        plan.config.identify(0x8086, 0x7000, 6, 1);
        for (offset, link) in (0x60..0x6c).filter_map(|o| link_at(o).map(|l| (o, l))) {
            plan.config.set8(offset, router.read(link));
        }
        (plan, Lpc { router })
    }
}

impl PciDevice for Lpc {
    fn bar_read(&self, _: &PciFunction, _: usize, _: u64, _: u8) -> u64 {
        0
    }
    fn bar_write(&self, _: &PciFunction, _: usize, _: u64, _: u8, _: u64) {}

    fn config_write(&self, config: &mut Config, offset: u16, size: u8, value: u32) -> bool {
        let links = (offset..).zip(value.to_le_bytes()).take(usize::from(size));
        let mut mine = false;
        for (at, byte) in links {
            if let Some(link) = link_at(at) {
                self.router.write(link, byte);
                config.set8(at, self.router.read(link));
                mine = true;
            }
        }
        mine
    }

    fn aml(&self, at: Bdf, sink: &mut Vec<u8>) {
        dsdt::isa_bridge(at, sink);
    }
}
