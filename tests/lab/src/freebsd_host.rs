//! A FreeBSD host in the emulator: its kernel and root are the user's images,
//! vmm.ko and the programs are ours.

use crate::command::output;
use crate::dirs::Dirs;
use crate::machine::{Engine, Machine};
use crate::{apt, bochs, images, kmod_freebsd, programs_freebsd};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const INIT: &str = include_str!("../host/freebsd-init");
const TSC: &str = include_str!("../host/freebsd-tsc.c");
const BLOCK: usize = 4096;
/// Blocks in front of the files, for the script that unpacks them.
const SCRIPT_BLOCKS: usize = 16;

/// What a FreeBSD host is made of, in an image directory.
#[derive(Debug, Clone)]
pub struct Image {
    /// The host's kernel.
    pub kernel: PathBuf,
    /// Its memory-disk root, with stock bhyve, bhyveload and bhyvectl, a stock
    /// vmm.ko, and an /etc/rc that obeys the variable `host.run`.
    pub root: PathBuf,
    /// FreeBSD's `cdboot` and a loader without a script language.
    boot: PathBuf,
    /// Kernel sources, to build vmm.ko against.
    pub sys: PathBuf,
    /// Headers and libraries, to link programs against.
    pub sysroot: PathBuf,
}

/// The FreeBSD host that the user put into an image directory; otherwise, what
/// is missing.
pub fn find(dirs: &Dirs) -> std::result::Result<Image, String> {
    let find = |name: &str| {
        images::find(dirs, name).ok_or_else(|| format!("no {name} in an image directory"))
    };
    Ok(Image {
        kernel: find("host/freebsd-12.1-host.kernel")?,
        root: find("host/freebsd-12.1-host-mfsroot.img")?,
        boot: find("boot/loader_simp")?.with_file_name(""),
        sys: find("host/sys")?,
        sysroot: find("host/sysroot")?,
    })
}

/// Our module and programs for that host, and `tsc`.
///
/// # Errors
/// Something does not compile.
pub fn build(dirs: &Dirs, image: &Image) -> Result<(PathBuf, Vec<PathBuf>, PathBuf)> {
    apt::ensure_installed(&kmod_freebsd::PACKAGES)?;
    let module = kmod_freebsd::build(dirs, &kmod_freebsd::Headers::Tree(image.sys.clone()))?;
    let programs = crate::progress::step("bhyve, bhyvectl, bhyveload for FreeBSD", || {
        programs_freebsd::build(dirs, Some(&image.sysroot))
    })?;
    let dir = dirs.fresh("tsc-freebsd")?;
    let source = dir.join("tsc.c");
    fs::write(&source, TSC)?;
    let tsc = dir.join("tsc");
    output(
        Command::new("clang-14")
            .args(["-target", "x86_64-unknown-freebsd12.1", "-O2", "-static"])
            .arg(format!("--sysroot={}", image.sysroot.display()))
            .arg("--ld-path=/usr/bin/ld.lld-14")
            .arg("-o")
            .arg(&tsc)
            .arg(&source),
    )?;
    Ok((module, programs, tsc))
}

/// Starts the host; `files` are those of its root: path, path here, executable.
///
/// # Errors
/// The engine is not Bochs; the emulator does not start.
pub fn start(
    image: &Image,
    engine: Engine,
    cpus: u32,
    memory_mib: u32,
    files: &[(String, PathBuf, bool)],
    environment: &str,
    dir: &Path,
) -> Result<Machine> {
    ensure!(
        engine == Engine::Bochs,
        "a FreeBSD host needs Bochs here, not {engine}: --engine bochs"
    );
    let iso = iso(image, &pack(files)?, environment, dir)?;
    Machine::start_bochs(cpus, memory_mib, &iso, dir)
}

/// A memory disk with a script that unpacks the files behind it, as the host has
/// neither tar nor a driver for anything simpler.
fn pack(files: &[(String, PathBuf, bool)]) -> Result<Vec<u8>> {
    let mut script = String::new();
    let mut bytes = Vec::new();
    let mut folders = BTreeSet::new();
    for (name, path, executable) in files {
        let file = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = format!("/{}", name.trim_start_matches('/'));
        let (folder, _) = name.rsplit_once('/').unwrap_or_default();
        let skip = SCRIPT_BLOCKS + bytes.len() / BLOCK;
        let count = file.len() / BLOCK;
        let tail = file.len() % BLOCK;
        if !folder.is_empty() && folders.insert(folder.to_owned()) {
            // The root has no room.
            script.push_str(&format!(
                "mkdir -p {folder}; mount -t tmpfs tmpfs {folder}\n"
            ));
        }
        script.push_str(&format!(
            "dd if=/dev/md1 of={name} bs={BLOCK} skip={skip} count={count} 2>/dev/null\n"
        ));
        if tail != 0 {
            script.push_str(&format!(
                "dd if=/dev/md1 bs={BLOCK} skip={} count=1 2>/dev/null | dd bs={tail} count=1 2>/dev/null >>{name}\n",
                skip + count
            ));
        }
        if *executable {
            script.push_str(&format!("chmod 755 {name}\n"));
        }
        bytes.extend_from_slice(&file);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    }
    script.push_str(INIT);
    let room = SCRIPT_BLOCKS * BLOCK;
    ensure!(script.len() < room, "too many files for a FreeBSD host");
    let mut disk = script.into_bytes();
    // What follows the script is more of it: empty lines.
    disk.resize(room, b'\n');
    disk.extend_from_slice(&bytes);
    Ok(disk)
}

fn iso(image: &Image, pack: &[u8], environment: &str, dir: &Path) -> Result<PathBuf> {
    let tree = dir.join("iso");
    fs::create_dir_all(tree.join("boot/kernel"))?;
    fs::copy(image.boot.join("cdboot"), tree.join("boot/cdboot"))?;
    fs::copy(image.boot.join("loader_simp"), tree.join("boot/loader"))?;
    fs::copy(&image.kernel, tree.join("boot/kernel/kernel"))?;
    fs::copy(&image.root, tree.join("boot/mfsroot"))?;
    fs::write(tree.join("boot/pack"), pack)?;
    let unpack = format!(
        "dd if=/dev/md1 of=/tmp/lab.sh bs={BLOCK} count={SCRIPT_BLOCKS} 2>/dev/null; sh /tmp/lab.sh"
    );
    let mut script = String::new();
    let mut set = |name: &str, value: &str| script.push_str(&format!("set {name}=\"{value}\"\n"));
    set("comconsole_speed", "115200");
    set("console", "comconsole");
    set("host.poweroff", "1");
    set("host.run", &unpack);
    // COM2, where the firmware does not tell of it.
    set("hint.uart.1.at", "isa");
    set("hint.uart.1.port", "0x2F8");
    set("hint.uart.1.irq", "3");
    // For a stock vmm.ko: Bochs has these as our own module needs them too
    // (see Engine::vmm_options), and no need of the other.
    if !bochs::is_other() {
        set("hw.vmm.vmx.use_apic_vid", "0");
    }
    set("hw.vmm.l1d_flush", "0");
    for pair in environment.split_whitespace() {
        if let Some((name, value)) = pair.split_once('=') {
            set(name, value);
        }
    }
    script.push_str(
        "load /boot/kernel/kernel\nload -t mfs_root /boot/mfsroot\nload -t md_image /boot/pack\nboot\n",
    );
    fs::write(tree.join("boot/loader.rc"), script)?;
    let iso = dir.join("boot.iso");
    output(
        Command::new("xorriso")
            .args(["-as", "mkisofs", "-quiet", "-R", "-b", "boot/cdboot"])
            .args(["-no-emul-boot", "-o"])
            .arg(&iso)
            .arg(&tree),
    )?;
    fs::remove_dir_all(&tree)?;
    Ok(iso)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_cut_at_its_own_end() {
        let path = std::env::temp_dir().join(format!("lab-pack-{}", std::process::id()));
        fs::write(&path, [7_u8; BLOCK + 5]).unwrap();
        let disk = pack(&[("guest/a".to_owned(), path.clone(), true)]).unwrap();
        fs::remove_file(&path).unwrap();
        let start = SCRIPT_BLOCKS * BLOCK;
        assert_eq!(disk.len(), start + 2 * BLOCK);
        assert_eq!(&disk[start..start + BLOCK + 6], {
            let mut want = vec![7_u8; BLOCK + 5];
            want.push(0);
            want
        });
        let script = String::from_utf8_lossy(&disk[..start]);
        assert!(script.contains("skip=16 count=1 2>"), "{script}");
        assert!(script.contains("dd bs=5 count=1"), "{script}");
        assert!(script.contains("chmod 755 /guest/a"), "{script}");
    }
}
