//! Guest images: what the user put somewhere, or FreeBSD's release.

use crate::apt;
use crate::command::output;
use crate::dirs::Dirs;
use crate::progress::step;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where FreeBSD keeps its old releases.
pub const FREEBSD_BASE_URL: &str =
    "http://ftp-archive.freebsd.org/pub/FreeBSD-Archive/old-releases/amd64/12.1-RELEASE";

const KERNEL: &str = "freebsd-12.1-smp.kernel";
const MFSROOT: &str = "freebsd-12.1-mfsroot.img";
const DISK: &str = "disk/freebsd-12.1-disk.img";

/// A FreeBSD to boot.
#[derive(Debug, Clone)]
pub struct FreeBsd {
    /// ELF kernel.
    pub kernel: PathBuf,
    /// Memory-disk root.
    pub mfsroot: Option<PathBuf>,
}

/// The directories that are looked through for images, in order.
pub fn directories(dirs: &Dirs) -> Vec<PathBuf> {
    let mut all = Vec::new();
    if let Some(dir) = std::env::var_os("BHYVE_IMAGES") {
        all.push(PathBuf::from(dir));
    }
    all.push(dirs.cache.join("images"));
    all
}

/// The FreeBSD that the user put into an image directory.
pub fn local_freebsd(dirs: &Dirs) -> Option<FreeBsd> {
    directories(dirs).into_iter().find_map(|dir| {
        let kernel = dir.join(KERNEL);
        let mfsroot = dir.join(MFSROOT);
        kernel.is_file().then(|| FreeBsd {
            kernel,
            mfsroot: mfsroot.is_file().then_some(mfsroot),
        })
    })
}

/// The disk with FreeBSD on it that the user put into an image directory.
pub fn local_freebsd_disk(dirs: &Dirs) -> Option<PathBuf> {
    find(dirs, DISK)
}

/// A file or folder `name` in one of the image directories.
pub fn find(dirs: &Dirs, name: &str) -> Option<PathBuf> {
    directories(dirs)
        .into_iter()
        .map(|dir| dir.join(name))
        .find(|path| path.exists())
}

/// FreeBSD's official kernel, and a root of its rescue programs, from
/// `base_url` (a release's directory with MANIFEST, kernel.txz, base.txz).
///
/// # Errors
/// No net, or a file does not have the checksum that MANIFEST gives it.
pub fn fetch_freebsd(dirs: &Dirs, base_url: &str) -> Result<FreeBsd> {
    let base_url = base_url.trim_end_matches('/');
    let dir = dirs.cache.join("freebsd").join(key(base_url));
    let image = FreeBsd {
        kernel: dir.join("kernel"),
        mfsroot: Some(dir.join("root.iso")),
    };
    if dir.join("complete").is_file() {
        return Ok(image);
    }
    fs::create_dir_all(&dir)?;
    let manifest = dir.join("MANIFEST");
    // Not a step: where the net refuses, the caller says so.
    apt::download(&format!("{base_url}/MANIFEST"), &manifest, None)?;
    let manifest = fs::read_to_string(&manifest)?;
    step("FreeBSD's official release", || {
        for set in ["kernel.txz", "base.txz"] {
            let sum = checksum(&manifest, set)
                .with_context(|| format!("{base_url}/MANIFEST has no {set}"))?;
            apt::download(&format!("{base_url}/{set}"), &dir.join(set), Some(&sum))?;
        }
        apt::ensure_installed(&["xz-utils"])?;
        unpack(&dir)?;
        fs::write(dir.join("complete"), "")?;
        Ok(image)
    })
}

fn key(url: &str) -> String {
    url.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' {
                c
            } else {
                '_'
            }
        })
        .collect()
}

/// MANIFEST: name, SHA-256, number of files, and more, between tabs.
fn checksum(manifest: &str, set: &str) -> Option<String> {
    manifest.lines().find_map(|line| {
        let mut fields = line.split('\t');
        (fields.next() == Some(set)).then_some(())?;
        let sum = fields.next()?;
        (sum.len() == 64 && sum.chars().all(|c| c.is_ascii_hexdigit())).then(|| sum.to_owned())
    })
}

const RC: &str = "#!/rescue/sh\n\
    PATH=/rescue; export PATH\n\
    echo \"guest userland: $(/rescue/sysctl -n kern.ostype kern.osrelease hw.ncpu kern.timecounter.hardware)\"\n\
    exit 1\n";

/// The kernel, and its root: the release's static rescue programs on a CD file
/// system, which the GENERIC kernel mounts from a memory disk.
fn unpack(dir: &Path) -> Result<()> {
    let tar = |set: &str, members: &[&str], into: &Path| {
        fs::create_dir_all(into)?;
        output(
            Command::new("tar")
                .arg("-xJf")
                .arg(dir.join(set))
                .arg("-C")
                .arg(into)
                .args(members),
        )
    };
    tar("kernel.txz", &["./boot/kernel/kernel"], dir)?;
    fs::rename(dir.join("boot/kernel/kernel"), dir.join("kernel"))?;
    fs::remove_dir_all(dir.join("boot"))?;
    let root = dir.join("root");
    tar("base.txz", &["./rescue"], &root)?;
    for sub in ["dev", "etc", "sbin", "bin", "tmp"] {
        fs::create_dir_all(root.join(sub))?;
    }
    fs::hard_link(root.join("rescue/init"), root.join("sbin/init"))?;
    fs::hard_link(root.join("rescue/sh"), root.join("bin/sh"))?;
    fs::write(root.join("etc/rc"), RC)?;
    output(
        Command::new("xorriso")
            .args(["-as", "mkisofs", "-quiet", "-R", "-cache-inodes", "-o"])
            .arg(dir.join("root.iso"))
            .arg(&root),
    )?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifest_line() {
        let sum = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789ABCDEF";
        let manifest = format!("base.txz\tshort\t1\nkernel.txz\t{sum}\t886\tkernel\n");
        assert_eq!(checksum(&manifest, "kernel.txz").as_deref(), Some(sum));
        assert_eq!(checksum(&manifest, "base.txz"), None);
        assert_eq!(checksum(&manifest, "doc.txz"), None);
    }
}
