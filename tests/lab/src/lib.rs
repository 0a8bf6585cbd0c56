//! The lab: builds a Linux host with our module and programs in it, starts it
//! in an emulator that has VT-x (Bochs) or AMD-V (QEMU), and talks to it.
//!
//! A [`machine::Machine`] is an emulator with two serial ports. A
//! [`host::Host`] is a machine in which our init obeys a shell line at a time
//! on COM1; COM2 carries the guest's console.
#![forbid(unsafe_code)]

pub mod apt;
pub mod baseline;
pub mod bochs;
pub mod busybox;
pub mod cases;
pub mod command;
pub mod console;
pub mod core_src;
pub mod cpio;
pub mod dirs;
pub mod exitcost;
pub mod first_exit;
pub mod freebsd_host;
pub mod guest;
pub mod host;
pub mod host_kernel;
pub mod images;
pub mod iso;
pub mod kmod;
pub mod kmod_freebsd;
pub mod machine;
pub mod meter;
pub mod nudge;
mod one_section;
pub mod programs;
pub mod programs_freebsd;
pub mod progress;
pub mod qemu;
pub mod report;
pub mod runner;
pub mod size;
pub mod stats;
pub mod ziglang;
