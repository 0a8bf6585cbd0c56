//! Our programs as static executables: the host has no libraries.

use crate::command::output;
use crate::dirs::Dirs;
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// The programs that go into the host.
pub const PROGRAMS: [&str; 3] = ["bhyve", "bhyvectl", "bhyveload"];

/// The packages that they are in. To name them keeps out what others of the
/// workspace want of the same libraries.
pub const PACKAGES: [&str; 2] = ["bhyve", "bhyveload"];

/// Builds [`PROGRAMS`] and returns their paths in that order.
///
/// # Errors
/// The compiler fails.
pub fn build(dirs: &Dirs) -> Result<Vec<PathBuf>> {
    let out = static_programs(dirs, &PACKAGES, &PROGRAMS)?;
    Ok(PROGRAMS.iter().map(|p| out.join(p)).collect())
}

/// Builds static programs of these packages, and returns the directory that
/// they are in.
///
/// # Errors
/// The compiler fails.
pub fn static_programs(dirs: &Dirs, packages: &[&str], programs: &[&str]) -> Result<PathBuf> {
    let musl = "x86_64-unknown-linux-musl";
    let gnu = "x86_64-unknown-linux-gnu";
    // rustup's musl target makes smaller programs; glibc does where it is not to be had.
    let have_musl = output(Command::new("rustup").args(["target", "add", musl])).is_ok();
    let target = if have_musl { musl } else { gnu };
    let mut cargo = Command::new("cargo");
    cargo
        .args(["build", "--release", "--target", target, "--target-dir"])
        .arg(dirs.target.join("static"))
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .current_dir(&dirs.root);
    for package in packages {
        cargo.args(["--package", package]);
    }
    for program in programs {
        cargo.args(["--bin", program]);
    }
    output(&mut cargo)?;
    Ok(dirs.target.join("static").join(target).join("release"))
}
