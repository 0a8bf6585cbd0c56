//! How the guest's control registers become the CPU's (SDM Vol. 3C §23.8).

use super::caps::Capabilities;
use vmm_core::cpu::{CR0_PE, CR0_PG, CR4_PAE};

pub use crate::cr::*;

/// CR0 bits that the guest changes without an exit: nothing but its own
/// execution depends on them.
pub const CR0_GUEST_OWNED: u64 = CR0_MP | CR0_EM | CR0_TS | CR0_WP | CR0_AM;
/// CR4 bits that the guest changes without an exit: VME, PVI, TSD, DE, PSE,
/// PGE, PCE, OSFXSR, OSXMMEXCPT.
pub const CR4_GUEST_OWNED: u64 = 0x79f & !CR4_PAE & !CR4_MCE;

impl Capabilities {
    /// The CR0 that the CPU gets for a guest's CR0. Caches stay on: memory
    /// types come from EPT. PE and PG are free under unrestricted guest.
    pub const fn real_cr0(&self, guest: u64) -> u64 {
        let must = self.cr0_fixed0 & !(CR0_PE | CR0_PG);
        (guest | must | CR0_ET | CR0_NE) & self.cr0_fixed1 & CR0_DEFINED & !(CR0_CD | CR0_NW)
    }

    /// The CR4 that the CPU gets for a guest's CR4. MCE stays on, or a
    /// machine check in the guest would shut the machine down.
    pub const fn real_cr4(&self, guest: u64) -> u64 {
        (guest | self.cr4_fixed0 | CR4_VMXE | CR4_MCE) & self.cr4_fixed1
    }
}
