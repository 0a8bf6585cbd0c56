//! Devices of the host's given to guests. Only QEMU emulates IOMMUs: VT-d and AMD-Vi,
//! both beside AMD-V. The host is Linux; its cloud kernel has a driver for VT-d, which
//! can be told to keep away, and for NVMe; none for AMD-Vi, none for e1000e.

use crate::cases::{guests, share};
use crate::guest::{Guest, Load, linux_cmdline, said, shell};
use crate::host::{self, Config, Host, SHORT};
use crate::machine::{Engine, Iommu};
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::time::Duration;

use super::virtio::types;

const UP: Duration = Duration::from_secs(400);
/// A transfer of edu's takes 100 ms.
const RUN: Duration = Duration::from_secs(300);
const EDU: &str = "0000:00:05.0";
const NIC: &str = "0000:00:06.0";
const NVME: &str = "0000:00:07.0";
/// What the guest writes to the disk, and sends and gets back.
const MIB: u32 = 4;
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
/// Set to a number, it is how often a guest with a device is killed.
const CYCLES: &str = "BHYVE_LAB_CYCLES";
/// As often in every run.
const FEW: u32 = 3;

/// The hosts and their tests.
///
/// # Errors
/// An image cannot be made.
pub fn groups(lab: &Lab) -> Result<Vec<Group>> {
    let small = Group {
        name: "passthru".to_owned(),
        config: config(lab, "small", 128, Iommu::Intel { interrupts: true })?,
        cases: vec![
            Case::new("passthru-words", words),
            Case::new("passthru-edu", edu),
            Case::new("passthru-cycles", cycles),
        ],
    };
    let mut vtd = Group {
        name: "passthru-own-vtd".to_owned(),
        config: config(lab, "vtd", 128, Iommu::Intel { interrupts: false })?,
        cases: vec![Case::new("passthru-own-vtd", |_, host| {
            // QEMU's unit keeps one fault of a function until it is read.
            own(
                host,
                Some("vmm: ppt 0/5/0: DMA write to 0xa000000 is not allowed"),
            )
        })],
    };
    vtd.config.cmdline = "intel_iommu=off".to_owned();
    let amdvi = Group {
        name: "passthru-own-amdvi".to_owned(),
        config: config(lab, "amdvi", 128, Iommu::Amd)?,
        cases: vec![Case::new("passthru-own-amdvi", |_, host| {
            // QEMU's unit says nothing of an entry that is not present.
            own(host, None)
        })],
    };
    let mut linux = Group {
        name: "passthru-linux".to_owned(),
        config: config(lab, "linux", 256, Iommu::Intel { interrupts: true })?,
        cases: Vec::new(),
    };
    linux.config.count_instructions = false;
    let name = "passthru-linux";
    match share::kernel(&lab.dirs, &lab.kit.kernel.release) {
        Err(e) => {
            let why = format!("Debian's usual kernel cannot be had: {e:#}");
            linux.cases.push(Case::skipped(name, &why));
        }
        Ok((image, modules)) => {
            let modules: Vec<(String, PathBuf)> = MODULES
                .iter()
                .map(|m| Ok((share::base(m)?, modules.join(m))))
                .collect::<Result<_>>()?;
            let initrd = host::guest_initrd_with(&lab.dirs, "passthru-guest", &modules)?;
            linux.config.file("guest/linux", &image);
            linux.config.file("guest/initrd", &initrd);
            linux.cases.push(Case::new(name, devices));
        }
    }
    Ok(vec![small, linux, vtd, amdvi])
}

fn config(lab: &Lab, name: &str, guest_mib: u32, iommu: Iommu) -> Result<Config> {
    // Of the engines only this one has an IOMMU.
    let mut config = Config::new(Engine::Qemu, guest_mib);
    config.count_instructions = true;
    config.cmdline = "intel_iommu=on".to_owned();
    config.pci.iommu = iommu;
    // One each: the hosts may run at the same time.
    let disk = lab.dirs.fresh(&format!("passthru-disk-{name}"))?;
    let disk = disk.join("disk");
    std::fs::File::create(&disk)?.set_len(64 << 20)?;
    let drive = format!("file={},if=none,id=disk,format=raw", disk.display());
    for word in [
        "-device",
        "edu,addr=5.0",
        "-netdev",
        "user,id=net,restrict=on,guestfwd=tcp:10.0.2.100:7-cmd:cat",
        "-device",
        "e1000e,netdev=net,addr=6.0",
        "-drive",
        &drive,
        "-device",
        "nvme,drive=disk,serial=lab,addr=7.0",
    ] {
        config.pci.arguments.push(word.to_owned());
    }
    for guest in &lab.kit.guests {
        if guest.ends_with("edu") {
            config.file("guests/edu", guest);
        }
    }
    Ok(config)
}

/// Gives a function to ppt by the words that `bhyvectl passthru list` prints.
fn to_ppt(host: &mut Host, name: &str) -> Result<()> {
    let folder = format!("/sys/bus/pci/devices/{name}");
    let line = format!(
        "echo ppt >{folder}/driver_override; \
         if [ -e {folder}/driver ]; then echo {name} >{folder}/driver/unbind; fi; \
         echo {name} >/sys/bus/pci/drivers_probe; readlink {folder}/driver"
    );
    let driver = host.must(&line, SHORT)?;
    ensure!(driver.trim().ends_with("/ppt"), "{name} has {driver}");
    Ok(())
}

/// Gives it back to whoever of the host wants it.
fn to_host(host: &mut Host, name: &str) -> Result<()> {
    let folder = format!("/sys/bus/pci/devices/{name}");
    let line = format!(
        "echo >{folder}/driver_override; echo {name} >{folder}/driver/unbind; \
         echo {name} >/sys/bus/pci/drivers_probe"
    );
    host.must(&line, SHORT).map(drop)
}

fn small(options: &str) -> Guest {
    let mut guest = guests::small("edu");
    guest.load_options = "-S".to_owned();
    guest.options = format!("-S {options}");
    guest
}

/// What is in the way is said by both programs, in the same words; and what to type
/// helps.
fn words(_: &Lab, host: &mut Host) -> Result<()> {
    let list = host.must("bhyvectl passthru list", SHORT)?;
    let line = |name: &str| {
        let line = list.lines().find(|l| l.starts_with(name));
        line.with_context(|| format!("no {name} in:\n{list}"))
    };
    ensure!(line("0000:00:00.0")?.contains("no: is a part of"), "{list}");
    ensure!(line(NVME)?.contains("nvme"), "{list}");
    ensure!(line(EDU)?.ends_with("not yet, see below"), "{list}");
    let said = format!("{EDU} (0/5/0) cannot be passed:");
    let advice: Vec<&str> = list
        .lines()
        .skip_while(|l| *l != said)
        .take_while(|l| !l.is_empty())
        .collect();
    ensure!(advice.len() > 2, "no advice for {EDU} in:\n{list}");
    let mut guest = small("-s 5,passthru,0/5/0");
    guest.start(host)?;
    guest.expect_exit(host, 4, SHORT)?;
    let error = host.must("cat /tmp/bhyve.err", SHORT)?;
    for line in &advice {
        ensure!(error.contains(line), "not {line:?}, but\n{error}");
    }
    for command in advice.iter().filter_map(|l| l.strip_prefix("    ")) {
        host.must(command, SHORT)?;
    }
    let list = host.must("bhyvectl passthru list", SHORT)?;
    let edu = list.lines().find(|l| l.starts_with(EDU));
    ensure!(edu.is_some_and(|l| l.ends_with("yes")), "{list}");
    guest.destroy(host)?;
    // Memory that is not wired.
    guest.options = "-s 5,passthru,0/5/0".to_owned();
    guest.start(host)?;
    guest.expect_exit(host, 4, SHORT)?;
    let error = host.must("cat /tmp/bhyve.err", SHORT)?;
    ensure!(error.contains("give -S"), "{error}");
    guest.destroy(host)?;
    to_host(host, EDU)
}

/// Registers, a thousand interrupts, DMA, DMA to where the guest has no memory.
fn edu(_: &Lab, host: &mut Host) -> Result<()> {
    to_ppt(host, EDU)?;
    let text = guests::passes(host, &small("-s 5,passthru,0/5/0"))?;
    let cost = text
        .lines()
        .find_map(|l| l.strip_prefix("edu: interrupt "))
        .context("it has not counted interrupts")?;
    println!("passthru-edu: an interrupt takes (least, mean) {cost} instructions");
    let log = host.must("dmesg", SHORT)?;
    ensure!(
        log.contains("DMAR") && log.contains("00:05.0"),
        "DMA to nowhere is not in the host's log:\n{log}"
    );
    to_host(host, EDU)
}

/// The host's kernel does not use the IOMMU: our own driver does. It remaps no
/// interrupts, which has to be allowed. `fault`: what it finds of DMA to nowhere.
fn own(host: &mut Host, fault: Option<&str>) -> Result<()> {
    to_ppt(host, EDU)?;
    let guest = small("-s 5,passthru,0/5/0");
    guest.start(host)?;
    guest.expect_exit(host, 4, SHORT)?;
    let error = host.must("cat /tmp/bhyve.err", SHORT)?;
    ensure!(error.contains("unsafe_interrupts"), "{error}");
    guest.destroy(host)?;
    host.must(
        "echo 1 >/sys/module/vmm/parameters/unsafe_interrupts",
        SHORT,
    )?;
    guests::passes(host, &guest)?;
    let log = host.must("dmesg", SHORT)?;
    for line in ["vmm: the IOMMU at "].into_iter().chain(fault) {
        ensure!(log.contains(line), "no {line:?} in the log:\n{log}");
    }
    to_host(host, EDU)?;
    cycle(host, 1)
}

/// bhyve killed while the device does DMA, again and again; the host can use the
/// device each time.
fn cycles(_: &Lab, host: &mut Host) -> Result<()> {
    let count = match std::env::var(CYCLES) {
        Ok(n) => n.parse().with_context(|| format!("{CYCLES}={n}"))?,
        Err(_) => FEW,
    };
    for n in 1..=count {
        cycle(host, n).with_context(|| format!("round {n} of {count}"))?;
    }
    Ok(())
}

fn cycle(host: &mut Host, n: u32) -> Result<()> {
    to_ppt(host, EDU)?;
    to_ppt(host, NVME)?;
    let mut guest = small("-s 5,passthru,0/5/0 -s 7,passthru,0/7/0");
    guest.environment.push("guest.wait=1".to_owned());
    guest.start(host)?;
    host.guest()
        .expect("edu: busy", RUN)
        .map_err(|e| e.context(said(host)))?;
    host.must("kill -9 $(pidof bhyve)", SHORT)?;
    guest.expect_exit(host, 128 + 9, SHORT)?;
    // A device that goes on would be seen here.
    let line = format!(
        "dd if=/sys/bus/pci/devices/{EDU}/config bs=1 skip=4 count=1 2>/dev/null | od -An -tx1"
    );
    let command = host.must(&line, SHORT)?;
    let command =
        u8::from_str_radix(command.trim(), 16).with_context(|| format!("no byte: {command:?}"))?;
    ensure!(command & 4 == 0, "edu is bus master still: {command:#x}");
    guest.destroy(host)?;
    to_host(host, EDU)?;
    to_host(host, NVME)?;
    // The host's own driver reads and writes the disk.
    let line = format!(
        "i=0; while [ ! -b /dev/nvme0n1 ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.1; done; \
         echo round {n} | dd of=/dev/nvme0n1 bs=512 conv=sync,fsync 2>/dev/null && \
         echo 3 >/proc/sys/vm/drop_caches && head -c 16 /dev/nvme0n1"
    );
    let read = host.must(&line, SHORT)?;
    ensure!(
        read.contains(&format!("round {n}")),
        "the disk has {read:?}"
    );
    Ok(())
}

/// An Ethernet card and a disk, driven by Linux's own drivers.
fn devices(_: &Lab, host: &mut Host) -> Result<()> {
    to_ppt(host, NIC)?;
    to_ppt(host, NVME)?;
    let load = Load::Linux {
        initrd: Some("/guest/initrd".to_owned()),
        cmdline: linux_cmdline(),
    };
    let mut guest = Guest::new("/guest/linux", load);
    guest.load_options = "-S".to_owned();
    guest.options = "-S -s 6,passthru,0/6/0 -s 7,passthru,ppt1".to_owned();
    guest.start(host)?;
    let done = driven(host);
    if let Err(e) = done {
        return Err(e.context(said(host)));
    }
    let sum = done?;
    host.guest().send(b"poweroff\r")?;
    guest.expect_exit(host, 1, UP)?;
    guest.destroy(host)?;
    to_host(host, NVME)?;
    let line = format!(
        "i=0; while [ ! -b /dev/nvme0n1 ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.1; done; \
         head -c {}m /dev/nvme0n1 | md5sum",
        MIB
    );
    let read = host.must(&line, SHORT)?;
    ensure!(read.contains(&sum), "the host reads {read}, not {sum}");
    Ok(())
}

fn driven(host: &mut Host) -> Result<String> {
    shell(host.guest(), UP)?;
    for module in MODULES {
        types(host, &format!("insmod /{}", share::base(module)?))?;
    }
    let sum = types(
        host,
        &format!(
            "dd if=/dev/urandom of=/tmp/data bs=1M count={MIB} 2>/dev/null; md5sum </tmp/data"
        ),
    )?;
    let sum = sum
        .lines()
        .find_map(|l| l.strip_suffix("  -"))
        .with_context(|| format!("no checksum in:\n{sum}"))?
        .to_owned();
    // The disk.
    types(
        host,
        "i=0; while [ ! -b /dev/nvme0n1 ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.1; done; \
         dd if=/tmp/data of=/dev/nvme0n1 bs=128k conv=fsync",
    )?;
    // The card: what is sent comes back.
    types(
        host,
        "ifconfig eth0 10.0.2.15 up; i=0; \
         while [ \"$(cat /sys/class/net/eth0/carrier)\" != 1 ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.1; done",
    )?;
    let back = types(
        host,
        &format!(
            "(cat /tmp/data; sleep 100) | nc 10.0.2.100 7 | head -c {}m | md5sum",
            MIB
        ),
    )?;
    ensure!(back.contains(&sum), "what comes back is {back}, not {sum}");
    let counts = types(host, "grep -E 'eth0|nvme' /proc/interrupts")?;
    ensure!(
        counts.contains("eth0-rx") || counts.contains("PCI-MSI"),
        "no messages:\n{counts}"
    );
    println!("passthru-linux: {}", counts.trim().replace('\n', "\n    "));
    Ok(sum)
}
