//! What the committed baseline makes of a run.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use lab::baseline::{Baseline, read, worse};

use crate::results::{Column, Results};

/// Whether the clocks of guest and host have a say in it: not for a baseline. Every
/// third ping or so has a tick in it, which is a third of what it takes.
fn varies(name: &str) -> bool {
    const STARTS: [&str; 4] = ["boot_exits_", "exit_hlt_", "idle", "net_send"];
    STARTS.iter().any(|s| name.starts_with(s))
        || name.starts_with("net_ping") && !name.ends_with("_least")
}

/// Writes our column; what was not measured stays as it was.
///
/// # Errors
/// The file cannot be written.
pub fn save(file: &Path, results: &Results) -> Result<()> {
    let mut all = read(file).unwrap_or_default();
    for row in results.rows.iter().filter(|r| !varies(&r.name)) {
        if let Some(value) = row.values.get(&Column::Ours) {
            all.insert(row.name.clone(), *value);
        }
    }
    let text = serde_json::to_string_pretty(&all)? + "\n";
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// What is worse than the baseline, in words.
pub fn regressions(baseline: &Baseline, results: &Results) -> Vec<String> {
    results
        .rows
        .iter()
        .filter(|row| !varies(&row.name))
        .filter_map(|row| worse(baseline, &row.name, *row.values.get(&Column::Ours)?))
        .collect()
}
