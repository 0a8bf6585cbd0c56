//! What a VM's PCI functions see of its memory.

pub use crate::ppt::host::Domain;
