//! The portable half of the kernel piece: everything that needs neither the
//! CPU's virtualization instructions nor a particular host kernel.
//!
//! State machines here are "sans-IO": they are handed the time and a sink for
//! interrupts, own no lock and start no timer, so the same code runs under
//! `cargo test`. `vmm-hw` drives the CPU, `vmm-kmod` owns locks and timers.
#![no_std]
#![cfg_attr(target_os = "none", feature(optimize_attribute))]
#![forbid(unsafe_code)]
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

pub mod apicbus;
pub mod atpic;
pub mod atpit;
pub mod chipset;
pub mod cpu;
pub mod cpuid;
pub mod haltpoll;
pub mod host;
pub mod hpet;
pub mod inst;
pub mod intinfo;
pub mod ioapic;
pub mod iommu;
pub mod lapic;
pub mod msr;
pub mod paging;
pub mod pmtmr;
pub mod pv;
pub mod rtc;
pub mod stats;
pub mod text;
pub mod time;
