//! Our programs for FreeBSD/amd64, built on Linux.
//!
//! With a *sysroot* (an installed FreeBSD's `/usr/include` and `/usr/lib`, as in
//! its `base.txz`) they are static and run on that release and later ones.
//! Without one they are linked against the libraries that ziglang carries, which
//! are those of FreeBSD 14 and later.

use crate::command::output;
use crate::core_src::CoreSource;
use crate::dirs::Dirs;
use crate::programs::{self, PROGRAMS};
use crate::{apt, core_src, ziglang};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-freebsd";

/// Debian packages that this needs besides cargo.
const PACKAGES: [&str; 3] = ["binutils", "clang-14", "lld-14"];

/// Builds [`PROGRAMS`] and returns their paths in that order.
///
/// # Errors
/// `sysroot` is none, ziglang cannot be had, or the compiler or linker fails.
pub fn build(dirs: &Dirs, sysroot: Option<&Path>) -> Result<Vec<PathBuf>> {
    build_as(dirs, sysroot, "release")
}

/// Compiles and links [`PROGRAMS`] quickly, to see that it can be done.
///
/// # Errors
/// As [`build`].
pub fn check(dirs: &Dirs) -> Result<()> {
    build_as(dirs, None, "dev").map(drop)
}

fn build_as(dirs: &Dirs, sysroot: Option<&Path>, profile: &str) -> Result<Vec<PathBuf>> {
    let source = core_src::ensure(dirs)?;
    let kind = if sysroot.is_some() {
        "static"
    } else {
        "dynamic"
    };
    let into = dirs.target.join(format!("freebsd-{kind}"));
    fs::create_dir_all(&into)?;
    let linker = into.join("cc");
    let script = match sysroot {
        Some(sysroot) => {
            apt::ensure_installed(&PACKAGES)?;
            of_sysroot(sysroot)?
        }
        None => of_zig(&ziglang::ensure(dirs)?, dirs),
    };
    fs::write(&linker, script)?;
    fs::set_permissions(&linker, fs::Permissions::from_mode(0o755))?;
    let mut cargo = Command::new("cargo");
    cargo
        .args(["build", "--profile", profile, "-Zbuild-std=std,panic_abort"])
        .args(["--config", "profile.dev.debug=false"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&into)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_X86_64_UNKNOWN_FREEBSD_LINKER", &linker)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .current_dir(&dirs.root);
    if sysroot.is_some() {
        cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    }
    if let CoreSource::Directory(library) = &source {
        cargo.env("__CARGO_TESTS_ONLY_SRC_ROOT", library);
    }
    for package in programs::PACKAGES {
        cargo.args(["--package", package]);
    }
    for program in PROGRAMS {
        cargo.args(["--bin", program]);
    }
    output(&mut cargo)?;
    let folder = if profile == "dev" { "debug" } else { profile };
    let out = into.join(TARGET).join(folder);
    Ok(PROGRAMS.iter().map(|p| out.join(p)).collect())
}

/// A linker for cargo: clang with the libraries of a sysroot. The `libc` crate
/// names libraries that only some programs need; those that are not there are
/// left out.
fn of_sysroot(sysroot: &Path) -> Result<String> {
    let sysroot = fs::canonicalize(sysroot).with_context(|| format!("no {}", sysroot.display()))?;
    let libraries = sysroot.join("usr/lib");
    ensure!(
        libraries.join("libc.a").is_file(),
        "{} is no FreeBSD sysroot: it has no usr/lib/libc.a",
        sysroot.display()
    );
    // Since 12.2 under the name that other systems have; std uses that one.
    let symbols = output(Command::new("nm").arg(libraries.join("libpthread.a")))?;
    let name_np = if symbols.contains(" pthread_setname_np") {
        ""
    } else {
        "set -- \"$@\" -Wl,-u,pthread_set_name_np \
         -Wl,--defsym=pthread_setname_np=pthread_set_name_np\n"
    };
    Ok(format!(
        "#!/bin/sh\n\
         sysroot='{}'\n\
         for word; do\n\
         \tshift\n\
         \tcase $word in\n\
         \t-lgcc_s) word=-lgcc_eh ;;\n\
         \t-l*) [ -e \"$sysroot/usr/lib/lib${{word#-l}}.a\" ] || continue ;;\n\
         \tesac\n\
         \tset -- \"$@\" \"$word\"\n\
         done\n\
         {name_np}\
         exec clang-14 -target x86_64-unknown-freebsd12.1 --sysroot=\"$sysroot\" \
         --ld-path=/usr/bin/ld.lld-14 \"$@\"\n",
        sysroot.display()
    ))
}

/// The same with ziglang, which has stubs of FreeBSD's principal libraries.
fn of_zig(zig: &ziglang::Zig, dirs: &Dirs) -> String {
    let cache = dirs.target.join("zig-cache");
    format!(
        "#!/bin/sh\n\
         for word; do\n\
         \tshift\n\
         \tcase $word in\n\
         \t-lkvm | -lmemstat | -lprocstat | -ldevstat | -lexecinfo | -lgcc) continue ;;\n\
         \t-lgcc_s) word=-lunwind ;;\n\
         \tesac\n\
         \tset -- \"$@\" \"$word\"\n\
         done\n\
         export ZIG_GLOBAL_CACHE_DIR='{cache}' ZIG_LOCAL_CACHE_DIR='{cache}'\n\
         exec '{zig}' cc -target x86_64-freebsd.14.0 \"$@\"\n",
        cache = cache.display(),
        zig = zig.program.display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_sysroot_is_named() {
        let empty = std::env::temp_dir().join(format!("no-sysroot-{}", std::process::id()));
        fs::create_dir_all(&empty).unwrap();
        let error = of_sysroot(&empty).unwrap_err();
        fs::remove_dir(&empty).unwrap();
        assert!(error.to_string().contains("usr/lib/libc.a"), "{error}");
    }
}
