//! Programs of the benchmark's own: what runs in the host, and the meter that
//! runs in the guest.

use std::path::PathBuf;

use anyhow::Result;
use lab::dirs::Dirs;
use lab::meter;
use lab::progress::step;

/// Paths of static programs.
#[derive(Clone, Debug)]
pub struct Tools {
    /// bhyve's devices on KVM.
    pub kvm_monitor: PathBuf,
    /// Times a VM's first exit.
    pub first_exit: PathBuf,
    /// Counts ticks around work, in the guest.
    pub meter: PathBuf,
}

/// Builds them.
///
/// # Errors
/// A compiler fails.
pub fn build(dirs: &Dirs) -> Result<Tools> {
    step("the benchmark's programs", || {
        let monitor = "kvm-monitor";
        let out = lab::programs::static_programs(dirs, &["bench-tools"], &[monitor])?;
        Ok(Tools {
            kvm_monitor: out.join(monitor),
            first_exit: lab::first_exit::build(dirs)?,
            meter: meter::build(dirs)?,
        })
    })
}
