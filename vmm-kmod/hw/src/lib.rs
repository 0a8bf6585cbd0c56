//! The CPU backends: everything that needs virtualization instructions,
//! privileged registers or page tables that the CPU walks.
//!
//! `vmx` drives VT-x and `svm` AMD-V, both behind the traits of `backend`;
//! `vtd` drives Intel's IOMMU and `amdvi` AMD's;
//! `ept` owns nested page tables, the IOMMU's too, in a format-generic way; `mitigation` decides what a CPU's vulnerabilities cost. Locks, ioctls and
//! the run loop belong to `vmm-kmod`.
//!
//! The crate also compiles for an ordinary target, so that its pure parts run
//! under `cargo test`.
#![no_std]
#![cfg_attr(target_os = "none", feature(optimize_attribute))]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic
    )
)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod amdvi;
pub mod backend;
pub mod cr;
pub mod ept;
pub mod error;
pub mod fpu;
pub mod instr;
pub mod mitigation;
pub mod msr;
pub mod nested;
pub mod page;
pub mod svm;
#[cfg(test)]
mod testhost;
pub mod vmx;
pub mod vtd;
