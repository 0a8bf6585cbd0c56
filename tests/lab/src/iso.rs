//! A CD that boots a Linux kernel: what every emulator's BIOS can start.

use crate::command::output;
use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes `dir/boot.iso` from a kernel, an initramfs and a kernel command line.
///
/// # Errors
/// grub-mkrescue fails or the disk is full.
pub fn build(dir: &Path, kernel: &Path, initramfs: &[u8], cmdline: &str) -> Result<PathBuf> {
    let tree = dir.join("iso");
    fs::create_dir_all(tree.join("boot/grub"))?;
    fs::copy(kernel, tree.join("boot/vmlinuz"))?;
    fs::write(tree.join("boot/initrd"), initramfs)?;
    rescue(
        dir,
        &tree,
        &format!("linux /boot/vmlinuz {cmdline}\ninitrd /boot/initrd\n"),
    )
}

fn rescue(dir: &Path, tree: &Path, commands: &str) -> Result<PathBuf> {
    fs::write(
        tree.join("boot/grub/grub.cfg"),
        format!("set timeout=0\n{commands}boot\n"),
    )?;
    let iso = dir.join("boot.iso");
    output(
        Command::new("grub-mkrescue")
            .args(["-d", "/usr/lib/grub/i386-pc", "-o"])
            .arg(&iso)
            .arg(tree)
            .args(["--locales=", "--fonts=", "--themes=", "--compress=no"]),
    )?;
    fs::remove_dir_all(tree)?;
    Ok(iso)
}
