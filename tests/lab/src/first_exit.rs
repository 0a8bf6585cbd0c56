//! From no VM to its first exit in userland: the program that times it, and what
//! it says.

use crate::bochs;
use crate::dirs::Dirs;
use crate::programs;
use anyhow::{Result, ensure};
use std::path::PathBuf;

const NAME: &str = "first-exit";

/// Builds it, static.
///
/// # Errors
/// The compiler fails.
pub fn build(dirs: &Dirs) -> Result<PathBuf> {
    Ok(programs::static_programs(dirs, &[NAME], &[NAME])?.join(NAME))
}

/// Instructions, in Bochs, of the VM that took the fewest. The first one also
/// brings the program's pages in, and the host's clock ticks in some.
///
/// # Errors
/// There was none.
pub fn instructions(text: &str) -> Result<f64> {
    let best = text
        .lines()
        .filter_map(|l| l.strip_prefix("first-exit ")?.trim().parse::<f64>().ok())
        .fold(f64::INFINITY, f64::min);
    ensure!(best.is_finite(), "no first exit in:\n{text}");
    // The host's clock is the counter, at a rate that the lab tells it.
    Ok(best * f64::from(bochs::IPS) / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fewest_count() {
        let text = "first-exit 9000000\nfirst-exit 7000000\n";
        assert_eq!(instructions(text).unwrap(), 350_000.0);
        assert!(instructions("first-exit: no /dev/vmm").is_err());
    }
}
