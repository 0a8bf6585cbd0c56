//! What a PC's firmware would have left in memory: MP table, SMBIOS, ACPI.

pub mod acpi;
pub mod dsdt;
pub mod mptable;
pub mod smbios;

/// MP floating pointer and table.
pub const MPTABLE_BASE: u64 = 0xf_0000;
/// SMBIOS entry point and structures.
pub const SMBIOS_BASE: u64 = 0xf_1000;
/// RSDP and the tables behind it, up to 1 MiB.
pub const ACPI_BASE: u64 = 0xf_2400;
/// End of the room for all of them.
pub const END: u64 = 0x10_0000;

/// The local APICs' page.
pub const LAPIC: u32 = 0xfee0_0000;
/// The I/O APIC's registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The HPET's registers.
pub const HPET: u32 = 0xfed0_0000;

/// A table does not fit where guests look for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {0} needs {1} bytes and has {2}: too many CPUs or devices")]
pub struct TooLarge(pub &'static str, pub usize, pub usize);

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |s, b| s.wrapping_add(*b))
        .wrapping_neg()
}

/// Sets the byte at `at` so that all bytes sum to zero.
fn seal(bytes: &mut [u8], at: usize) {
    if let Some(b) = bytes.get_mut(at) {
        *b = 0;
    }
    let sum = checksum(bytes);
    if let Some(b) = bytes.get_mut(at) {
        *b = sum;
    }
}
