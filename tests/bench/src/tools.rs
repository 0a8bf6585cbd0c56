//! Programs of the benchmark's own: what runs in the host, and the meter that
//! runs in the guest.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use lab::command::output;
use lab::dirs::Dirs;
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
        let out =
            lab::programs::static_programs(dirs, &["bench-tools"], &["kvm-monitor", "first-exit"])?;
        let dir = dirs.fresh("meter")?;
        let meter = dir.join("meter");
        output(
            Command::new("gcc")
                .args(["-static", "-O2", "-Wall", "-o"])
                .arg(&meter)
                .arg(dirs.root.join("tests/bench/guest/meter.c")),
        )?;
        output(Command::new("strip").arg(&meter))?;
        fs::metadata(&meter)?;
        Ok(Tools {
            kvm_monitor: out.join("kvm-monitor"),
            first_exit: out.join("first-exit"),
            meter,
        })
    })
}
