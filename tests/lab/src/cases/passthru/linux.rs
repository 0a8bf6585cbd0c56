//! An Ethernet card, a disk and QEMU's edu, all at once, driven by Linux.

use super::{EDU, MIB, NIC, NVME, UP, config, host_reads, quiet, seconds, to_host, to_ppt};
use crate::cases::share;
use crate::cases::virtio::{types, types_within};
use crate::command::output;
use crate::dirs::Dirs;
use crate::guest::{Guest, Load, linux_cmdline, said, shell};
use crate::host::{self, Host, SHORT};
use crate::host_kernel;
use crate::machine::Iommu;
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// In the order of their dependencies.
const MODULES: [&str; 8] = [
    "crypto/crct10dif_common.ko",
    "lib/crc-t10dif.ko",
    "lib/crc64.ko",
    "lib/crc64-rocksoft.ko",
    "block/t10-pi.ko",
    "drivers/nvme/host/nvme-core.ko",
    "drivers/nvme/host/nvme.ko",
    "drivers/net/ethernet/intel/e1000e/e1000e.ko",
];
/// What the guest's drivers say when they wait for an interrupt that does not come.
/// The card's says so after 5 s by a clock that goes on when an emulator stalls: that
/// its traffic ends tells as much.
const LOST: &str = "nvme.*timeout|is lost";

/// The host and its test.
pub fn group(lab: &Lab) -> Result<Group> {
    let name = "passthru-linux";
    let mut group = Group {
        name: name.to_owned(),
        config: config(lab, "linux", 256, Iommu::Intel { interrupts: true })?,
        cases: Vec::new(),
    };
    group.config.count_instructions = false;
    let debians = share::kernel(&lab.dirs, &lab.kit.kernel.release).and_then(|kernel| {
        let headers = host_kernel::usual_headers(&lab.dirs, &lab.kit.kernel)?;
        Ok((kernel, headers))
    });
    match debians {
        Err(e) => {
            let why = format!("Debian's usual kernel cannot be had: {e:#}");
            group.cases.push(Case::skipped(name, &why));
        }
        Ok(((image, modules), headers)) => {
            let mut files: Vec<(String, PathBuf)> = MODULES
                .iter()
                .map(|m| Ok((share::base(m)?, modules.join(m))))
                .collect::<Result<_>>()?;
            files.push(("edu.ko".to_owned(), driver(&lab.dirs, &headers)?));
            files.push(("traffic".to_owned(), traffic(&lab.dirs)?));
            let initrd = host::guest_initrd_with(&lab.dirs, "passthru-guest", &files)?;
            group.config.file("guest/linux", &image);
            group.config.file("guest/initrd", &initrd);
            group.cases.push(Case::new(name, devices));
        }
    }
    Ok(group)
}

/// edu's driver, which Linux does not have.
fn driver(dirs: &Dirs, headers: &Path) -> Result<PathBuf> {
    let dir = dirs.fresh("edu")?;
    fs::write(dir.join("Kbuild"), include_str!("../../../host/edu/Kbuild"))?;
    fs::write(dir.join("edu.c"), include_str!("../../../host/edu/edu.c"))?;
    let mut make = Command::new("make");
    make.arg("-C").arg(headers);
    make.arg(format!("M={}", dir.display())).arg("modules");
    output(make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL"))?;
    let module = dir.join("edu.ko");
    output(Command::new("strip").arg("--strip-debug").arg(&module))?;
    Ok(module)
}

/// What keeps the card and the disk busy.
fn traffic(dirs: &Dirs) -> Result<PathBuf> {
    share::c_program(dirs, "traffic", include_str!("../../../host/traffic.c"))
}

fn devices(_: &Lab, host: &mut Host) -> Result<()> {
    for function in [EDU, NIC, NVME] {
        to_ppt(host, function)?;
    }
    let load = Load::Linux {
        initrd: Some("/guest/initrd".to_owned()),
        cmdline: linux_cmdline(),
    };
    let mut guest = Guest::new("/guest/linux", load);
    guest.load_options = "-S".to_owned();
    guest.options = "-S -s 5,passthru,0/5/0 -s 6,passthru,0/6/0 -s 7,passthru,ppt2".to_owned();
    let sum = guests_time(host, &guest).map_err(|e| e.context(said(host)))?;
    for function in [EDU, NIC, NVME] {
        quiet(host, function)?;
    }
    guest.destroy(host)?;
    for function in [EDU, NIC, NVME] {
        to_host(host, function)?;
    }
    host_reads(host, &sum)
}

/// A guest that is busy, that is rebooted while it is, and that powers itself off.
/// The MD5 of what the disk has at last.
fn guests_time(host: &mut Host, guest: &Guest) -> Result<String> {
    host.must(
        "touch /tmp/go; (n=0; while [ -e /tmp/go ]; do head -c 64k /dev/urandom | md5sum >/dev/null; \
         n=$((n+1)); echo $n >/tmp/round; mv /tmp/round /tmp/rounds; sleep 0.2; done) >/dev/null 2>&1 &",
        SHORT,
    )?;
    up(host, guest)?;
    let rounds = |host: &mut Host| -> Result<u64> {
        let n = host.must("cat /tmp/rounds", SHORT)?;
        n.trim().parse().with_context(|| format!("rounds: {n:?}"))
    };
    let before = rounds(host)?;
    busy(host, seconds()?)?;
    ensure!(rounds(host)? > before, "the host does not get on");
    // In the middle of DMA, and without a word to the drivers. Not the card's: QEMU's
    // goes on receiving after its reset, into what its rings have become.
    types(
        host,
        "ifconfig eth0 down; /traffic 100 - 0 /dev/nvme0n1 >/dev/null & sleep 1; insmod /edu.ko",
    )?;
    host.guest().send(b"echo b >/proc/sysrq-trigger\r")?;
    guest.expect_exit(host, 0, UP)?;
    for function in [EDU, NIC, NVME] {
        quiet(host, function)?;
    }
    up(host, guest)?;
    busy(host, 3)?;
    let sum = types(
        host,
        &format!(
            "dd if=/dev/urandom of=/tmp/data bs=1M count={MIB} 2>/dev/null; md5sum </tmp/data; \
             dd if=/tmp/data of=/dev/nvme0n1 bs=128k conv=fsync"
        ),
    )?;
    let sum = sum
        .lines()
        .find_map(|l| l.strip_suffix("  -"))
        .with_context(|| format!("no checksum in:\n{sum}"))?
        .to_owned();
    host.guest().send(b"poweroff\r")?;
    guest.expect_exit(host, 1, UP)?;
    host.must("rm /tmp/go", SHORT)?;
    Ok(sum)
}

/// Starts the guest, and its drivers but edu's.
fn up(host: &mut Host, guest: &Guest) -> Result<()> {
    guest.start(host)?;
    host.guest().expect("guest userland: Linux", UP)?;
    shell(host.guest(), UP)?;
    for module in MODULES {
        types(host, &format!("insmod /{}", share::base(module)?))?;
    }
    types(
        host,
        "i=0; while [ ! -b /dev/nvme0n1 ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.1; done; \
         chmod +x /traffic; ifconfig eth0 10.0.2.15 up; i=0; \
         while [ \"$(cat /sys/class/net/eth0/carrier)\" != 1 ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.1; done",
    )?;
    Ok(())
}

/// All three at work for so long: everything arrives as it was sent, and no interrupt
/// is waited for in vain.
fn busy(host: &mut Host, seconds: u32) -> Result<()> {
    types(host, "dmesg -c >/dev/null; insmod /edu.ko")?;
    let limit = Duration::from_secs(u64::from(seconds) * 4) + UP;
    let traffic = types_within(
        host,
        &format!("/traffic {seconds} 10.0.2.100 7 /dev/nvme0n1"),
        limit,
    )?;
    let edu = types(
        host,
        "echo 0000:00:05.0 >/sys/bus/pci/drivers/edu/unbind; cd /sys/module/edu/parameters; \
         grep . *; cd /; cat /proc/interrupts >/tmp/interrupts; rmmod edu",
    )?;
    let count = |name: &str| -> Result<u64> {
        let value = edu
            .lines()
            .find_map(|l| l.trim().strip_prefix(name)?.strip_prefix(':'));
        let value = value.with_context(|| format!("no {name} in:\n{edu}"))?;
        Ok(value.parse()?)
    };
    let (asked, came) = (count("asked")?, count("came")?);
    ensure!(
        asked == came && asked > 0,
        "of {asked} interrupts that edu was asked for, {came} came"
    );
    let (transfers, wrong) = (count("transfers")?, count("wrong")?);
    ensure!(
        transfers > 0 && wrong == 0,
        "{wrong} bytes of {transfers} transfers are wrong"
    );
    let kernel = types(host, &format!("! dmesg | grep -iE '{LOST}'"))?;
    println!(
        "passthru-linux: {seconds} s: edu: {came} interrupts, {transfers} transfers; {}",
        lines(&traffic, "traffic: ").join("; ")
    );
    let guests = types(host, "grep -E 'eth0|nvme' /tmp/interrupts")?;
    let hosts = host.must("grep ppt /proc/interrupts", SHORT)?;
    println!(
        "passthru-linux: the guest's interrupts:\n    {}\nand the host's:\n    {}",
        lines(&guests, "").join("\n    "),
        lines(&hosts, "").join("\n    ")
    );
    for name in ["eth0-rx", "nvme0q1"] {
        let line = guests.lines().find(|l| l.contains(name));
        let came = line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok());
        ensure!(
            came.is_some_and(|n| n > 0),
            "no messages of {name}:\n{guests}{kernel}"
        );
    }
    Ok(())
}

/// Lines that start so, and have counts in them.
fn lines(text: &str, start: &str) -> Vec<String> {
    let counts = |l: &&str| l.starts_with(start) && l.contains(char::is_numeric);
    let lines = text.lines().map(str::trim).filter(counts);
    lines.map(str::to_owned).collect()
}
