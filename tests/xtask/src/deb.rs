//! `cargo xtask deb`: Debian packages of the programs, and of the module with
//! DKMS. What needs Rust is compiled here; the user's machine compiles C.

use crate::pages;
use anyhow::{Context, Result};
use lab::command::output;
use lab::dirs::Dirs;
use lab::programs::PROGRAMS;
use lab::progress::step;
use lab::{apt, kmod};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian packages that the build needs.
const PACKAGES: [&str; 3] = ["debhelper", "dh-dkms", "fakeroot"];

/// Builds the packages and returns their paths.
///
/// # Errors
/// A compiler fails, or debhelper does.
pub fn build(dirs: &Dirs) -> Result<Vec<PathBuf>> {
    apt::ensure_installed(&PACKAGES)?;
    let out = dirs.target.join("deb");
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("cannot clear {}", out.display()))?;
    }
    let tree = out.join("bhyve-rs");
    let built = tree.join("built");
    copy(&dirs.root.join("packaging/debian"), &tree.join("debian"))?;
    copy(&pages::write(dirs)?, &built)?;
    step("programs", || programs(dirs, &built))?;
    let module = built.join("module");
    copy(&dirs.root.join("vmm-kmod/linux"), &module.join("linux"))?;
    fs::create_dir_all(module.join("kmod"))?;
    fs::copy(
        dirs.root.join("vmm-kmod/kmod/host.h"),
        module.join("kmod/host.h"),
    )?;
    let object = module.join("linux/vmm_rust.o_shipped");
    // For any kernel that DKMS may find.
    kmod::object(dirs, "kmod-ibt", &[], kmod::Branches::Checked, &object)?;
    output(Command::new("strip").arg("--strip-debug").arg(&object))?;
    step("packages", || {
        output(
            Command::new("dpkg-buildpackage")
                .args(["--build=binary", "--unsigned-source", "--unsigned-changes"])
                .env_remove("MAKEFLAGS")
                .env_remove("MAKELEVEL")
                .current_dir(&tree),
        )
    })?;
    let packages: Vec<PathBuf> = pages::files(&out)?
        .into_iter()
        .filter(|f| f.extension().is_some_and(|e| e == "deb"))
        .collect();
    Ok(packages)
}

/// The programs as Debian links programs, with its C library.
fn programs(dirs: &Dirs, into: &Path) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release"]).current_dir(&dirs.root);
    for program in PROGRAMS {
        cargo.args(["--bin", program]);
    }
    output(&mut cargo)?;
    for program in PROGRAMS {
        let from = dirs.target.join("release").join(program);
        fs::copy(&from, into.join(program)).with_context(|| format!("no {}", from.display()))?;
    }
    Ok(())
}

/// Copies a folder with all that is in it.
///
/// # Errors
/// There is no such folder, or no room.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("no {}", from.display()))? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), &to)
                .with_context(|| format!("cannot write {}", to.display()))?;
        }
    }
    Ok(())
}
