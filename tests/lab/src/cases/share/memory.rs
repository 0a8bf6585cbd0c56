//! Memory that a guest does not need, seen in the host's.

use super::super::virtio::types;
use super::number;
use crate::host::{Host, SHORT};
use anyhow::{Context, Result, ensure};

/// What the guest uses and frees again, MiB.
const USED: u64 = 96;

/// The balloon that has free pages reported, and the one that has not.
const REPORTS: &str = "/tmp/balloon";
const INFLATES: &str = "/tmp/fixed-balloon";
/// Has the guest write to its memory, and free it.
const FILLS: &str = "mkdir -p /tmp/big && mount -t tmpfs big /tmp/big && \
     dd if=/dev/zero of=/tmp/big/file bs=1M count=96";

/// What a balloon's control socket answers.
fn ask(host: &mut Host, balloon: &str, line: &str) -> Result<String> {
    host.must(
        &format!("(echo '{line}'; sleep 3) | timeout 20 /sock unix {balloon} | head -n 1"),
        SHORT,
    )
}

/// MiB that the host has free.
fn free(host: &mut Host) -> Result<u64> {
    let text = host.must(
        "echo 3 >/proc/sys/vm/drop_caches; grep MemFree /proc/meminfo",
        SHORT,
    )?;
    let kib = text.split_whitespace().nth(1).context("no MemFree")?;
    Ok(kib.parse::<u64>()? >> 10)
}

/// MiB of the guest's memory that are there, as `bhyvectl` says.
fn resident(host: &mut Host) -> Result<u64> {
    let text = host.must("bhyvectl list --json", SHORT)?;
    Ok(number(&text, "resident")? >> 20)
}

/// Has another process map the guest's memory, by another node of the VM's device
/// than bhyve's: what a guest gives back goes all the same.
fn hold(host: &mut Host) -> Result<()> {
    host.must(
        "mknod /tmp/node c $((0x$(stat -c %t /dev/vmm/guest))) $((0x$(stat -c %T /dev/vmm/guest))) && \
         chmod +x /hold && (/hold /tmp/node 256 >/tmp/held 2>&1 &) && \
         timeout 30 sh -c 'until grep held /tmp/held; do sleep 1; done' || (cat /tmp/held; false)",
        SHORT,
    )
    .map(drop)
}

/// Free pages are reported, and a balloon takes and gives back.
pub fn balloon(host: &mut Host) -> Result<()> {
    hold(host)?;
    // What the guest frees goes back by itself.
    let before = number(&ask(host, REPORTS, "stats")?, "released")?;
    types(host, FILLS)?;
    let full = free(host)?;
    types(host, "umount /tmp/big; sleep 6")?;
    let stats = ask(host, REPORTS, "stats")?;
    let released = (number(&stats, "released")? - before) >> 20;
    let freed = free(host)?;
    ensure!(
        released >= USED / 2 && freed >= full + USED / 2,
        "the guest frees {USED} MiB, reports {stats}, {released} MiB go back; free in the host: \
         {full} MiB before, {freed} MiB after"
    );
    ensure!(
        number(&stats, "total_memory")? >> 20 > 150,
        "statistics: {stats}"
    );

    // Without reports it does not, until the balloon has it.
    let inode = "/sys/bus/pci/devices/0000:00:05.0/virtio*";
    types(
        host,
        &format!(
            "basename {inode} >/sys/bus/virtio/drivers/virtio_balloon/unbind; {FILLS}; umount /tmp/big; sleep 3"
        ),
    )?;
    let (full, held) = (free(host)?, resident(host)?);
    let answer = ask(host, INFLATES, &format!("size {USED}M"))?;
    ensure!(answer.contains("ok"), "the balloon says {answer}");
    let mut stats = String::new();
    for _ in 0..10 {
        stats = ask(host, INFLATES, "stats")?;
        if number(&stats, "actual")? >> 20 == USED {
            break;
        }
    }
    let inflated = free(host)?;
    ensure!(
        number(&stats, "actual")? >> 20 == USED && inflated >= full + USED / 2,
        "a balloon of {USED} MiB: {stats}; free in the host: {full} MiB before, {inflated} MiB after"
    );
    let left = resident(host)?;
    ensure!(
        held >= USED && left + USED / 2 <= held,
        "bhyvectl says {held} MiB before, {left} MiB after"
    );
    // What comes back is zeroed by the host, and the guest's to write to.
    ask(host, INFLATES, "size 0")?;
    let text = types(
        host,
        "sleep 3; mount -t tmpfs big /tmp/big && cp /tmp/data /tmp/big/ && cmp /tmp/data /tmp/big/data && \
         dd if=/dev/zero of=/tmp/big/zero bs=1M count=96 && umount /tmp/big",
    )?;
    ensure!(!text.contains("differ"), "memory is not kept:\n{text}");
    host.must("kill $(pidof hold) && rm /tmp/node", SHORT)
        .map(drop)
}
