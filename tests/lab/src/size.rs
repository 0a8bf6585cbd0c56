//! What the things that are installed may weigh.

use crate::command::output;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Bytes of a stripped module; FreeBSD's own has 177 KiB.
const MODULE: u64 = 300 * 1024;
/// Bytes of bss of a module; FreeBSD's own has 5.3 MB.
const BSS: u64 = 100 * 1024;
/// Bytes of bhyve, stripped; FreeBSD's own has 1.4 MB.
const BHYVE: u64 = 4 << 20;

/// Checks a module against its bars.
///
/// # Errors
/// It is larger, or no such file.
pub fn module(file: &Path) -> Result<()> {
    let stripped = stripped(file)?;
    let text = output(Command::new("size").arg(&stripped.0))?;
    let bss: u64 = text
        .lines()
        .nth(1)
        .and_then(|l| l.split_whitespace().nth(2))
        .and_then(|n| n.parse().ok())
        .with_context(|| format!("size says:\n{text}"))?;
    within(file, "stripped", stripped.bytes()?, MODULE)?;
    within(file, "of bss", bss, BSS)
}

/// Checks bhyve against its bar.
///
/// # Errors
/// It is larger, or no such file.
pub fn bhyve(file: &Path) -> Result<()> {
    within(file, "stripped", stripped(file)?.bytes()?, BHYVE)
}

fn within(file: &Path, what: &str, bytes: u64, bar: u64) -> Result<()> {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    println!("{name}: {bytes} bytes {what} (at most {bar})");
    ensure!(
        bytes <= bar,
        "{} has {bytes} bytes {what}, more than {bar}",
        file.display()
    );
    Ok(())
}

/// A copy, gone with this.
struct Stripped(std::path::PathBuf);

impl Stripped {
    fn bytes(&self) -> Result<u64> {
        Ok(fs::metadata(&self.0)?.len())
    }
}

impl Drop for Stripped {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn stripped(file: &Path) -> Result<Stripped> {
    let copy = file.with_extension(format!("stripped-{}", std::process::id()));
    let copy = Stripped(copy);
    output(
        Command::new("strip")
            .arg("--strip-unneeded")
            .arg("-o")
            .arg(&copy.0)
            .arg(file),
    )?;
    Ok(copy)
}
