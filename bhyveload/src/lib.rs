//! Kernel loading without a BIOS: a FreeBSD amd64 kernel with everything its own
//! boot loader would hand it ([`freebsd`]), a Linux bzImage by the 64-bit boot
//! protocol ([`linux`]), or a multiboot 1 kernel ([`multiboot`]). What FreeBSD's own
//! boot loader would have read from the guest's disk or folder is read by [`loader`].
//!
//! Every loader works on a [`target::LoadTarget`], which is a VM
//! ([`vm::VmTarget`]) or plain memory ([`target::MemoryTarget`], for tests).
//! Files come from whoever made the guest, so nothing in them is believed: each
//! offset, size and count is checked against the file and against guest memory,
//! and what does not fit is an [`error::LoadError`] naming the file and the field.
#![forbid(unsafe_code)]

pub mod bios;
pub mod cli;
pub mod conf;
pub mod console;
pub mod cpu;
pub mod disk;
pub mod disks;
pub mod elffile;
pub mod env;
pub mod error;
pub mod freebsd;
pub mod fs;
pub mod hostdir;
pub mod input;
pub mod kld;
pub mod kldmeta;
pub mod layout;
pub mod linkerhints;
pub mod linux;
pub mod loader;
pub mod multiboot;
pub mod opened;
pub mod partition;
pub mod preload;
pub mod target;
pub mod vm;
pub mod volume;
