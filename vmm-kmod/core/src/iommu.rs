//! What the host's firmware and its PCI functions say of IOMMUs: the tables that
//! name the units, and which functions can reach each other without asking one.

pub mod acpi_table;
pub mod acs;
pub mod dmar;
pub mod ivrs;
pub mod pci;
