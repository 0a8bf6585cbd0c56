//! What the benchmark's guests are made of: one initramfs with the meter, Debian's
//! drivers and the compiler in it, and the compiler once more on a disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use lab::command::output;
use lab::dirs::Dirs;
use lab::host::{self, Kit};
use lab::progress::step;

use crate::compile;
use crate::tools::Tools;

/// Debian's drivers, in the order of their dependencies.
pub const DISK: [&str; 6] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
];
/// What a network card takes besides.
pub const NETWORK: [&str; 3] = [
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
];
/// What a disk with a file system takes besides.
pub const FILE_SYSTEM: [&str; 5] = [
    "lib/crc16.ko",
    "fs/mbcache.ko",
    "fs/jbd2/jbd2.ko",
    "crypto/crc32c_generic.ko",
    "fs/ext4/ext4.ko",
];

/// Files for guests.
pub struct Files {
    /// The initramfs, for the bare machine too.
    pub initrd: PathBuf,
    /// The compiler on a file system.
    disk: PathBuf,
}

impl Files {
    /// Makes them.
    ///
    /// # Errors
    /// Something is missing here.
    pub fn build(dirs: &Dirs, kit: &Kit, tools: &Tools) -> Result<Files> {
        step("guest files", || {
            let compiler = compile::files(dirs)?;
            let disk = file_system(dirs, &compiler)?;
            let mut files = vec![("bin/meter".to_owned(), tools.meter.clone())];
            for module in DISK.iter().chain(&NETWORK).chain(&FILE_SYSTEM) {
                let path = kit.kernel.modules.join(module);
                if path.is_file() {
                    files.push((base(&path)?, path));
                }
            }
            files.extend(compiler);
            let initrd = host::guest_initrd_with(dirs, "guest-bench", &files)?;
            Ok(Files { initrd, disk })
        })
    }

    /// What the host has to hold: path in the host, path here.
    pub fn in_host(&self) -> [(&'static str, &Path); 2] {
        [("guest/initrd", &self.initrd), ("guest/disk", &self.disk)]
    }
}

/// A file's name.
///
/// # Errors
/// The path has none.
pub fn base(path: &Path) -> Result<String> {
    let name = path.file_name().context("a module without a name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// The compiler as an ext4 image.
fn file_system(dirs: &Dirs, files: &[(String, PathBuf)]) -> Result<PathBuf> {
    let dir = dirs.fresh("bench-disk")?;
    let tree = dir.join("tree");
    for (name, from) in files {
        let to = tree.join(name);
        fs::create_dir_all(to.parent().context("a file at no place")?)?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    for name in ["tmp", "dev", "proc"] {
        fs::create_dir_all(tree.join(name))?;
    }
    let image = dir.join("disk");
    File::create(&image)?.set_len(88 << 20)?;
    output(
        Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(&tree)
            .arg(&image),
    )?;
    fs::remove_dir_all(&tree)?;
    Ok(image)
}
