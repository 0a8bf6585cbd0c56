//! What of the kernel piece is linked into `vmm.ko`: all of `vmm-kmod`.
//!
//! A crate by itself, as everything is compiled for size, but where a function says that it is for
//! speed; and how far those are inlined into each other is up to the
//! optimization level of the crate that is linked last.
#![no_std]
#![forbid(unsafe_code)]

pub use vmm_kmod::*;
