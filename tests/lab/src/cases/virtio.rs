//! Virtio devices, seen from both ends: a disk that guest and host read and
//! write, and the host's entropy.

use super::lifecycle::listed;
use crate::console::Found;
use crate::guest::{Guest, Load, counted_cmdline, shell};
use crate::host::{self, Config, Host, SHORT};
use crate::images;
use crate::runner::{Case, Group, Lab};
use crate::{baseline, meter, stats};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// From bhyve's start to the guest's shell.
const UP: Duration = Duration::from_secs(300);
/// FreeBSD's shell, and not what an earlier guest has left unread.
const PROMPT: &str = "(?s)BHYVE-RS GUEST UP.*bhyvers# ";
/// A command in the guest.
const COMMAND: Duration = Duration::from_secs(60);
/// A guest's devices: an entropy source, the disk as a transitional device.
const DEVICES: &str = "-s 3,virtio-rnd -s 4,virtio-blk,/tmp/disk";
/// Disks for drivers that most systems have.
const DRIVES: &str = "-s 7,nvme,/tmp/nvme -s 8,ahci,hd:/tmp/sata,cd:/tmp/disk";
/// Most exits to bhyve that a read of a block may take, in tenths.
const EXITS: u64 = 16;

/// Those of the bus, which every device needs.
pub const BUS: &[&str] = MODULES.split_at(5).0;

/// Debian's drivers, in the order of their dependencies.
const MODULES: [&str; 7] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
    "drivers/char/hw_random/virtio-rng.ko",
];

/// The host and its tests.
///
/// # Errors
/// The Linux guest's initramfs cannot be made.
pub fn group(lab: &Lab) -> Result<Group> {
    let mut config = Config::new(lab.engine, 256);
    let modules: Vec<(String, PathBuf)> = MODULES
        .iter()
        .map(|m| {
            let path = lab.kit.kernel.modules.join(m);
            Ok((base(&path)?, path))
        })
        .collect::<Result<_>>()?;
    let mut modules = [modules, super::net::modules(lab)?].concat();
    modules.push(("meter".to_owned(), meter::build(&lab.dirs)?));
    let initrd = host::guest_initrd_with(&lab.dirs, "guest-virtio", &modules)?;
    config.file("guest/linux", &lab.kit.kernel.image);
    config.file("guest/initrd", &initrd);
    let mut cases = vec![
        Case::new("virtio-linux", linux),
        super::net::case(lab, &mut config),
    ];
    let name = "virtio-freebsd";
    match images::local_freebsd(&lab.dirs) {
        Some(image) if image.mfsroot.is_some() => {
            config.file("guest/kernel", &image.kernel);
            if let Some(root) = &image.mfsroot {
                config.file("guest/root", root);
            }
            let modules = drive_modules(lab, &mut config).unwrap_or_else(|| {
                cases.push(Case::skipped(
                    "virtio-freebsd-drives",
                    "no modules/{cam,ahci,nvme,nvd}.ko in an image directory",
                ));
                Vec::new()
            });
            cases.push(Case::new(name, move |_, host| freebsd(host, &modules)));
        }
        _ => cases.push(Case::skipped(
            name,
            "no freebsd-12.1-smp.kernel and root in an image directory",
        )),
    }
    Ok(Group {
        name: "virtio".to_owned(),
        config,
        cases,
    })
}

/// FreeBSD's drivers of disks that are not virtio's, which our kernel of it has
/// not: arguments for bhyveload, if there are such modules.
fn drive_modules(lab: &Lab, config: &mut Config) -> Option<Vec<String>> {
    let names = ["cam", "ahci", "nvme", "nvd"].map(|n| format!("modules/{n}.ko"));
    let found = names.iter().map(|n| images::find(&lab.dirs, n));
    let found: Vec<PathBuf> = found.collect::<Option<_>>()?;
    for (name, path) in names.iter().zip(&found) {
        config.file(&format!("guest/{name}"), path);
    }
    Some(names.map(|n| format!("/guest/{n}")).into())
}

pub fn base(path: &Path) -> Result<String> {
    let name = path.file_name().context("a module without a name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Makes the disk: 16 MiB, with something to read at its tenth block.
fn disk(host: &mut Host) -> Result<()> {
    host.must(
        "dd if=/dev/zero of=/tmp/disk bs=1M count=16 && \
         printf 'the host was here\\n' | dd of=/tmp/disk bs=4096 seek=10 conv=notrunc",
        SHORT,
    )
    .map(drop)
}

/// Types a line; its output up to the mark that is typed behind it, in two
/// parts so that the echo does not look like it.
pub fn types(host: &mut Host, line: &str) -> Result<String> {
    types_within(host, line, COMMAND)
}

/// The same where it may take longer.
pub fn types_within(host: &mut Host, line: &str, limit: Duration) -> Result<String> {
    let console = host.guest();
    console.send(format!("{line}; echo lab-status=$? lab-'end'\r").as_bytes())?;
    let found: Found = console.expect(r"lab-status=(\d+) lab-end", limit)?;
    ensure!(
        found.group(1) == "0",
        "`{line}` in the guest gives status {}:\n{}",
        found.group(1),
        found.before
    );
    Ok(found.before)
}

/// As a power cut: nothing has a chance to tidy up.
pub fn kill(host: &mut Host, guest: &Guest) -> Result<()> {
    host.must("kill -9 $(pidof bhyve)", SHORT)?;
    guest.expect_exit(host, 128 + 9, SHORT)?;
    guest.destroy(host)
}

fn linux(lab: &Lab, host: &mut Host) -> Result<()> {
    disk(host)?;
    host.must("cp /tmp/disk /tmp/nvme", SHORT)?;
    // Two disks that the host has no room for.
    host.must(
        "mkdir -p /tmp/full && mount -t tmpfs -o size=512k none /tmp/full && \
         truncate -s 8M /tmp/full/a /tmp/full/b",
        SHORT,
    )?;
    let load = Load::Linux {
        initrd: Some("/guest/initrd".to_owned()),
        cmdline: counted_cmdline(lab.engine),
    };
    let mut guest = Guest::new("/guest/linux", load);
    guest.options = format!(
        "{DEVICES},serial=LAB-DISK -s 5,nvme,/tmp/nvme,ser=LAB-NVME \
         -s 6,virtio-blk,/tmp/full/a -s 7,nvme,/tmp/full/b"
    );
    guest.start(host)?;
    shell(host.guest(), UP)?;
    for module in MODULES {
        types(host, &format!("insmod /{}", base(Path::new(module))?))?;
    }
    let text = types(
        host,
        "cat /sys/block/vda/size /sys/block/vda/serial; \
         dd if=/dev/vda bs=4096 skip=10 count=1 2>/dev/null | head -n 1",
    )?;
    for wanted in ["32768", "LAB-DISK", "the host was here"] {
        ensure!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    if lab.engine.counts_instructions() {
        instructions_per_read(lab, host)?;
    }
    let random = types(
        host,
        "cat /sys/class/misc/hw_random/rng_current; dd if=/dev/hwrng bs=64 count=4 | md5sum",
    )?;
    ensure!(random.contains("virtio_rng"), "no virtio_rng:\n{random}");
    // A megabyte that both ends know, by way of requests of all sizes.
    types(
        host,
        "i=0; while [ $i -lt 4096 ]; do printf '%256d' $i; i=$((i+1)); done >/tmp/data; \
         dd if=/tmp/data of=/dev/vda bs=64k seek=16 && sync",
    )?;
    // The same on a disk that needs no virtio driver.
    let text = types(
        host,
        "cat /sys/block/nvme0n1/size /sys/class/nvme/nvme0/serial; \
         dd if=/dev/nvme0n1 bs=4096 skip=10 count=1 2>/dev/null | head -n 1; \
         dd if=/tmp/data of=/dev/nvme0n1 bs=64k seek=16 && sync",
    )?;
    for wanted in ["32768", "LAB-NVME", "the host was here"] {
        ensure!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    full(host)?;
    let sum = types(host, "md5sum </tmp/data")?;
    let sum = sum
        .lines()
        .find_map(|l| l.strip_suffix("  -"))
        .with_context(|| format!("no checksum in:\n{sum}"))?
        .to_owned();
    // Unread, the prompt would pass for the next guest's.
    host.guest().expect("guest# ", SHORT)?;
    kill(host, &guest)?;
    for disk in ["/tmp/disk", "/tmp/nvme"] {
        let seen = host.must(
            &format!("dd if={disk} bs=64k skip=16 count=16 2>/dev/null | md5sum"),
            SHORT,
        )?;
        ensure!(
            seen.contains(&sum),
            "the host sees {seen} on {disk}, not what the guest has written ({sum})"
        );
    }
    host.must("rm /tmp/disk /tmp/nvme; umount /tmp/full", SHORT)
        .map(drop)
}

/// What the host has no room for is an error in the guest, and nothing else is.
fn full(host: &mut Host) -> Result<()> {
    types(host, "dmesg -n 1")?;
    for disk in ["vdb", "nvme1n1"] {
        types(
            host,
            &format!(
                "! dd if=/tmp/data of=/dev/{disk} bs=64k conv=fsync && \
                 dmesg | grep -q ' dev {disk}, sector' && \
                 dd if=/dev/{disk} of=/dev/null bs=64k skip=64 count=8"
            ),
        )?;
    }
    Ok(())
}

fn freebsd(host: &mut Host, modules: &[String]) -> Result<()> {
    disk(host)?;
    let load = |modules: &[String]| Load::FreeBsd {
        mfsroot: Some("/guest/root".to_owned()),
        modules: modules.to_vec(),
    };
    let mut guest = Guest::new("/guest/kernel", load(modules));
    guest.environment.push("bhyvers.clocktest=0".to_owned());
    super::net::freebsd_prepares(host)?;
    guest.options = format!("{DEVICES} {}", super::net::FREEBSD);
    if !modules.is_empty() {
        host.must("cp /tmp/disk /tmp/nvme && cp /tmp/disk /tmp/sata", SHORT)?;
        guest.options = format!("{} {DRIVES}", guest.options);
    }
    guest.start(host)?;
    host.guest().expect(PROMPT, UP)?;
    let text = types(
        host,
        "dmesg | grep -E '^vt(blk|rnd)'; dd if=/dev/vtbd0 bs=4096 skip=10 count=1 2>/dev/null | head -n 1",
    )?;
    for wanted in ["vtblk0: 16MB", "vtrnd0", "the host was here"] {
        ensure!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    exits_per_read(host)?;
    super::net::freebsd(host)?;
    let sum = match modules {
        [] => None,
        _ => Some(drives(host)?),
    };
    types(
        host,
        "newfs -U /dev/vtbd0 && mkdir /tmp/disk && mount /dev/vtbd0 /tmp/disk && \
         echo the-guest-was-$((40+2)) >/tmp/disk/file && sync && sync && sleep 1",
    )?;
    kill(host, &guest)?;
    host.must("grep -q the-guest-was-42 /tmp/disk", SHORT)?;
    if let Some(sum) = sum {
        for disk in ["/tmp/nvme", "/tmp/sata"] {
            let line = format!("dd if={disk} bs=64k skip=240 count=8 2>/dev/null | md5sum");
            let seen = host.must(&line, SHORT)?;
            ensure!(seen.contains(&sum), "the host sees {seen} on {disk}: {sum}");
            host.must(&format!("grep -q other-file-42 {disk}; rm {disk}"), SHORT)?;
        }
    }

    // The data has outlived the machine, and a read-only disk stays as it is.
    host.must("tunctl -d tap0", SHORT)?;
    let before = host.must("md5sum /tmp/disk", SHORT)?;
    guest.options = format!("{DEVICES},ro");
    guest.load = load(&[]);
    guest.start(host)?;
    host.guest().expect(PROMPT, UP)?;
    let text = types(
        host,
        "mkdir /tmp/disk && mount -r /dev/vtbd0 /tmp/disk && cat /tmp/disk/file",
    )?;
    ensure!(
        text.contains("the-guest-was-42"),
        "the file has not survived:\n{text}"
    );
    types(
        host,
        "umount /tmp/disk; ! dd if=/dev/zero of=/dev/vtbd0 bs=512 count=1",
    )?;
    listed(host, "guest", "running")?;
    host.guest().send(b"shutdown -p now\r")?;
    guest.expect_exit(host, 1, Duration::from_secs(120))?;
    listed(host, "guest", "ended")?;
    guest.destroy(host)?;
    let after = host.must("md5sum /tmp/disk", SHORT)?;
    ensure!(before == after, "a read-only disk has changed");
    host.must("rm /tmp/disk", SHORT).map(drop)
}

/// What reading a block takes, guest and host together, by the committed baseline.
fn instructions_per_read(lab: &Lab, host: &mut Host) -> Result<()> {
    let text = types(host, "chmod +x /meter; /meter read /dev/vda 4096 300")?;
    let least = meter::reading(&text)?.least;
    baseline::check(&lab.dirs.root, "blk", &[("blk_read_4k_least", least)])
}

/// Disks that need no virtio driver, by FreeBSD's own: NVMe, and SATA with a CD
/// drive beside the disk. The MD5 of what was written to both disks.
fn drives(host: &mut Host) -> Result<String> {
    let text = types(
        host,
        "for d in nvd0 ada0 cd0; do echo $d $(dd if=/dev/$d bs=4096 skip=10 count=1 2>/dev/null | head -n 1); done",
    )?;
    for disk in ["nvd0", "ada0", "cd0"] {
        let wanted = format!("{disk} the host was here");
        ensure!(text.contains(&wanted), "no {wanted:?} in:\n{text}");
    }
    // A file system, whose unmounting flushes, and then a stretch of the disk.
    types(
        host,
        "mkdir /tmp/d; dd if=/dev/random of=/tmp/data bs=64k count=8",
    )?;
    for disk in ["nvd0", "ada0"] {
        types(
            host,
            &format!(
                "newfs -U /dev/{disk} && mount /dev/{disk} /tmp/d && \
                 echo other-file-$((40+2)) >/tmp/d/file && umount /tmp/d && \
                 dd if=/tmp/data of=/dev/{disk} bs=64k seek=240"
            ),
        )?;
    }
    let text = types(host, "md5 -q /tmp/data")?;
    let sum = text
        .lines()
        .map(str::trim)
        .find(|l| l.len() == 32 && l.bytes().all(|b| b.is_ascii_hexdigit()));
    Ok(sum
        .with_context(|| format!("no MD5 in:\n{text}"))?
        .to_owned())
}

/// The exits to bhyve that reading a block takes, from its own counters.
fn exits_per_read(host: &mut Host) -> Result<()> {
    const READS: u64 = 300;
    let exits = |host: &mut Host| -> Result<u64> {
        stats::userland_exits(&host.stats("guest", 1)?)
            .context("no count of exits in the VM's statistics")
    };
    let before = exits(host)?;
    types(host, "true")?;
    let idle = exits(host)?.saturating_sub(before);
    let before = exits(host)?;
    types(host, &format!("blkread /dev/vtbd0 4096 {READS} same"))?;
    let all = exits(host)?.saturating_sub(before).saturating_sub(idle);
    ensure!(
        all * 10 <= READS * EXITS,
        "{READS} reads of a block take {all} exits"
    );
    Ok(())
}
