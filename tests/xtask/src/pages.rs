//! `cargo xtask man` and `cargo xtask completions`, and what other programs think
//! of what they write.

use anyhow::{Context, Result, bail};
use lab::command::output;
use lab::dirs::Dirs;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Debian packages that [`check`] needs.
pub const PACKAGES: [&str; 4] = ["mandoc", "zsh", "fish", "tcsh"];

/// Writes manual pages and completions; returns the folder with `man` and
/// `completions`.
///
/// # Errors
/// The compiler fails, or the sources do not fit the programs.
pub fn write(dirs: &Dirs) -> Result<PathBuf> {
    let into = dirs.target.join("pages");
    if into.exists() {
        fs::remove_dir_all(&into).with_context(|| format!("cannot clear {}", into.display()))?;
    }
    let mut cargo = Command::new("cargo");
    cargo.args(["run", "--quiet", "--package", "pages", "--"]);
    output(cargo.arg(&into).current_dir(&dirs.root))?;
    Ok(into)
}

/// The files below `folder`, in order.
///
/// # Errors
/// There is no such folder.
pub fn files(folder: &std::path::Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// mandoc finds nothing, and the shells take their completions.
///
/// # Errors
/// Somebody complains.
pub fn check(dirs: &Dirs) -> Result<()> {
    let pages = write(dirs)?;
    let mut complaints = Vec::new();
    for page in files(&pages.join("man"))? {
        let lint = Command::new("mandoc").arg("-Tlint").arg(&page).output()?;
        let said = String::from_utf8_lossy(&lint.stdout).into_owned();
        // This machine does not have FreeBSD's pages; a test looks after ours.
        let said = said
            .lines()
            .filter(|l| !l.contains("referenced manual not found"));
        complaints.extend(said.map(str::to_owned));
    }
    if !complaints.is_empty() {
        bail!("mandoc -Tlint:\n{}", complaints.join("\n"));
    }
    for (shell, option) in [
        ("bash", "-n"),
        ("zsh", "-n"),
        ("fish", "--no-execute"),
        ("tcsh", "-f"),
    ] {
        for file in files(&pages.join("completions").join(shell))? {
            output(Command::new(shell).arg(option).arg(&file))?;
        }
    }
    let script = pages.join("completions/fish/bhyvectl.fish");
    let ask = format!(
        "source {}; complete -C 'bhyvectl --force-'",
        script.display()
    );
    let said = output(Command::new("fish").args(["--no-config", "-c", &ask]))?;
    for option in ["--force-reset", "--force-poweroff"] {
        if !said.contains(option) {
            bail!("fish does not complete {option}; it says:\n{said}");
        }
    }
    Ok(())
}
