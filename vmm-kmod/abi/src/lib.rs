//! The ioctl interface of FreeBSD's vmm device.
#![no_std]
#![forbid(unsafe_code)]
