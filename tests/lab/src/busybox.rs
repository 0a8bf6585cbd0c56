//! A static busybox: the userland of hosts and Linux guests.

use crate::apt;
use crate::dirs::Dirs;
use crate::progress::step;
use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};

const PACKAGE: &str = "busybox-static";

/// The machine's own, or one extracted into the cache: installing the package
/// would remove `busybox`, which many machines have.
///
/// # Errors
/// apt fails.
pub fn ensure(dirs: &Dirs) -> Result<PathBuf> {
    let installed = Path::new("/bin/busybox");
    if apt::is_installed(PACKAGE) && installed.is_file() {
        return Ok(installed.to_owned());
    }
    let dir = dirs.cache.join("busybox");
    let program = dir.join("bin/busybox");
    if !program.is_file() {
        step("Debian's static busybox", || {
            if apt::extract(&[], &[PACKAGE], &dir).is_err() {
                // No package lists yet, or the mirror has moved on since.
                apt::update()?;
                apt::extract(&[], &[PACKAGE], &dir)?;
            }
            Ok(())
        })?;
    }
    ensure!(
        program.is_file(),
        "Debian's {PACKAGE} has no {}",
        program.display()
    );
    Ok(program)
}
