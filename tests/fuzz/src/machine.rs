//! What devices are plugged into: a machine that only listens.

use bhyve::machine::{Machine, Suspend};

/// Takes every interrupt and does nothing.
pub struct Silent;

impl Machine for Silent {
    fn isa_assert(&self, _: u8, _: Option<u8>) {}
    fn isa_deassert(&self, _: u8, _: Option<u8>) {}
    fn isa_level_triggered(&self, _: u8) {}
    fn ioapic_assert(&self, _: u8) {}
    fn ioapic_deassert(&self, _: u8) {}
    fn msi(&self, _: u64, _: u64) {}
    fn suspend(&self, _: Suspend) {}
}
