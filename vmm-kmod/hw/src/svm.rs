//! AMD's AMD-V with nested paging (APM Vol. 2 chapter 15).

pub mod asid;
pub mod avic;
pub mod caps;
pub mod dump;
pub mod enable;
pub mod entry;
pub mod exit;
pub mod host_state;
pub mod inject;
pub mod permission;
pub mod setup;
pub mod state;
pub mod vcpu;
mod virtual_cpu;
pub mod vmcb;

pub use caps::{Capabilities, Features, Missing};
pub use enable::{Backend, EnableError};
pub use vcpu::Vcpu;

/// CPUID says that there is AMD-V.
pub fn present() -> bool {
    let [max, ..] = crate::instr::cpuid(0x8000_0000, 0);
    max >= 0x8000_000a && crate::instr::cpuid(0x8000_0001, 0)[2] & (1 << 2) != 0
}
