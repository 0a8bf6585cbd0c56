//! Zig's C compiler with FreeBSD's headers and libraries, from the PyPI package
//! `ziglang`: what cross-compiles for FreeBSD where there is no FreeBSD.

use crate::apt;
use crate::command::output;
use crate::dirs::Dirs;
use crate::progress::step;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version whose headers the FreeBSD sources are known to compile with.
pub const VERSION: &str = "0.17.1";

/// The compiler.
#[derive(Debug, Clone)]
pub struct Zig {
    /// The program.
    pub program: PathBuf,
    cache: PathBuf,
}

impl Zig {
    /// `zig ARGS...`, with its caches in the target directory.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut zig = Command::new(&self.program);
        zig.args(args)
            .env("ZIG_GLOBAL_CACHE_DIR", &self.cache)
            .env("ZIG_LOCAL_CACHE_DIR", &self.cache);
        zig
    }

    /// The directory of headers `name` (`libc/include/any-freebsd-any`).
    #[must_use]
    pub fn library(&self, name: &str) -> PathBuf {
        self.program.with_file_name("lib").join(name)
    }
}

/// Finds the compiler in the cache, or installs it there (an unpacked package of
/// about 400 MB, once).
///
/// # Errors
/// PyPI cannot be reached, or pip is neither there nor to be had.
pub fn ensure(dirs: &Dirs) -> Result<Zig> {
    let home = dirs.cache.join(format!("ziglang-{VERSION}"));
    let zig = Zig {
        program: home.join("ziglang/zig"),
        cache: dirs.target.join("zig-cache"),
    };
    if !zig.program.exists() {
        step(&format!("ziglang {VERSION} from PyPI"), || install(&home))?;
    }
    Ok(zig)
}

fn install(home: &Path) -> Result<()> {
    let python = pip()?;
    let fresh = home.with_extension("partial");
    if fresh.exists() {
        fs::remove_dir_all(&fresh)?;
    }
    output(
        Command::new(python)
            .args(["-m", "pip", "install", "--quiet", "--quiet", "--no-deps"])
            .args(["--no-compile", "--no-cache-dir", "--target"])
            .arg(&fresh)
            .arg(format!("ziglang=={VERSION}")),
    )
    .with_context(|| format!("ziglang {VERSION} cannot be had from PyPI"))?;
    // Whoever was faster has installed the same.
    if fs::rename(&fresh, home).is_err() {
        fs::remove_dir_all(&fresh)?;
    }
    Ok(())
}

/// A Python that has pip.
fn pip() -> Result<&'static str> {
    let works =
        |python: &str| output(Command::new(python).args(["-m", "pip", "--version"])).is_ok();
    if works("python3") {
        return Ok("python3");
    }
    let debian = "/usr/bin/python3";
    if !works(debian) {
        apt::ensure_installed(&["python3-pip"])?;
    }
    Ok(debian)
}
