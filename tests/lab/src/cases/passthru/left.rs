//! What an IOMMU still lets through when a guest is gone: edu, driven from the host,
//! tries.

use super::{EDU, RUN, small, to_host, to_ppt};
use crate::cases::share;
use crate::dirs::Dirs;
use crate::guest::said;
use crate::host::{Config, Host, SHORT};
use anyhow::{Result, ensure};

/// Within the memory that every guest of these tests had.
const GUESTS: &str = "0x100000";

/// Below a port: what is passed, and an edu on the same bus that no function is.
const PASSED: &str = "0000:01:00.0";
const FORGOTTEN: &str = "0000:01:00.1";

/// Who keeps functions from the memory of others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// The host's kernel: a function that nobody drives has no mappings.
    Hosts,
    /// vmm.ko: what is the host's passes as it is.
    Own,
}

/// Who has the function.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// ppt, for no VM.
    Ppt,
    /// The host.
    Host,
}

/// The program that drives edu, in the file system of the host `name`.
///
/// # Errors
/// It cannot be compiled.
pub fn program(dirs: &Dirs, config: &mut Config, name: &str) -> Result<()> {
    let source = include_str!("../../../host/edu-dma.c");
    let program = share::c_program(dirs, &format!("edu-dma-{name}"), source)?;
    config.file("guest/edu-dma", &program);
    Ok(())
}

/// edu is tried after a guest: by the host's own addresses, and where the host's driver
/// says where DMA went wrong, and there is `time`, by the guest's.
///
/// # Errors
/// A mapping is left, or edu is of no use to the host.
pub fn check(host: &mut Host, driver: Driver, holder: Holder, time: bool) -> Result<()> {
    let folder = format!("/sys/bus/pci/devices/{EDU}");
    let run = format!("chmod +x /guest/edu-dma; /guest/edu-dma {folder}");
    let word = match (driver, holder) {
        (Driver::Own, Holder::Host) => "reaches",
        _ => "blocked",
    };
    let text = host.must(&run, SHORT)?;
    ensure!(text.contains(word), "edu's DMA is not {word}, but {text}");
    if driver == Driver::Own {
        return Ok(());
    }
    let kind = host.must(&format!("cat {folder}/iommu_group/type"), SHORT)?;
    ensure!(
        kind.lines().any(|l| l.trim().starts_with("DMA")),
        "edu is not in the domain of the host's driver, but in {kind}"
    );
    if time {
        // The kernel tells of a few faults, and then of none for five seconds.
        let text = host.must(
            &format!("sleep 6; dmesg -c >/dev/null; {run} {GUESTS}; sleep 1; dmesg"),
            SHORT,
        )?;
        ensure!(
            text.contains(&format!("fault addr {GUESTS}")),
            "edu's DMA to what was the guest's is no fault:\n{text}"
        );
    }
    Ok(())
}

/// The devices of [`forgotten`].
pub fn port() -> impl Iterator<Item = String> {
    let words = [
        "-device",
        "pcie-root-port,id=below,addr=b.0,chassis=1",
        "-device",
        "nvme,serial=port,bus=below,addr=0.0,multifunction=on",
        "-device",
        "edu,bus=below,addr=0.1",
    ];
    words.into_iter().map(str::to_owned)
}

/// DMA under a requester ID that no function has: of an edu that the host's kernel was
/// told to forget. Under our own drivers it is blocked as long as a function on the
/// same bus below a port is kept for guests.
///
/// # Errors
/// It is not, or is when none is.
pub fn forgotten(host: &mut Host) -> Result<()> {
    let folder = format!("/sys/bus/pci/devices/{FORGOTTEN}");
    let registers = format!("cut -d ' ' -f 1 {folder}/resource | head -n 1");
    let registers = host.must(&registers, SHORT)?;
    let registers = registers.trim();
    // It decodes memory and is bus master.
    let forget = format!(
        "printf '\\006' | dd of={folder}/config bs=1 seek=4 conv=notrunc 2>/dev/null && \
         echo 1 >{folder}/remove; [ ! -e {folder} ]"
    );
    host.must(&forget, SHORT)?;
    let tried = |host: &mut Host, word: &str, when: &str| -> Result<()> {
        let run = format!("chmod +x /guest/edu-dma; /guest/edu-dma {registers}");
        let text = host.must(&run, SHORT)?;
        ensure!(
            text.contains(word),
            "DMA under an ID that no function has is not {word} {when}, but {text}"
        );
        Ok(())
    };
    tried(host, "reaches", "while all is the host's")?;
    to_ppt(host, EDU)?;
    to_ppt(host, PASSED)?;
    let mut guest = small("-s 5,passthru,0/5/0 -s 7,passthru,1/0/0");
    guest.environment.push("guest.wait=1".to_owned());
    guest.start(host)?;
    host.guest()
        .expect("edu: busy", RUN)
        .map_err(|e| e.context(said(host)))?;
    tried(host, "blocked", "while a guest has its neighbour")?;
    host.must("kill -9 $(pidof bhyve)", SHORT)?;
    guest.expect_exit(host, 128 + 9, SHORT)?;
    guest.destroy(host)?;
    tried(host, "blocked", "while ppt has its neighbour")?;
    to_host(host, EDU)?;
    to_host(host, PASSED)?;
    tried(host, "reaches", "when all is the host's again")?;
    let again = format!("echo 1 >/sys/bus/pci/rescan; [ -e {folder} ]");
    host.must(&again, SHORT).map(drop)
}
