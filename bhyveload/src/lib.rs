//! Kernel loading without a BIOS.
#![forbid(unsafe_code)]
