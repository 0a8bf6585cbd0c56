//! A disk, driven by FreeBSD 12.1's nvme(4).

use super::{MIB, NVME, UP, config, host_reads, quiet, seconds, to_host, to_ppt};
use crate::cases::virtio::{types, types_within};
use crate::guest::{Guest, Load, said};
use crate::host::{Host, SHORT};
use crate::images;
use crate::machine::Iommu;
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

const NAME: &str = "passthru-freebsd";
/// FreeBSD's modules for the image's kernel.
const MODULES: [&str; 3] = ["cam", "nvme", "nvd"];
const PROMPT: &str = "(?s)BHYVE-RS GUEST UP.*bhyvers# ";
/// What the driver says when it waits for an interrupt that does not come.
const LOST: &str = "nvme.*(timeout|missing interrupt|resetting)";

/// The host and its test.
pub fn group(lab: &Lab) -> Result<Group> {
    let mut group = Group {
        name: NAME.to_owned(),
        config: config(lab, "freebsd", 256, Iommu::Intel { interrupts: true })?,
        cases: Vec::new(),
    };
    group.config.count_instructions = false;
    let image = images::local_freebsd(&lab.dirs).and_then(|i| Some((i.kernel, i.mfsroot?)));
    let modules: Option<Vec<_>> = MODULES
        .iter()
        .map(|m| images::find(&lab.dirs, &format!("modules/{m}.ko")))
        .collect();
    let (Some((kernel, root)), Some(modules)) = (image, modules) else {
        let why = "no freebsd-12.1-smp.kernel, root, modules/cam.ko, nvme.ko and nvd.ko in an image \
                   directory";
        group.cases.push(Case::skipped(NAME, why));
        return Ok(group);
    };
    group.config.file("guest/kernel", &kernel);
    group.config.file("guest/root", &root);
    for (name, module) in MODULES.iter().zip(&modules) {
        group.config.file(&format!("guest/{name}.ko"), module);
    }
    group.cases.push(Case::new(NAME, devices));
    Ok(group)
}

fn devices(_: &Lab, host: &mut Host) -> Result<()> {
    to_ppt(host, NVME)?;
    let load = Load::FreeBsd {
        mfsroot: Some("/guest/root".to_owned()),
        modules: MODULES.map(|m| format!("/guest/{m}.ko")).to_vec(),
    };
    let mut guest = Guest::new("/guest/kernel", load);
    guest.environment.push("bhyvers.clocktest=0".to_owned());
    guest.load_options = "-S".to_owned();
    guest.options = "-S -s 7,passthru,0/7/0".to_owned();
    guest.start(host)?;
    let sum = busy(host).map_err(|e| e.context(said(host)))?;
    host.guest().send(b"shutdown -p now\r")?;
    guest.expect_exit(host, 1, UP)?;
    quiet(host, NVME)?;
    guest.destroy(host)?;
    to_host(host, NVME)?;
    host_reads(host, &sum)
}

/// The disk at work, by two programs at once. The MD5 of what it begins with.
fn busy(host: &mut Host) -> Result<String> {
    host.guest().expect(PROMPT, UP)?;
    let found = types(
        host,
        "dmesg | grep -E '^(nvme0|nvd0):'; ls -l /dev/nvd0; dmesg -c >/dev/null",
    )?;
    ensure!(found.contains("nvd0: <"), "no disk in:\n{found}");
    let seconds = seconds()?;
    let sum = types(
        host,
        &format!("dd if=/dev/random of=/tmp/data bs=1m count={MIB} 2>/dev/null; md5 -q /tmp/data"),
    )?;
    let is_sum = |l: &&str| l.len() == 32 && l.chars().all(|c| c.is_ascii_hexdigit());
    let sum = sum
        .lines()
        .map(str::trim)
        .find(is_sum)
        .with_context(|| format!("no checksum in:\n{sum}"))?
        .to_owned();
    // Each in its half, one place after another written, and read; no two alike. In short
    // lines: what is typed beyond 384 characters before FreeBSD looks may get lost.
    for line in [
        format!(
            "piece() {{ (tail -c +$(($2*8+$1+9)) /tmp/data; cat /tmp/data) | \
             head -c $(({MIB}*1048576)) >/tmp/half$1; }}"
        ),
        "put() { dd if=/tmp/half$1 of=/dev/nvd0 bs=128k seek=$2 2>/dev/null; }".to_owned(),
        "get() { dd if=/dev/nvd0 bs=128k skip=$2 count=32 2>/dev/null | cmp -s - /tmp/half$1; }"
            .to_owned(),
        "both() { at=$((($1+k%7)*32)); piece $1 $k; put $1 $at && get $1 $at || bad=$((bad+1)); }"
            .to_owned(),
        format!(
            "half() {{ k=0; bad=0; end=$(($(date +%s)+{seconds})); \
             while [ $k = 0 ] || [ $(date +%s) -lt $end ]; do both $1; k=$((k+1)); done; \
             echo half $1: times=$k bad=$bad; }}"
        ),
    ] {
        types(host, &line)?;
    }
    let limit = Duration::from_secs(u64::from(seconds) * 4) + UP;
    let text = types_within(
        host,
        "half 0 >/tmp/first & half 8; wait; cat /tmp/first; vmstat -i",
        limit,
    )?;
    ensure!(
        text.matches(" bad=0").count() == 2,
        "the disk does not keep what is written:\n{text}"
    );
    // What the host looks for.
    types(host, "dd if=/tmp/data of=/dev/nvd0 bs=128k 2>/dev/null")?;
    types(host, &format!("! dmesg | grep -iE '{LOST}'"))?;
    let hosts = host.must("grep ppt /proc/interrupts", SHORT)?;
    let told = |l: &&str| ["half ", "nvme0", "ppt"].iter().any(|w| l.contains(w));
    println!(
        "passthru-freebsd: {seconds} s\n    {}",
        text.lines()
            .chain(hosts.lines())
            .map(str::trim)
            .filter(told)
            .collect::<Vec<_>>()
            .join("\n    ")
    );
    ensure!(text.contains("nvme0:io0"), "no interrupts of its:\n{text}");
    Ok(sum)
}
