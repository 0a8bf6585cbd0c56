//! Debian's own 6.1 cloud kernel and the headers to build a module for it, both
//! extracted into the cache: nothing is installed, no boot hook runs.

use crate::apt;
use crate::dirs::Dirs;
use crate::progress::step;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// A kernel to run hosts (and Linux guests) on.
#[derive(Debug, Clone)]
pub struct HostKernel {
    /// Like `6.1.0-56-cloud-amd64`.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// What `make -C` wants to build a module.
    pub headers: PathBuf,
    /// Debian's modules, by folder as in the kernel's source.
    pub modules: PathBuf,
}

const META: &str = "linux-image-cloud-amd64";

/// Finds the kernel in the cache or downloads Debian's newest.
///
/// # Errors
/// apt fails, or the packages look different from what we know.
pub fn ensure(dirs: &Dirs) -> Result<HostKernel> {
    let base = dirs.cache.join("host");
    let named = base.join("release");
    if let Ok(release) = fs::read_to_string(&named) {
        let kernel = at(&base, release.trim());
        if kernel.image.is_file() && kernel.headers.join("Makefile").is_file() {
            return Ok(kernel);
        }
    }
    step("Debian's cloud kernel and its headers", || {
        if let Ok(kernel) = download(&base) {
            return Ok(kernel);
        }
        // No package lists yet, or the mirror has moved on since they were fetched.
        apt::update()?;
        download(&base)
    })
}

fn download(base: &Path) -> Result<HostKernel> {
    let release = release()?;
    let into = base.join(&release);
    if into.exists() {
        fs::remove_dir_all(&into)?;
    }
    fs::create_dir_all(&into)?;
    let common = release
        .strip_suffix("-cloud-amd64")
        .with_context(|| format!("Debian's cloud kernel is called {release}"))?;
    let packages = [
        format!("linux-image-{release}"),
        format!("linux-headers-{release}"),
        format!("linux-headers-{common}-common"),
        "linux-kbuild-6.1".to_owned(),
    ];
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    apt::extract(&[], &packages, &into)?;
    let kernel = at(base, &release);
    relocate(&kernel.headers.join("Makefile"), &into)?;
    fs::write(base.join("release"), &release)?;
    Ok(kernel)
}

/// The headers of Debian's usual kernel of the same version, beside those that both
/// have in common: what `make -C` wants to build a module for a guest with it.
///
/// # Errors
/// They are not there and cannot be fetched.
pub fn usual_headers(dirs: &Dirs, kernel: &HostKernel) -> Result<PathBuf> {
    let release = kernel.release.replace("-cloud", "");
    let root = dirs.cache.join("host").join(&kernel.release);
    let headers = root.join(format!("usr/src/linux-headers-{release}"));
    let makefile = headers.join("Makefile");
    let theirs = "include /usr/src/";
    let ready = fs::read_to_string(&makefile).is_ok_and(|text| !text.starts_with(theirs));
    if !ready {
        step("headers of Debian's usual kernel", || {
            let package = format!("linux-headers-{release}");
            if apt::extract(&[], &[&package], &root).is_err() {
                apt::update()?;
                apt::extract(&[], &[&package], &root)?;
            }
            relocate(&makefile, &root)
        })?;
    }
    Ok(headers)
}

fn at(base: &Path, release: &str) -> HostKernel {
    let root = base.join(release);
    HostKernel {
        release: release.to_owned(),
        image: root.join(format!("boot/vmlinuz-{release}")),
        headers: root.join(format!("usr/src/linux-headers-{release}")),
        modules: root.join(format!("lib/modules/{release}/kernel")),
    }
}

fn release() -> Result<String> {
    apt::depends(META)?
        .iter()
        .find_map(|d| d.strip_prefix("linux-image-"))
        .map(str::to_owned)
        .with_context(|| format!("{META} depends on no kernel"))
}

/// The headers' Makefile includes its sibling by absolute path.
fn relocate(makefile: &Path, root: &Path) -> Result<()> {
    let text = fs::read_to_string(makefile)?;
    let moved = text.replace(
        "include /usr/src/",
        &format!("include {}/usr/src/", root.display()),
    );
    fs::write(makefile, moved)?;
    Ok(())
}
