//! Drives of an AHCI adapter, and interrupts of each kind.

use super::super::virtio::types;
use super::sum;
use crate::host::{Host, SHORT};
use anyhow::{Result, ensure};

/// The disk is read, written and flushed, the CD read.
pub fn ahci(host: &mut Host) -> Result<()> {
    let want = host.must("cat /tmp/disk /tmp/cd | md5sum", SHORT)?;
    let text = types(
        host,
        "i=0; until [ -e /dev/sda -a -e /dev/sr0 ]; do sleep 1; i=$((i+1)); [ $i -lt 30 ] || break; \
         done; cat /dev/sda /dev/sr0 | md5sum; cat /sys/block/sda/size /sys/block/sr0/size",
    )?;
    ensure!(
        sum(&text)? == sum(&want)? && text.contains("8192") && text.contains("2048"),
        "host {want}, guest {text}"
    );
    let text = types(
        host,
        "dd if=/tmp/data of=/dev/sda bs=64k seek=16 && sync && md5sum </tmp/data",
    )?;
    let seen = host.must("dd if=/tmp/disk bs=64k skip=16 count=32 | md5sum", SHORT)?;
    ensure!(
        sum(&seen)? == sum(&text)?,
        "the guest writes {text}, the host sees {seen}"
    );
    Ok(())
}

/// What the guest says of an interrupt with `device` in its name: a line of
/// /proc/interrupts.
const LINES: &str = "grep -E 'ahci|virtio' /proc/interrupts";

/// MSI-X and MSI are what drivers take; without either a line does.
pub fn interrupts(host: &mut Host) -> Result<()> {
    let text = types(
        host,
        "cd /sys/bus/pci/devices; cat 0000:00:03.0/msi_irqs/* 0000:00:08.0/msi_irqs/* | sort -u",
    )?;
    ensure!(
        text.lines().any(|l| l.trim() == "msi") && text.lines().any(|l| l.trim() == "msix"),
        "neither MSI nor MSI-X:\n{text}"
    );
    types(
        host,
        "d=0000:00:08.0; echo $d >$d/driver/unbind; echo 0 >$d/msi_bus; echo $d >/sys/bus/pci/drivers/ahci/bind; \
         d=0000:00:03.0; echo $d >$d/driver/unbind; echo 0 >$d/msi_bus; echo $d >/sys/bus/pci/drivers/virtio-pci/bind; cd /; \
         i=0; until [ -e /dev/sda ]; do sleep 1; i=$((i+1)); [ $i -lt 30 ] || break; done; sleep 1",
    )?;
    let want = host.must("md5sum </tmp/disk; md5sum </tmp/share/hard", SHORT)?;
    let text = types(
        host,
        "mount -t 9p -o trans=virtio,version=9p2000.L share /mnt/a; \
         md5sum </dev/sda; md5sum </mnt/a/hard; umount /mnt/a",
    )?;
    let sums = |text: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|l| l.trim().strip_suffix("  -"));
        lines.map(str::to_owned).collect()
    };
    ensure!(
        sums(&text) == sums(&want) && sums(&text).len() == 2,
        "without MSI the guest reads {text}, not {want}"
    );
    let text = types(host, LINES)?;
    for name in ["ahci", "virtio"] {
        let counts = |l: &str| l.contains(name) && l.contains("IO-APIC") && !l.contains(": 0 ");
        ensure!(
            text.lines()
                .any(|l| counts(&l.split_whitespace().collect::<Vec<_>>().join(" "))),
            "{name} has no line:\n{text}"
        );
    }
    Ok(())
}
