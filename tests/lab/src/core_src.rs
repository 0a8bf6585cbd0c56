//! Sources of `core` for `-Zbuild-std`: the kernel's code model, and no SSE,
//! rule out every prebuilt `core`.
//!
//! They come with rustup's component `rust-src` where it can be had; otherwise
//! from Debian's package of the same name, in exactly the compiler's version.

use crate::apt::PrivateApt;
use crate::command::output;
use crate::dirs::Dirs;
use crate::progress::step;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the sources are.
#[derive(Debug, Clone)]
pub enum CoreSource {
    /// In the toolchain, where cargo looks by itself.
    Sysroot,
    /// In this `library` directory.
    Directory(PathBuf),
}

/// Finds the sources of core, fetching them where they are not there.
///
/// # Errors
/// Neither rustup nor Debian has the sources of this compiler's version.
pub fn ensure(dirs: &Dirs) -> Result<CoreSource> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    let in_sysroot = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library");
    let complete = |library: &Path| {
        library.join("core/src/lib.rs").is_file() && library.join("Cargo.lock").is_file()
    };
    // For trying the second way on a machine that has the first.
    let only_debian = std::env::var_os("BHYVE_RS_CORE_FROM_DEBIAN").is_some();
    if !only_debian {
        if complete(&in_sysroot) {
            return Ok(CoreSource::Sysroot);
        }
        let added = step("sources of core from rustup", || {
            output(Command::new("rustup").args(["component", "add", "rust-src"]))
        });
        if added.is_ok() && complete(&in_sysroot) {
            return Ok(CoreSource::Sysroot);
        }
    }
    let version = rustc_version()?;
    let dir = dirs.cache.join("rust-src").join(&version);
    let library = dir.join(format!("usr/src/rustc-{version}/library"));
    if !complete(&library) {
        step("sources of core from Debian", || {
            from_debian(dirs, &version, &dir)
        })?;
    }
    if !complete(&library) {
        bail!("Debian's rust-src {version} has no {}", library.display());
    }
    Ok(CoreSource::Directory(library))
}

fn from_debian(dirs: &Dirs, version: &str, into: &Path) -> Result<()> {
    let apt = PrivateApt::new(
        &dirs.cache.join("apt"),
        &["trixie-backports", "trixie", "sid"],
    )?;
    let versions = apt.versions("rust-src")?;
    let wanted = versions
        .iter()
        .find(|v| {
            v.strip_prefix(version)
                .is_some_and(|rest| rest.starts_with(['+', '-']))
        })
        .with_context(|| {
            format!(
                "the kernel module needs the sources of core {version}: `rustup component add rust-src` \
                 gave none, and Debian has rust-src {}",
                versions.join(", ")
            )
        })?;
    if into.exists() {
        fs::remove_dir_all(into)?;
    }
    fs::create_dir_all(into)?;
    apt.extract(&[&format!("rust-src={wanted}")], into)
}

/// The compiler's version, like `1.95.0`.
///
/// # Errors
/// There is no rustc.
pub fn rustc_version() -> Result<String> {
    let text = output(Command::new("rustc").arg("-vV"))?;
    text.lines()
        .find_map(|l| l.strip_prefix("release: "))
        .map(str::to_owned)
        .context("rustc -vV names no release")
}

/// Sets up `cargo` to compile for a kernel: code model, no red zone, no
/// relocation that a module loader does not take.
///
/// `relro-level=off` keeps GOTPCREL relocations away; `Zbuild-std` needs
/// `RUSTC_BOOTSTRAP` on a stable compiler. `more` are flags of the compiler's besides.
pub fn kernel_cargo_env(cargo: &mut Command, source: &CoreSource, more: &str) {
    let flags = "-C code-model=kernel -C no-redzone=yes -C relro-level=off \
                 -C force-frame-pointers=yes";
    cargo
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", format!("{flags} {more}"))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET");
    if let CoreSource::Directory(library) = source {
        cargo.env("__CARGO_TESTS_ONLY_SRC_ROOT", library);
    }
}

/// Cargo arguments that go with [`kernel_cargo_env`].
pub const KERNEL_CARGO_ARGS: [&str; 3] = [
    "-Zbuild-std=core,alloc,compiler_builtins",
    "--target",
    "x86_64-unknown-none",
];
