//! The userland half of the VMM: one thread a vCPU that loops on `VM_RUN`,
//! and the devices that the kernel does not emulate.
//!
//! A guest is hostile: nothing here indexes, unwraps or asserts on what it
//! wrote. Devices see the VM through [`machine::Machine`] only, so all of
//! them run under `cargo test` without a kernel.
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

pub mod ahci;
pub mod bhyvectl;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod config;
pub mod dbgport;
pub mod disk;
pub mod ending;
pub mod firmware;
pub mod i8042;
pub mod legacy;
pub mod machine;
pub mod mmio;
pub mod net;
pub mod nvme;
pub mod pause;
pub mod pci;
pub mod pm;
pub mod sandbox;
pub mod serial;
pub mod signals;
pub mod stats;
pub mod status;
pub mod tables;
pub mod testdev;
pub mod vcpu;
pub mod virtio;
pub mod vm;

/// Locks a mutex; a thread that panicked while it held it leaves the data as
/// it was, which for device registers is no worse than any guest write.
pub(crate) fn lock<T: ?Sized>(m: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
