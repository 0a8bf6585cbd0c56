//! Programs of the benchmark's own: what runs in the host, and the meter that
//! runs in the guest.

use std::path::PathBuf;

use anyhow::Result;
use lab::dirs::Dirs;
use lab::progress::step;
use lab::{meter, programs};

/// Paths of static programs.
#[derive(Clone, Debug)]
pub struct Tools {
    /// bhyve's devices on KVM, where that is a column.
    pub kvm_monitor: Option<PathBuf>,
    /// Times a VM's first exit.
    pub first_exit: PathBuf,
    /// Counts ticks around work, in the guest.
    pub meter: PathBuf,
}

/// Builds them.
///
/// # Errors
/// A compiler fails.
pub fn build(dirs: &Dirs, kvm: bool) -> Result<Tools> {
    step("the benchmark's programs", || {
        let monitor = "kvm-monitor";
        let kvm_monitor = if kvm {
            Some(programs::static_programs(dirs, &["bench-tools"], &[monitor])?.join(monitor))
        } else {
            None
        };
        Ok(Tools {
            kvm_monitor,
            first_exit: lab::first_exit::build(dirs)?,
            meter: meter::build(dirs)?,
        })
    })
}
