//! What an IOMMU still lets through when a guest is gone: edu, driven from the host,
//! tries.

use super::EDU;
use crate::cases::share;
use crate::dirs::Dirs;
use crate::host::{Config, Host, SHORT};
use anyhow::{Result, ensure};

/// Within the memory that every guest of these tests had.
const GUESTS: &str = "0x100000";

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
