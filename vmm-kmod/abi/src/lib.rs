//! The ioctl interface of FreeBSD's vmm device, as facts: request numbers,
//! structures, exit codes and the names behind the numbers.
//!
//! The base is FreeBSD 12.1 (`machine/vmm.h`, `machine/vmm_dev.h`); what 13, 14
//! and 15 changed has its own size, hence its own request number, and stands
//! beside it. Numbers and layouts are the same on every host: Linux passes the
//! 32 bits of an ioctl request on unchanged, and none of them is taken by its
//! generic file layer.
//!
//! Structures are plain old data without hidden padding, so that copying one to
//! userland can leak nothing. Values that come from the other side are integers
//! here; [`names`] turns them into enums, fallibly. The C union of a VM exit
//! becomes a Rust enum in exactly one place, [`exit`].
#![no_std]
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

#[cfg(test)]
extern crate std;

pub mod errno;
pub mod exit;
pub mod ioccom;
pub mod layout;
pub mod limits;
pub mod names;
pub mod raw_exit;
pub mod request;

pub use errno::Errno;
pub use exit::{Exit, VmExit};
pub use names::{
    Capability, CpuMode, CpusetWhich, ExitCode, IntrTrigger, PagingMode, RegName, SuspendHow,
    TaskSwitchReason, X2apicState,
};
