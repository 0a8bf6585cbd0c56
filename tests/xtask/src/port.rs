//! `cargo xtask port`: the FreeBSD ports of packaging/freebsd with what only the
//! release knows: its distfiles, their checksums, and its crates.

use anyhow::{Context, Result, bail};
use lab::command::output;
use lab::dirs::Dirs;
use lab::kmod;
use lab::progress::step;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::deb::copy;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A crate of Cargo.lock.
#[derive(Debug, PartialEq, Eq)]
struct Crate {
    name: String,
    sha256: String,
}

/// Writes ports and distfiles; returns the folder.
///
/// # Errors
/// git, tar or a compiler fails.
pub fn write(dirs: &Dirs) -> Result<PathBuf> {
    let out = dirs.target.join("port");
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("cannot clear {}", out.display()))?;
    }
    let distfiles = out.join("distfiles");
    fs::create_dir_all(&distfiles)?;

    let name = format!("bhyve-rs-{VERSION}");
    let programs = distfiles.join(format!("{name}.tar.gz"));
    step("distfile of the programs", || {
        output(
            Command::new("git")
                .args(["archive", "--format=tar.gz"])
                .arg(format!("--prefix={name}/"))
                .arg("--output")
                .arg(&programs)
                .arg("HEAD")
                .current_dir(&dirs.root),
        )
    })?;
    let module = distfiles.join(format!("bhyve-rs-kmod-{VERSION}.tar.gz"));
    module_distfile(dirs, &out, &module)?;

    let crates = crates(&fs::read_to_string(dirs.root.join("Cargo.lock"))?);
    output(
        Command::new("cargo")
            .args(["fetch", "--locked"])
            .current_dir(&dirs.root),
    )?;
    for port in ["bhyve-rs", "bhyve-rs-kmod"] {
        let into = out.join("sysutils").join(port);
        copy(&dirs.root.join("packaging/freebsd").join(port), &into)?;
        let makefile = into.join("Makefile");
        let text = fs::read_to_string(&makefile)?.replace("%%VERSION%%", VERSION);
        fs::write(&makefile, text)?;
    }
    let port = out.join("sysutils/bhyve-rs");
    let mut list = String::from("CARGO_CRATES=");
    let mut distinfo = distinfo_of(&programs)?;
    let cache = crate_cache()?;
    for c in &crates {
        let _ = writeln!(list, "\t{} \\", c.name);
        let file = find(&cache, &format!("{}.crate", c.name))?;
        let size = fs::metadata(&file)?.len();
        let path = format!("rust/crates/{}.crate", c.name);
        let _ = writeln!(
            distinfo,
            "SHA256 ({path}) = {}\nSIZE ({path}) = {size}",
            c.sha256
        );
    }
    fs::write(
        port.join("Makefile.crates"),
        list.trim_end_matches([' ', '\\', '\n']).to_owned() + "\n",
    )?;
    fs::write(port.join("distinfo"), distinfo)?;
    fs::write(
        out.join("sysutils/bhyve-rs-kmod/distinfo"),
        distinfo_of(&module)?,
    )?;
    Ok(out)
}

/// The C half with the Rust half as an object, as on the user's disk.
fn module_distfile(dirs: &Dirs, out: &Path, file: &Path) -> Result<()> {
    let name = format!("bhyve-rs-kmod-{VERSION}");
    let tree = out.join(&name);
    copy(&dirs.root.join("vmm-kmod/freebsd"), &tree.join("freebsd"))?;
    let object = tree.join("freebsd/vmm_rust.prelinked.o");
    kmod::object(
        dirs,
        "kmod-freebsd",
        &["--features", "freebsd"],
        kmod::Branches::Unchecked,
        &object,
    )?;
    output(Command::new("strip").arg("--strip-debug").arg(&object))?;
    for (from, to) in [
        ("LICENSE", "LICENSE"),
        ("vmm-kmod/kmod/host.h", "kmod/host.h"),
        ("packaging/man/vmm.4", "man/vmm.4"),
    ] {
        let to = tree.join(to);
        fs::create_dir_all(to.parent().unwrap_or(&tree))?;
        fs::copy(dirs.root.join(from), &to).with_context(|| format!("no {from}"))?;
    }
    output(
        Command::new("tar")
            .args([
                "--sort=name",
                "--mtime=@0",
                "--owner=0",
                "--group=0",
                "--numeric-owner",
            ])
            .arg("--directory")
            .arg(out)
            .args(["--use-compress-program=gzip -n", "-cf"])
            .arg(file)
            .arg(&name),
    )?;
    Ok(fs::remove_dir_all(&tree)?)
}

/// The crates of a Cargo.lock that come from a registry.
fn crates(lock: &str) -> Vec<Crate> {
    lock.split("[[package]]")
        .filter_map(|package| {
            let field = |name: &str| {
                let line = package.lines().find_map(|l| l.strip_prefix(name))?;
                Some(line.trim_matches([' ', '=', '"']).to_owned())
            };
            Some(Crate {
                name: format!("{}-{}", field("name")?, field("version")?),
                sha256: field("checksum")?,
            })
        })
        .collect()
}

fn distinfo_of(file: &Path) -> Result<String> {
    let sum = output(Command::new("sha256sum").arg(file))?;
    let sum = sum.split(' ').next().unwrap_or_default();
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let size = fs::metadata(file)?.len();
    Ok(format!(
        "TIMESTAMP = 0\nSHA256 ({name}) = {sum}\nSIZE ({name}) = {size}\n"
    ))
}

/// Where cargo keeps what it has downloaded: a folder a registry.
fn crate_cache() -> Result<Vec<PathBuf>> {
    let home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cargo"),
    };
    let cache = home.join("registry/cache");
    let folders = fs::read_dir(&cache).with_context(|| format!("no {}", cache.display()))?;
    Ok(folders.filter_map(|f| Some(f.ok()?.path())).collect())
}

fn find(cache: &[PathBuf], file: &str) -> Result<PathBuf> {
    match cache.iter().map(|dir| dir.join(file)).find(|f| f.is_file()) {
        Some(found) => Ok(found),
        None => bail!("cargo fetch has left no {file}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_are_those_that_a_registry_has() {
        let lock = "version = 4\n\n[[package]]\nname = \"ours\"\nversion = \"0.1.0\"\n\
                    dependencies = [\n \"libc\",\n]\n\n[[package]]\nname = \"libc\"\n\
                    version = \"0.2.1\"\nsource = \"registry+x\"\nchecksum = \"ab12\"\n";
        let libc = Crate {
            name: "libc-0.2.1".into(),
            sha256: "ab12".into(),
        };
        assert_eq!(crates(lock), [libc]);
    }
}
