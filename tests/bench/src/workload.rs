//! A Linux guest's day: it boots, idles, reads and writes its disk, and
//! compiles a program, from memory and on the disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::command::output;
use lab::console::Console;
use lab::dirs::Dirs;
use lab::guest::{Guest, Load, linux_cmdline};
use lab::host::{self, Kit, LEAN, SHORT};
use lab::machine::{Engine, Machine, Pci, Spec};
use lab::progress::step;

use crate::compile;
use crate::results::{Column, Results};
use crate::session::{GUEST_MIB, Session};
use crate::tools::Tools;

/// From the start to the guest's shell.
const UP: Duration = Duration::from_secs(600);
/// The longest work in it.
const WORK: Duration = Duration::from_secs(900);
/// Requests measured.
const REQUESTS: u32 = 1000;
/// Emulated seconds of doing nothing.
const IDLE: u32 = 10;

/// Debian's drivers, in the order of their dependencies.
const MODULES: [&str; 6] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
];
/// What a disk with a file system takes besides.
const FILE_SYSTEM: [&str; 5] = [
    "lib/crc16.ko",
    "fs/mbcache.ko",
    "fs/jbd2/jbd2.ko",
    "crypto/crc32c_generic.ko",
    "fs/ext4/ext4.ko",
];

/// What guests are made of.
pub struct Files {
    initrd: PathBuf,
    /// With the compiler in it.
    large: Option<PathBuf>,
    /// The compiler on a file system.
    disk: Option<PathBuf>,
}

impl Files {
    /// Makes them; the compiler only where it is asked for.
    ///
    /// # Errors
    /// Something is missing here.
    pub fn build(dirs: &Dirs, kit: &Kit, tools: &Tools, compiler: bool) -> Result<Files> {
        step("guest files", || {
            let mut small = vec![("bin/meter".to_owned(), tools.meter.clone())];
            for module in MODULES.iter().chain(&FILE_SYSTEM) {
                let path = kit.kernel.modules.join(module);
                if path.is_file() {
                    small.push((base(&path)?, path));
                }
            }
            let initrd = host::guest_initrd_with(dirs, "guest-bench", &small)?;
            if !compiler {
                return Ok(Files {
                    initrd,
                    large: None,
                    disk: None,
                });
            }
            let files = compile::files(dirs)?;
            let disk = file_system(dirs, &files)?;
            let mut all = small;
            all.extend(files);
            let large = host::guest_initrd_with(dirs, "guest-compile", &all)?;
            Ok(Files {
                initrd,
                large: Some(large),
                disk: Some(disk),
            })
        })
    }

    /// What the host has to hold: path in the host, path here.
    pub fn in_host(&self) -> Vec<(&'static str, &Path)> {
        let mut files = vec![("guest/initrd", self.initrd.as_path())];
        if let Some(large) = &self.large {
            files.push(("guest/large", large));
        }
        if let Some(disk) = &self.disk {
            files.push(("guest/disk", disk));
        }
        files
    }
}

fn base(path: &Path) -> Result<String> {
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
    File::create(&image)?.set_len(128 << 20)?;
    output(
        Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(&tree)
            .arg(&image),
    )?;
    fs::remove_dir_all(&tree)?;
    Ok(image)
}

fn guest(initrd: &str) -> Guest {
    let load = Load::Linux {
        initrd: Some(initrd.to_owned()),
        cmdline: linux_cmdline(),
    };
    let mut guest = Guest::new("/guest/linux", load);
    guest.memory_mib = GUEST_MIB;
    guest
}

/// Ticks of one piece of work, from the meter's line.
fn metered(text: &str) -> Result<f64> {
    let line = text
        .lines()
        .rev()
        .find_map(|l| l.trim().strip_prefix("meter "))
        .with_context(|| format!("the meter said:\n{text}"))?;
    let mut words = line.split_whitespace().skip(1);
    let mut number = || words.next().and_then(|w| w.parse::<f64>().ok());
    let (ticks, count) = (number(), number());
    match (ticks, count) {
        (Some(ticks), Some(count)) if count > 0.0 => Ok(ticks / count),
        _ => anyhow::bail!("the meter said {line:?}"),
    }
}

/// Ticks since the kernel began that were not idle, by its own clock.
fn busy(uptime: &str) -> Result<f64> {
    let line = uptime
        .lines()
        .rev()
        .find(|l| l.split_whitespace().count() == 2 && l.contains('.'))
        .with_context(|| format!("no uptime in:\n{uptime}"))?;
    let mut words = line.split_whitespace().map(str::parse::<f64>);
    match (words.next(), words.next()) {
        (Some(Ok(up)), Some(Ok(idle))) => Ok((up - idle) * f64::from(lab::bochs::IPS)),
        _ => anyhow::bail!("/proc/uptime says {line:?}"),
    }
}

/// Boots, measures what there is to measure, and powers off.
///
/// # Errors
/// A guest does not do as it is told.
pub fn measure(
    session: &mut Session,
    files: &Files,
    results: &mut Results,
    quick: bool,
) -> Result<()> {
    step("boot, idle, disk", || small_guest(session, results, quick))?;
    if files.large.is_some() {
        step("compile in memory", || {
            let ticks = in_memory(session)?;
            results.add(session.column, "compile", COMPILE, "instructions", ticks);
            Ok(())
        })?;
    }
    if files.disk.is_some() {
        step("compile on a disk", || {
            let ticks = on_disk(session)?;
            results.add(
                session.column,
                "compile_disk",
                "the same on a virtio disk",
                "instructions",
                ticks,
            );
            Ok(())
        })?;
    }
    Ok(())
}

const COMPILE: &str = "compiling stb_image, gcc -O1";

fn small_guest(session: &mut Session, results: &mut Results, quick: bool) -> Result<()> {
    let column = session.column;
    session.host.must(
        "dd if=/dev/zero of=/tmp/disk bs=1M count=16 2>/dev/null",
        SHORT,
    )?;
    session.start(guest("/guest/initrd"), &["virtio-blk,/tmp/disk"])?;
    up(session.host.guest())?;
    let boot = busy(&session.types("cat /proc/uptime")?)?;
    results.add(
        column,
        "boot",
        "Linux boot to its shell, by its clock less idle time",
        "instructions",
        boot,
    );
    let exits = session.exits()?;
    results.add(column, "boot_exits", "the same", "exits", exits as f64);
    if !quick {
        let before = session.exits()?;
        session.types(&format!("sleep {IDLE}"))?;
        let all = session.exits()?.saturating_sub(before);
        results.add(
            column,
            "idle",
            "idle Linux guest",
            "exits a second",
            all as f64 / f64::from(IDLE),
        );
    }
    session.types("chmod +x /bin/meter")?;
    insert(session, &MODULES)?;
    for (name, what, size) in [
        ("read", "virtio-blk, reading 4 KiB", 4096),
        ("write", "virtio-blk, writing 4 KiB", 4096),
        ("read", "virtio-blk, reading 64 KiB", 65536),
    ] {
        let before = session.exits()?;
        let text = session.types(&format!("meter {name} /dev/vda {size} {REQUESTS}"))?;
        let exits = session.exits()?.saturating_sub(before);
        let key = format!("blk_{name}_{}k", size >> 10);
        results.add(column, &key, what, "instructions", metered(&text)?);
        results.add(
            column,
            &format!("{key}_exits"),
            what,
            "exits",
            exits as f64 / f64::from(REQUESTS),
        );
    }
    if column == Column::Ours {
        let text = session.host.must(
            "awk '/^[0-9a-f]+-/{v=/vmm/} /^Rss:/{if(!v)s+=$2} END{print s}' /proc/$(pidof bhyve)/smaps",
            SHORT,
        )?;
        let kib: f64 = text.trim().parse().context("bhyve's resident memory")?;
        results.add(
            column,
            "resident",
            "bhyve's resident memory beyond the guest's",
            "KiB",
            kib,
        );
    }
    session.host.guest().send(b"poweroff -f\r")?;
    session.end()
}

/// Waits for the shell. Its first prompt comes before it is ready: it throws
/// away what was typed until then.
fn up(console: &mut Console) -> Result<()> {
    console.expect("guest# ", UP)?;
    std::thread::sleep(Duration::from_millis(500));
    console.send(b"\r")?;
    console.expect("guest# ", UP)?;
    Ok(())
}

fn insert(session: &mut Session, modules: &[&str]) -> Result<()> {
    for module in modules {
        let file = base(Path::new(module))?;
        session.types(&format!("[ ! -e /{file} ] || insmod /{file}"))?;
    }
    Ok(())
}

fn in_memory(session: &mut Session) -> Result<f64> {
    session.start(guest("/guest/large"), &[])?;
    up(session.host.guest())?;
    session.types(PREPARE)?;
    let text = session.types(&compile::command(""))?;
    session.host.guest().send(b"poweroff -f\r")?;
    session.end()?;
    metered(&text)
}

/// The archive's files are not executable.
const PREPARE: &str = "chmod +x /bin/meter /usr/bin/* /usr/lib/gcc/x86_64-linux-gnu/12/* /lib64/* /lib/x86_64-linux-gnu/*";

fn on_disk(session: &mut Session) -> Result<f64> {
    session
        .host
        .must("cp /guest/disk /tmp/disk && sync", SHORT)?;
    session.start(guest("/guest/initrd"), &["virtio-blk,/tmp/disk"])?;
    up(session.host.guest())?;
    session.types("chmod +x /bin/meter; mkdir /mnt")?;
    insert(session, &MODULES)?;
    insert(session, &FILE_SYSTEM)?;
    session.types("mount -t ext4 /dev/vda /mnt && mount -t devtmpfs dev /mnt/dev")?;
    let text = session.types(&compile::command("/mnt"))?;
    session.types("umount /mnt/dev; umount /mnt; sync")?;
    session.host.guest().send(b"poweroff -f\r")?;
    session.end()?;
    metered(&text)
}

/// The same kernel, the same work, and no hypervisor.
///
/// # Errors
/// The emulator does not start, or the machine does not do as it is told.
pub fn bare(
    dirs: &Dirs,
    kit: &Kit,
    engine: Engine,
    files: &Files,
    results: &mut Results,
) -> Result<()> {
    step("the bare machine", || {
        let initrd = files.large.as_ref().unwrap_or(&files.initrd);
        let initramfs = fs::read(initrd)?;
        let archive_mib = u32::try_from(initramfs.len() >> 20)?;
        let spec = Spec {
            disk: None,
            engine,
            cpus: 1,
            count_instructions: false,
            pci: Pci::default(),
            memory_mib: GUEST_MIB + archive_mib,
            kernel: kit.kernel.image.clone(),
            initramfs,
            cmdline: format!(
                "console=ttyS0,115200 {LEAN} {} {}",
                engine.kernel_parameters(),
                engine.host_parameters()
            ),
        };
        let mut machine = Machine::start(&spec, &dirs.fresh("bench-bare")?)?;
        up(&mut machine.com1)?;
        let mut types = |line: &str| -> Result<String> {
            let console = &mut machine.com1;
            console.send(format!("{line}; echo lab-status=$? lab-'end'\r").as_bytes())?;
            let found = console.expect(r"lab-status=(\d+) lab-end", WORK)?;
            ensure!(found.group(1) == "0", "`{line}`:\n{}", found.before);
            Ok(found.before)
        };
        let boot = busy(&types("cat /proc/uptime")?)?;
        results.add(Column::Bare, "boot", "", "", boot);
        if files.large.is_some() {
            types(PREPARE)?;
            let ticks = metered(&types(&compile::command(""))?)?;
            results.add(Column::Bare, "compile", "", "", ticks);
            for (name, what, from) in [
                ("compile_ratio", "the compile, ours to bare", "compile"),
                (
                    "compile_disk_ratio",
                    "the compile on a virtio disk, to bare in memory",
                    "compile_disk",
                ),
            ] {
                for column in [Column::Ours, Column::Kvm] {
                    if let Some(value) = results.get(column, from) {
                        results.add(column, name, what, "ratio", value / ticks);
                    }
                }
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_prints_is_understood() {
        assert_eq!(metered("x\r\nmeter read 5000 10\r\n").unwrap(), 500.0);
        assert!(metered("meter: /dev/vda: No such file").is_err());
        let ticks = busy("cat /proc/uptime\r\n12.50 2.50\r\n").unwrap();
        assert_eq!(ticks, 10.0 * f64::from(lab::bochs::IPS));
    }
}
