//! The initramfs format: cpio "newc" (Linux Documentation/driver-api/early-userspace/buffer-format.rst).

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An initramfs in the making.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Initramfs {
    /// An initramfs with the directories, the console device, busybox and
    /// `init` that each of ours has.
    ///
    /// # Errors
    /// `busybox` cannot be read.
    pub fn new(init: &str, busybox: &Path) -> Result<Self> {
        let mut this = Self::default();
        for dir in ["bin", "dev", "proc", "sys", "tmp"] {
            this.directory(dir)?;
        }
        // The kernel opens it for init before devtmpfs is mounted.
        this.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[])?;
        this.program("bin/busybox", busybox)?;
        this.entry("init", PROGRAM, (0, 0), init.as_bytes())?;
        Ok(this)
    }

    /// Adds the file `from` as `name`, executable.
    ///
    /// # Errors
    /// The file cannot be read or is too long for the format.
    pub fn program(&mut self, name: &str, from: &Path) -> Result<()> {
        self.copy(name, PROGRAM, from)
    }

    /// Adds the file `from` as `name`.
    ///
    /// # Errors
    /// The file cannot be read or is too long for the format.
    pub fn file(&mut self, name: &str, from: &Path) -> Result<()> {
        self.copy(name, FILE, from)
    }

    /// Adds a file with these contents.
    ///
    /// # Errors
    /// They are too long for the format.
    pub fn text(&mut self, name: &str, text: &str) -> Result<()> {
        self.parents(name)?;
        self.entry(name, FILE, (0, 0), text.as_bytes())
    }

    /// The finished archive.
    ///
    /// # Errors
    /// None in practice; the trailer is an entry like others.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }

    fn copy(&mut self, name: &str, mode: u32, from: &Path) -> Result<()> {
        self.parents(name)?;
        let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.entry(name, mode, (0, 0), &data)
    }

    fn parents(&mut self, name: &str) -> Result<()> {
        for (at, _) in name.match_indices('/') {
            self.directory(&name[..at])?;
        }
        Ok(())
    }

    fn directory(&mut self, name: &str) -> Result<()> {
        if self.directories.insert(name.to_owned()) {
            self.entry(name, DIRECTORY, (0, 0), &[])?;
        }
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(data.len()).with_context(|| format!("{name} is too long"))?;
        let name_size = u32::try_from(name.len() + 1)?;
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, device, rdevice, namesize, check
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::busybox;
    use crate::dirs::Dirs;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// busybox's cpio is the judge: it must find the names and the contents.
    #[test]
    fn busybox_reads_it() {
        let mut archive = Initramfs::default();
        archive.text("etc/deep/motd", "hello").unwrap();
        archive.text("odd", "12345").unwrap();
        let bytes = archive.finish().unwrap();
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let busybox = busybox::ensure(&Dirs::new(&checkout).unwrap()).unwrap();
        let mut child = Command::new(busybox)
            .args(["cpio", "-t"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success());
        let names = String::from_utf8(out.stdout).unwrap();
        assert_eq!(
            names.lines().collect::<Vec<_>>(),
            ["etc", "etc/deep", "etc/deep/motd", "odd"]
        );
    }
}
