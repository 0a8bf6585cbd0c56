//! The committed numbers, and what has become worse than they are.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::results::{Column, Results, number};

/// Our numbers by name.
pub type Baseline = BTreeMap<String, f64>;

/// What a count may grow by before it counts as a regression.
pub const TOLERANCE: f64 = 0.02;

/// Reads a baseline.
///
/// # Errors
/// There is none, or it is damaged.
pub fn read(file: &Path) -> Result<Baseline> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("no baseline {}; --save makes one", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no baseline", file.display()))
}

/// Writes our column; what was not measured stays as it was.
///
/// # Errors
/// The file cannot be written.
pub fn save(file: &Path, results: &Results) -> Result<()> {
    let mut all = read(file).unwrap_or_default();
    for row in &results.rows {
        if let Some(value) = row.values.get(&Column::Ours) {
            all.insert(row.name.clone(), *value);
        }
    }
    let text = serde_json::to_string_pretty(&all)? + "\n";
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// What is worse than the baseline by more than [`TOLERANCE`], in words.
pub fn regressions(baseline: &Baseline, results: &Results) -> Vec<String> {
    results
        .rows
        .iter()
        .filter_map(|row| {
            let now = *row.values.get(&Column::Ours)?;
            let then = *baseline.get(&row.name)?;
            (now > then * (1.0 + TOLERANCE)).then(|| {
                format!(
                    "{}: {} {}, {:.1} % more than the baseline's {}",
                    row.what,
                    number(now),
                    row.unit,
                    (now / then - 1.0) * 100.0,
                    number(then)
                )
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(value: f64) -> Results {
        let mut results = Results::default();
        results.add(Column::Ours, "cpuid", "CPUID exit", "instructions", value);
        results
    }

    #[test]
    fn more_than_two_percent_is_a_regression() {
        let baseline = Baseline::from([("cpuid".to_owned(), 200.0)]);
        assert!(regressions(&baseline, &results(204.0)).is_empty());
        assert_eq!(
            regressions(&baseline, &results(205.0)),
            ["CPUID exit: 205 instructions, 2.5 % more than the baseline's 200"]
        );
        assert!(regressions(&Baseline::new(), &results(1e9)).is_empty());
    }
}
