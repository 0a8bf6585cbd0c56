//! PCI: configuration space by ports 0xcf8/0xcfc and by ECAM, BARs, INTx, MSI
//! and MSI-X. A device implements [`PciDevice`]; everything a specification
//! says of all devices is in [`function`].

pub mod bar;
pub mod bridge;
pub mod catalog;
pub mod config;
pub mod function;
pub mod intx;
pub mod lpc;
pub mod msi;
pub mod passthru;
mod rom;
pub mod root;

/// Bus, slot and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bdf {
    /// 0 to 255.
    pub bus: u8,
    /// 0 to 31.
    pub slot: u8,
    /// 0 to 7.
    pub func: u8,
}

impl std::fmt::Display for Bdf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.bus, self.slot, self.func)
    }
}

/// First address of the memory-mapped configuration space (ECAM), 1 MiB a bus.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Its size: 256 buses.
pub const ECAM_SIZE: u64 = 256 << 20;
/// End of the 32-bit window for BARs; it starts where low memory may end.
pub const MEM32_LIMIT: u64 = ECAM_BASE;
/// The 64-bit window for BARs.
pub const MEM64_BASE: u64 = 0xd0_0000_0000;
/// End of it.
pub const MEM64_LIMIT: u64 = 0xfd_0000_0000;
/// Ports for BARs.
pub const IO_BASE: u32 = 0x2000;
/// End of them.
pub const IO_LIMIT: u32 = 0x1_0000;

/// What a device adds to the common behaviour of a PCI function.
pub trait PciDevice: Send + Sync {
    /// A read of BAR `bar` at `offset` within it. Sizes are 1, 2, 4 bytes (8 is
    /// split in two).
    fn bar_read(&self, function: &function::PciFunction, bar: usize, offset: u64, size: u8) -> u64;
    /// A write.
    fn bar_write(
        &self,
        function: &function::PciFunction,
        bar: usize,
        offset: u64,
        size: u8,
        value: u64,
    );
    /// A read of configuration space that somebody else than `config` answers.
    /// Called with the function locked.
    fn config_read(&self, _config: &config::Config, _offset: u16, _size: u8) -> Option<u32> {
        None
    }
    /// A write to configuration space that is the device's own business; true
    /// if it was dealt with.
    fn config_write(
        &self,
        _config: &mut config::Config,
        _offset: u16,
        _size: u8,
        _value: u32,
    ) -> bool {
        false
    }
    /// The function is on its bus: what a device needs that sends interrupts on
    /// its own account. To be kept as a `Weak`: the function owns the device.
    fn attached(&self, _function: &std::sync::Arc<function::PciFunction>) {}
    /// A BAR is at `addr` from now on, or nowhere. Called with the function
    /// locked.
    fn bar_moved(&self, _bar: usize, _addr: Option<u64>, _machine: &dyn crate::machine::Machine) {}
    /// What the device shows in ACPI's namespace below its root bridge.
    fn aml(&self, _at: Bdf, _sink: &mut Vec<u8>) {}
}
