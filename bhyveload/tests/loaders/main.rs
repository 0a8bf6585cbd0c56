//! Whole images through each loader into plain memory, read back as the guest reads it.
#![forbid(unsafe_code)]

mod bad;
mod build;
mod freebsd;
mod linux;
mod multiboot;
mod mutated;
