//! `-s SLOT,passthru,WHICH[,rom=FILE]`: a function of the host's PCI bus in the
//! guest's.
//!
//! [`request`] is the command line and the rules of configuration space, [`msix`]
//! the emulated MSI-X table, [`device`] the function that the guest sees,
//! [`backend`] the host's function and the kernel's part, [`survey`] what can be
//! passed and why not.
//!
//! The guest never reaches a BAR register, the MSI and MSI-X capabilities or the
//! MSI-X table of the device: the kernel programs these. BARs are mapped into the
//! guest, all but the pages of the MSI-X table, in which the rest is reached by
//! exits.

pub mod backend;
pub mod device;
pub mod msix;
pub mod request;
pub mod survey;

use vmmapi::host_pci::PciAddress;

use self::request::{Options, Which};
use super::catalog::{Means, Plan};
use crate::config::PciSlot;

/// A function of the host's, given to the VM.
///
/// # Errors
/// What is wrong with the options or the host, and what to do about it.
pub fn build(slot: &PciSlot, means: &Means<'_>) -> Result<Plan, String> {
    let options: Options = slot.conf.parse()?;
    let vm = means
        .machine
        .kernel()
        .ok_or("this machine cannot be given devices of the host's")?;
    let host = survey::host()?;
    let at = find(&options.which, &host)?;
    let rom = match &options.rom {
        None => Vec::new(),
        Some(path) => read_rom(path)?,
    };
    if let Some(text) = host.refusal(at) {
        return Err(text);
    }
    let backend = backend::Host::bind(vm, at).map_err(|why| host.explain(at, &why))?;
    device::Passthrough::plan(Box::new(backend), rom)
}

fn find(which: &Which, host: &survey::Survey) -> Result<PciAddress, String> {
    match which {
        Which::At(at) => Ok(*at),
        Which::Unit(n) => host.unit(*n).ok_or_else(|| {
            format!("there is no ppt{n}; \"bhyvectl passthru list\" shows what is held by ppt")
        }),
    }
}

/// Large enough for any: the largest that there are have 1 MiB.
const ROM_LIMIT: u64 = 16 << 20;

fn read_rom(path: &std::path::Path) -> Result<Vec<u8>, String> {
    let fail = |e: &dyn std::fmt::Display| format!("rom={}: {e}", path.display());
    let len = std::fs::metadata(path).map_err(|e| fail(&e))?.len();
    if len == 0 || len > ROM_LIMIT {
        return Err(fail(&"an expansion ROM has 1 byte to 16 MiB"));
    }
    std::fs::read(path).map_err(|e| fail(&e))
}
