//! The meter: counts time-stamp ticks around work in a Linux guest, or on the
//! bare emulator.

use crate::command::output;
use crate::dirs::Dirs;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

const SOURCE: &str = include_str!("../host/meter.c");

/// Builds it, static.
///
/// # Errors
/// The compiler fails.
pub fn build(dirs: &Dirs) -> Result<PathBuf> {
    let dir = dirs.fresh("meter")?;
    let source = dir.join("meter.c");
    fs::write(&source, SOURCE)?;
    let meter = dir.join("meter");
    output(
        Command::new("gcc")
            .args(["-static", "-O2", "-s", "-Wall", "-o"])
            .arg(&meter)
            .arg(&source),
    )?;
    Ok(meter)
}

/// What it counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// Ticks of one piece of work, on average.
    pub mean: f64,
    /// The fewest.
    pub least: f64,
}

/// The last reading in what it said.
///
/// # Errors
/// There is none.
pub fn reading(text: &str) -> Result<Reading> {
    let line = text
        .lines()
        .rev()
        .find_map(|l| l.trim().strip_prefix("meter "))
        .with_context(|| format!("the meter said:\n{text}"))?;
    let mut words = line.split_whitespace().skip(1);
    let mut number = || words.next().and_then(|w| w.parse::<f64>().ok());
    match (number(), number(), number()) {
        (Some(ticks), Some(count), Some(least)) if count > 0.0 => Ok(Reading {
            mean: ticks / count,
            least,
        }),
        _ => bail!("the meter said {line:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_meter_prints_is_understood() {
        let wanted = Reading {
            mean: 500.0,
            least: 480.0,
        };
        assert_eq!(reading("x\r\nmeter read 5000 10 480\r\n").unwrap(), wanted);
        assert!(reading("meter: /dev/vda: No such file").is_err());
    }
}
