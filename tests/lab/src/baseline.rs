//! The committed counts of instructions, and what has become worse than they are.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Our numbers by name.
pub type Baseline = BTreeMap<String, f64>;

/// What a count may grow by before it counts as a regression.
pub const TOLERANCE: f64 = 0.02;

/// Where it is in a checkout.
pub fn file(root: &Path) -> PathBuf {
    root.join("tests/bench/baseline.json")
}

/// Reads a baseline.
///
/// # Errors
/// There is none, or it is damaged.
pub fn read(file: &Path) -> Result<Baseline> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("no baseline {}; --save makes one", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no baseline", file.display()))
}

/// How much worse a count is, in words, if it is by more than [`TOLERANCE`].
/// What the baseline does not have is never worse.
pub fn worse(baseline: &Baseline, name: &str, now: f64) -> Option<String> {
    let then = *baseline.get(name)?;
    (now > then * (1.0 + TOLERANCE)).then(|| {
        format!(
            "{name}: {now:.0}, {:.1} % more than the baseline's {then:.0}",
            (now / then - 1.0) * 100.0
        )
    })
}

/// Fails where one of these counts is worse than the baseline of the checkout
/// at `root`; `stage` is the benchmark's that counts them.
///
/// # Errors
/// One is, or there is no baseline.
pub fn check(root: &Path, stage: &str, counts: &[(&str, f64)]) -> Result<()> {
    let baseline = read(&file(root))?;
    let worse: Vec<String> = counts
        .iter()
        .filter_map(|(name, now)| worse(&baseline, name, *now))
        .collect();
    if worse.is_empty() {
        return Ok(());
    }
    bail!(
        "more instructions than tests/bench/baseline.json allows:\n  {}\n\
         If that is meant, `cargo xtask bench --columns ours --only {stage} --save` makes these the baseline.",
        worse.join("\n  ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_two_percent_is_a_regression() {
        let baseline = Baseline::from([("cpuid".to_owned(), 200.0)]);
        assert_eq!(worse(&baseline, "cpuid", 204.0), None);
        assert_eq!(worse(&baseline, "cpuid", 100.0), None);
        assert_eq!(
            worse(&baseline, "cpuid", 205.0).as_deref(),
            Some("cpuid: 205, 2.5 % more than the baseline's 200")
        );
        assert_eq!(worse(&Baseline::new(), "cpuid", 1e9), None);
    }

    #[test]
    fn a_regression_names_the_way_out() {
        let root = std::env::temp_dir().join(format!("baseline-{}", std::process::id()));
        fs::create_dir_all(root.join("tests/bench")).unwrap();
        fs::write(file(&root), "{\"out\": 1000.0}").unwrap();
        check(&root, "exits", &[("out", 1020.0), ("in", 5.0)]).unwrap();
        let said = check(&root, "exits", &[("out", 1021.0)]).unwrap_err();
        fs::remove_dir_all(&root).unwrap();
        let said = said.to_string();
        assert!(said.contains("out: 1021, 2.1 % more than the baseline's 1000"));
        assert!(said.contains("--only exits --save"), "{said}");
    }
}
