//! FreeBSD from its own disk: bhyveload -d, a power cut, and what is left after it.

use crate::guest::{Guest, Load};
use crate::host::{Host, SHORT};
use crate::images;
use crate::runner::{Case, Lab};
use anyhow::{Result, ensure};
use std::path::PathBuf;
use std::time::Duration;

const NAME: &str = "freebsd-disk";
/// Where the image is in the host, and the copy that the guest writes to.
const IMAGE: &str = "guest/disk";
const DISK: &str = "/tmp/disk";
/// From bhyve's start to the guest's shell.
const UP: Duration = Duration::from_secs(300);
const COMMAND: Duration = Duration::from_secs(60);
/// How the guest's /etc/rc says that it is up; the groups are its CPUs, how often
/// this disk has been booted, its network card and its root.
const READY: &str = r"(?s)BHYVE-RS GUEST UP ncpu=(\d+) boots=(\d+) net=(\w+) root=(\S+).*bhyvers# ";

/// The test, and the image for its host, if there is one.
pub fn case(lab: &Lab) -> (Case, Option<(&'static str, PathBuf)>) {
    match images::local_freebsd_disk(&lab.dirs) {
        Some(image) => (Case::new(NAME, survives), Some((IMAGE, image))),
        None => (
            Case::skipped(NAME, "no disk/freebsd-12.1-disk.img in an image directory"),
            None,
        ),
    }
}

/// Types a line; what the guest has said up to its next prompt.
fn types(host: &mut Host, line: &str) -> Result<String> {
    let console = host.guest();
    console.send(format!("{line}\r").as_bytes())?;
    Ok(console.expect(r"\nbhyvers# ", COMMAND)?.before)
}

/// Waits for the shell and checks what /etc/rc has said.
fn is_up(host: &mut Host, vcpus: u32, boots: u32) -> Result<()> {
    let found = host.guest().expect(READY, UP)?;
    let said = [1, 2, 3, 4].map(|i| found.group(i).to_owned());
    let wanted = [
        vcpus.to_string(),
        boots.to_string(),
        "vtnet0".to_owned(),
        "/dev/vtbd0p2".to_owned(),
    ];
    ensure!(said == wanted, "{said:?} and not {wanted:?}");
    Ok(())
}

fn survives(_: &Lab, host: &mut Host) -> Result<()> {
    host.must(&format!("cp /{IMAGE} {DISK}"), SHORT)?;
    let load = Load::Disk {
        images: vec![DISK.to_owned()],
    };
    let mut guest = Guest::new("", load);
    guest.vcpus = 2;
    guest.options = format!("-s 2,virtio-blk,{DISK} -s 3,virtio-net,slirp");
    guest.start(host)?;
    is_up(host, 2, 1)?;
    let text = types(
        host,
        "ping -q -c 1 10.0.2.2; kldstat; echo what-was-$((40+2)) >/root/file; sync; cat /root/file",
    )?;
    // procfs is in loader.conf, pseudofs is what it depends on by linker.hints.
    for wanted in [
        "procfs.ko",
        "pseudofs.ko",
        "what-was-42",
        "1 packets received",
    ] {
        ensure!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    host.must("kill -9 $(pidof bhyve)", SHORT)?;
    guest.expect_exit(host, 128 + 9, SHORT)?;
    guest.destroy(host)?;
    host.must(&format!("grep -q what-was-42 {DISK}"), SHORT)?;

    // The second time from the loader's prompt.
    guest.vcpus = 1;
    let lines = "lsdev\\nmore /root/file\\nload /boot/kernel/kernel\\nload nullfs\\nboot\\n";
    let said = host.must(
        &format!(
            "printf '{lines}' | bhyveload -m {}M -e autoboot_delay=NO -d {DISK} {}",
            guest.memory_mib, guest.vm
        ),
        COMMAND,
    )?;
    for wanted in ["* disk0p2: UFS2", "what-was-42", "nullfs.ko"] {
        ensure!(said.contains(wanted), "no {wanted:?} in:\n{said}");
    }
    let line = guest.run_line(host);
    host.must(&line, SHORT)?;
    is_up(host, 1, 2)?;
    let text = types(host, "cat /root/file; kldstat; mount")?;
    for wanted in ["what-was-42", "nullfs.ko", "/dev/vtbd0p2 on / (ufs, local"] {
        ensure!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    host.guest().send(b"shutdown -p now\r")?;
    guest.expect_exit(host, 1, Duration::from_secs(120))?;
    guest.destroy(host)?;
    host.must(&format!("rm {DISK}"), SHORT).map(drop)
}
