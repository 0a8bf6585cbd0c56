//! The machine-readable account of one guest's run.

use crate::stats::{self, Stats};
use anyhow::{Context, Result};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Host's and guest's instructions, less idle time.
#[derive(Debug, Clone, Copy)]
pub struct Instructions {
    /// From before bhyveload until bhyve's end (or the stop).
    pub all: u64,
    /// Of these, bhyveload's.
    pub bhyveload: u64,
}

/// What a run was and what it cost.
#[derive(Debug, Clone)]
pub struct Report {
    /// `bochs`, `kvm` or `qemu`.
    pub engine: String,
    /// The host's kernel release.
    pub host: String,
    /// The guest's kernel file.
    pub guest: String,
    /// The guest's vCPUs.
    pub vcpus: u32,
    /// The guest's memory in MiB.
    pub memory_mib: u32,
    /// What was executed, where the engine counts it.
    pub instructions: Option<Instructions>,
    /// Real seconds of the same span.
    pub seconds: f64,
    /// `bhyvectl --get-stats` at the end.
    pub stats: Stats,
    /// What bhyve itself counted (`--exit-stats`), where it has ended by itself.
    pub userland: Option<serde_json::Value>,
    /// The guest's console log.
    pub output: PathBuf,
}

impl Report {
    /// Writes the report as JSON.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let counted = |key: &str| self.userland.as_ref().and_then(|u| u.get(key).cloned());
        let userland_exits = counted("userland_exits")
            .or_else(|| stats::userland_exits(&self.stats).map(Into::into));
        let value = json!({
            "engine": self.engine,
            "host": self.host,
            "guest": self.guest,
            "vcpus": self.vcpus,
            "memory_mib": self.memory_mib,
            "instructions": self.instructions.map(|i| i.all),
            "instructions_bhyveload": self.instructions.map(|i| i.bhyveload),
            "seconds": self.seconds,
            "exits": stats::exits(&self.stats),
            "userland_exits": userland_exits,
            "userland_exits_by_kind": counted("exits"),
            "userland_exits_by_port": counted("ports"),
            "output": self.output,
            "statistics": self.stats,
        });
        let text = serde_json::to_string_pretty(&value)? + "\n";
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
    }
}
