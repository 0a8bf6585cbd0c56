//! Intel VT-x.

pub mod apicv;
pub mod caps;
pub mod cr;
pub mod dump;
pub mod enable;
pub mod entry;
pub mod exit;
pub mod fields;
pub mod host_state;
pub mod inject;
pub mod instr;
pub mod msrbitmap;
pub mod setup;
pub mod state;
pub mod vcpu;
mod virtual_cpu;
pub mod vpid;

pub use caps::{Capabilities, Features, Missing};
pub use enable::{Backend, EnableError};
pub use vcpu::Vcpu;

/// CPUID says that there is VT-x.
pub fn present() -> bool {
    instr::cpuid(1, 0)[2] & (1 << 5) != 0
}
